// Int8 weights, row by row, into the layouts of tiles.h.
#include <cstring>

#include "tiles.h"

// Whether of every 4 consecutive inputs at most 2 have weights, and the inputs are a multiple of 16.
SQ_EXPORT int32_t sq_two_of_four(const int8_t* q_OI, int64_t outputs, int64_t inputs) {
    if (inputs % sq::WINDOW) return 0;
    for (const int8_t* at = q_OI; at < q_OI + outputs * inputs; at += 4)
        if ((at[0] != 0) + (at[1] != 0) + (at[2] != 0) + (at[3] != 0) > 2) return 0;
    return 1;
}

// The largest span that the weights allow: 16 or 8 where of so many consecutive inputs at most 4 have weights, else 4.
SQ_EXPORT int32_t sq_span(const int8_t* q_OI, int64_t outputs, int64_t inputs) {
    if (inputs % sq::WINDOW) return 4;
    int32_t span = 16;
    for (const int8_t* at = q_OI; at < q_OI + outputs * inputs; at += sq::WINDOW) {
        const uint32_t there = _mm_test_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)), _mm_set1_epi8(-1));
        if (__builtin_popcount(there & 0xff) > 4 || __builtin_popcount(there >> 8) > 4) return 4;
        if (__builtin_popcount(there) > 4) span = 8;
    }
    return span;
}

// Bytes that the packed weights take.
SQ_EXPORT int64_t sq_packed_size(int64_t outputs, int64_t inputs, int32_t span) {
    const sq::Form form = sq::form_of(inputs, span);
    return (outputs + sq::PANEL - 1) / sq::PANEL * form.steps * form.bytes;
}

namespace sq {
namespace {

// One output's weights into its column of a dense panel.
void pack_dense(const int8_t* from, int64_t inputs, int8_t* column) {
    for (int64_t at = 0; at < inputs; at += 4)
        std::memcpy(column + at * PANEL, from + at, static_cast<size_t>(inputs - at < 4 ? inputs - at : 4));
}

// The same into a sparse one: 16 outputs' weights and their indices in turn. Places without a weight keep 0 times input 0.
void pack_sparse(const int8_t* from, int64_t inputs, int span, int8_t* column) {
    for (int64_t begin = 0; begin < inputs; begin += span, column += 2 * PANEL * 4) {
        int place = 0;
        for (int64_t i = begin; i < begin + span; ++i)
            if (from[i]) {
                column[place] = from[i];
                column[64 + place++] = static_cast<int8_t>(i % WINDOW);
            }
    }
}

// The same with indices of 2 bits into their own four: `lane` of the panel's 64.
void pack_compact(const int8_t* from, int64_t inputs, int64_t lane, int8_t* panel) {
    for (int64_t begin = 0; begin < inputs; begin += 8, panel += COMPACT_STEP) {
        unsigned bits = 0;
        for (int half = 0; half < 2; ++half) {
            int place = 2 * half;
            for (int i = 0; i < 4; ++i)
                if (const int8_t w = from[begin + 4 * half + i]) {
                    panel[lane * 4 + place] = w;
                    bits |= static_cast<unsigned>(i) << (2 * place++);
                }
        }
        panel[PANEL * 4 + lane] = static_cast<int8_t>(bits);
    }
}

}  // namespace
}  // namespace sq

// q_OI, row by row, into panels (64-byte aligned), zeros where the last panel and the last four inputs are not full.
SQ_EXPORT void sq_pack(const int8_t* q_OI, int64_t outputs, int64_t inputs, int32_t span, int8_t* panels,
                       int threads) {
    const sq::Form form = sq::form_of(inputs, span);
    sq::parallel((outputs + sq::PANEL - 1) / sq::PANEL, threads, [&](int64_t panel) {
        int8_t* to = panels + panel * form.steps * form.bytes;
        std::memset(to, 0, static_cast<size_t>(form.steps * form.bytes));
        for (int64_t o = panel * sq::PANEL; o < outputs && o < (panel + 1) * sq::PANEL; ++o) {
            const int8_t* from = q_OI + o * inputs;
            const int64_t lane = o % sq::PANEL;
            if (span == 2)
                sq::pack_compact(from, inputs, lane, to);
            else if (span == 4)
                sq::pack_dense(from, inputs, to + lane * 4);
            else
                sq::pack_sparse(from, inputs, span, to + lane / 16 * 128 + lane % 16 * 4);
        }
    });
}
