// y_TO = activation(scale_x * scale_O * ((level_TI - zero_point) @ q_OI^T) + bias_O + residual_TO), by AVX-512 VNNI.
//
// The weights lie in panels of 64 outputs; in a panel, 4 inputs of each output next to each other, as VPDPBUSD takes
// them: panel[i / 4][o][i % 4]. A tile of 6 rows x 64 outputs stays in registers while it runs over all inputs, so the
// int32 sums are exact and never written. The zero point is taken off as zero_point * (sum of the output's weights).
//
// Sparse weights are not expanded: where at most 4 of each 8 (16) consecutive inputs of every output have weights, the
// panel holds those 4 and, as bytes, where among 16 inputs they belong. VPSHUFB gives each output its own 4 inputs, so
// one VPDPBUSD does the work of two (four). The shuffles run beside the multiplications where the CPU has a unit for
// them: on AMD Zen 4 2:4 weights go 1.3 times faster than any dense int8 kernel can.
#include "gemm.h"

#include <cstring>

#include "activation.h"

namespace sq {
namespace {

constexpr int PANEL = 64;             // outputs of a panel: 4 registers
constexpr int ROWS = 6;               // rows of a tile: 6 * 4 sums, 4 weights, 1 input and some spare of 32 registers
constexpr int SPARSE_ROWS = 5;        // 5 * 4 sums, 4 weights, 4 indices, 1 input, 1 shuffled
constexpr int WINDOW = 16;            // inputs that a shuffle chooses from
constexpr int64_t CHUNK = 384 << 10;  // bytes of input that one piece of work reads: they stay in the L2 cache

struct Call {
    const Gemm& gemm;
    const uint8_t* level_TI;
    int64_t stride;
    float scale;
    int32_t zero_point;
    const float* residual_TO;  // or null
    const Levels* emitted;     // or null
    void* out_TO;              // float, or uint8 levels
    const Bump* bump;
};

// M rows x 64 outputs over all inputs. Not inlined: beside the epilogue's constants its sums would not fit the registers.
template <int M>
__attribute__((noinline)) void tile(const uint8_t* level, int64_t stride, const int8_t* weight, int64_t groups,
                                        int32_t* sums) {
    __m512i sum[M][4];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) sum[m][n] = _mm512_setzero_si512();
    for (int64_t group = 0; group < groups; ++group, weight += PANEL * 4, level += 4) {
        __m512i w[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
            w[n] = _mm512_load_si512(weight + n * 64);
            __asm__("" : "+v"(w[n]));  // loaded once, not by each of its M uses
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            int32_t four;
            std::memcpy(&four, level + m * stride, 4);
            const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n)  // as the intrinsic, but GCC 12 would move the sums about
                __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[m][n]) : "v"(a), "v"(w[n]));
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) _mm512_store_si512(sums + m * PANEL + n * LANES, sum[m][n]);
}

// The same with sparse weights: `windows` times 16 inputs, PARTS times 4 weights of each.
template <int M, int PARTS>
__attribute__((noinline)) void sparse_tile(const uint8_t* level, int64_t stride, const int8_t* weight, int64_t windows,
                                           int32_t* sums) {
    __m512i sum[M][4];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) sum[m][n] = _mm512_setzero_si512();
    for (int64_t window = 0; window < windows; ++window, level += WINDOW) {
#pragma GCC unroll 2
        for (int part = 0; part < PARTS; ++part, weight += 2 * PANEL * 4) {
            __m512i w[4], at[4];
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) {
                w[n] = _mm512_load_si512(weight + n * 128);
                at[n] = _mm512_load_si512(weight + n * 128 + 64);
                __asm__("" : "+v"(w[n]), "+v"(at[n]));
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const __m512i x =
                    _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(level + m * stride)));
#pragma GCC unroll 4
                for (int n = 0; n < 4; ++n) {
                    __m512i four;
                    __asm__("vpshufb %2, %1, %0" : "=v"(four) : "v"(x), "v"(at[n]));
                    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[m][n]) : "v"(four), "v"(w[n]));
                }
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) _mm512_store_si512(sums + m * PANEL + n * LANES, sum[m][n]);
}

using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*);

// How a matrix is laid out: `steps` of `bytes` for each panel, and the tiles that read them.
struct Form {
    const Tile* tiles;
    int rows;
    int64_t steps, bytes;
};

constexpr Tile DENSE[ROWS + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
template <int PARTS>
constexpr Tile SPARSE[SPARSE_ROWS + 1] = {nullptr,
                                          sparse_tile<1, PARTS>,
                                          sparse_tile<2, PARTS>,
                                          sparse_tile<3, PARTS>,
                                          sparse_tile<4, PARTS>,
                                          sparse_tile<5, PARTS>};

Form form_of(int64_t inputs, int span) {
    if (span == 8) return {SPARSE<2>, SPARSE_ROWS, inputs / WINDOW, 4 * PANEL * 4};
    if (span == 16) return {SPARSE<1>, SPARSE_ROWS, inputs / WINDOW, 2 * PANEL * 4};
    return {DENSE, ROWS, (inputs + 3) / 4, PANEL * 4};
}

// Rows row..end of the 64 outputs from `output` on.
template <int ACTIVATION, bool EMIT>
void piece(const Call& call, int64_t row, int64_t end, int64_t output) {
    const Activate<ACTIVATION> activate(call.bump);
    const Quantizer quantize(EMIT ? *call.emitted : Levels{1.0f, 0, 0, 255});
    const Gemm& gemm = call.gemm;
    const Form form = form_of(gemm.inputs, gemm.span);
    const int8_t* weight = gemm.panels + output / PANEL * form.steps * form.bytes;
    alignas(64) int32_t sums[ROWS * PANEL];
    __mmask16 mask[4];
    alignas(64) int32_t shift[PANEL];
    alignas(64) float step[PANEL], bias[PANEL];
    for (int n = 0; n < 4; ++n) {
        const int64_t at = output + n * LANES;
        mask[n] = first(gemm.outputs - at);
        const __m512i sum = _mm512_maskz_loadu_epi32(mask[n], gemm.sum_O + at);
        _mm512_store_si512(shift + n * LANES, _mm512_mullo_epi32(_mm512_set1_epi32(call.zero_point), sum));
        const __m512 scale = _mm512_maskz_loadu_ps(mask[n], gemm.scale_O + at);
        _mm512_store_ps(step + n * LANES, _mm512_mul_ps(_mm512_set1_ps(call.scale), scale));
        _mm512_store_ps(bias + n * LANES,
                        gemm.bias_O ? _mm512_maskz_loadu_ps(mask[n], gemm.bias_O + at) : _mm512_setzero_ps());
    }
    for (int rows; row < end; row += rows) {
        rows = static_cast<int>(end - row < form.rows ? end - row : form.rows);
        form.tiles[rows](call.level_TI + row * call.stride, call.stride, weight, form.steps, sums);
        for (int n = 0; n < 4; ++n) {
            const __m512i off = _mm512_load_si512(shift + n * LANES);
            const __m512 by = _mm512_load_ps(step + n * LANES), plus = _mm512_load_ps(bias + n * LANES);
            for (int m = 0; m < rows; ++m) {
                const int64_t to = (row + m) * gemm.outputs + output + n * LANES;
                const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + m * PANEL + n * LANES), off);
                __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), by, plus);
                if (call.residual_TO) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask[n], call.residual_TO + to));
                y = activate(y);
                if constexpr (EMIT)
                    _mm_mask_storeu_epi8(static_cast<uint8_t*>(call.out_TO) + to, mask[n], quantize(y));
                else
                    _mm512_mask_storeu_ps(static_cast<float*>(call.out_TO) + to, mask[n], y);
            }
        }
    }
}

using Piece = void (*)(const Call&, int64_t, int64_t, int64_t);

Piece piece_of(int activation, bool emit) {
    switch (activation) {
        case RELU: return emit ? piece<RELU, true> : piece<RELU, false>;
        case GELU:
        case GELU_TANH: return emit ? piece<GELU, true> : piece<GELU, false>;  // they differ by their table
        default: return emit ? piece<NONE, true> : piece<NONE, false>;
    }
}

const Bump* bump_of(int activation) {
    static const Bump gelu(GELU), gelu_tanh(GELU_TANH);
    return activation == GELU ? &gelu : activation == GELU_TANH ? &gelu_tanh : nullptr;
}

}  // namespace

void multiply(const Gemm& gemm, const uint8_t* level_TI, int64_t rows, int64_t stride, float scale, int32_t zero_point,
              const float* residual_TO, const Levels* emitted, void* out_TO, int threads) {
    const Call call{gemm,    level_TI, stride, scale, zero_point, residual_TO,
                    emitted, out_TO,   bump_of(gemm.activation)};
    const Piece run = piece_of(gemm.activation, emitted != nullptr);
    const int64_t panels = (gemm.outputs + PANEL - 1) / PANEL;
    constexpr int WHOLE = ROWS * SPARSE_ROWS;  // whole tiles of both forms
    int64_t chunk = CHUNK / (stride > 0 ? stride : 1) / WHOLE * WHOLE;
    if (chunk < 2 * WHOLE) chunk = 2 * WHOLE;
    const int64_t chunks = (rows + chunk - 1) / chunk;
    parallel(chunks * panels, threads, [&](int64_t index) {
        const int64_t row = index / panels * chunk;
        run(call, row, row + chunk < rows ? row + chunk : rows, index % panels * PANEL);
    });
}

}  // namespace sq

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

}  // namespace
}  // namespace sq

// q_OI, row by row, into panels (64-byte aligned), zeros where the last panel and the last four inputs are not full.
SQ_EXPORT void sq_pack(const int8_t* q_OI, int64_t outputs, int64_t inputs, int32_t span, int8_t* panels,
                       int32_t* sum_O, int threads) {
    const sq::Form form = sq::form_of(inputs, span);
    sq::parallel((outputs + sq::PANEL - 1) / sq::PANEL, threads, [&](int64_t panel) {
        int8_t* to = panels + panel * form.steps * form.bytes;
        std::memset(to, 0, static_cast<size_t>(form.steps * form.bytes));
        for (int64_t o = panel * sq::PANEL; o < outputs && o < (panel + 1) * sq::PANEL; ++o) {
            const int8_t* from = q_OI + o * inputs;
            int32_t sum = 0;
            for (int64_t i = 0; i < inputs; ++i) sum += from[i];
            sum_O[o] = sum;
            const int64_t lane = o % sq::PANEL;
            if (span == 4)
                sq::pack_dense(from, inputs, to + lane * 4);
            else
                sq::pack_sparse(from, inputs, span, to + lane / 16 * 128 + lane % 16 * 4);
        }
    });
}

SQ_EXPORT void sq_gemm(const sq::Gemm* gemm, const uint8_t* level_TI, int64_t rows, int64_t stride, float scale,
                       int32_t zero_point, const float* residual_TO, const sq::Levels* emitted, void* out_TO,
                       int threads) {
    sq::multiply(*gemm, level_TI, rows, stride, scale, zero_point, residual_TO, emitted, out_TO, threads);
}
