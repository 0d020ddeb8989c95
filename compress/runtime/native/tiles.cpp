#include "tiles.h"

#include <cstring>

namespace sq {
namespace {

constexpr int AHEAD = 8 * COMPACT_STEP;  // bytes

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

// The same with indices of 2 bits, `steps` times 8 inputs.
template <int M>
__attribute__((noinline)) void compact_tile(const uint8_t* level, int64_t stride, const int8_t* weight, int64_t steps,
                                            int32_t* sums) {
    const __m512i two_bits = _mm512_set1_epi32(0x03030303), second_half = _mm512_set1_epi32(0x04040000);
    __m512i sum[M][4];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) sum[m][n] = _mm512_setzero_si512();
    for (int64_t step = 0; step < steps; ++step, weight += COMPACT_STEP, level += 8) {
#pragma GCC unroll 5
        for (int line = 0; line < 5; ++line) _mm_prefetch(weight + AHEAD + line * 64, _MM_HINT_T0);
        __m512i x[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            int64_t eight;
            std::memcpy(&eight, level + m * stride, 8);
            x[m] = _mm512_set1_epi64(eight);
        }
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
            const __m128i bits = _mm_load_si128(reinterpret_cast<const __m128i*>(weight + PANEL * 4 + n * 16));
            __m512i at = _mm512_cvtepu8_epi32(bits);  // fields of 2 bits to bytes: to bits 0, 8, 16, 24
            at = _mm512_or_si512(at, _mm512_slli_epi32(at, 12));
            at = _mm512_and_si512(_mm512_or_si512(at, _mm512_slli_epi32(at, 6)), two_bits);
            at = _mm512_or_si512(at, second_half);
            const __m512i w = _mm512_load_si512(weight + n * 64);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sum[m][n] = _mm512_dpbusd_epi32(sum[m][n], _mm512_shuffle_epi8(x[m], at), w);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) _mm512_store_si512(sums + m * PANEL + n * LANES, sum[m][n]);
}

constexpr Tile DENSE[ROWS + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
template <int PARTS>
constexpr Tile SPARSE[SPARSE_ROWS + 1] = {nullptr,
                                          sparse_tile<1, PARTS>,
                                          sparse_tile<2, PARTS>,
                                          sparse_tile<3, PARTS>,
                                          sparse_tile<4, PARTS>,
                                          sparse_tile<5, PARTS>};

constexpr Tile COMPACT[COMPACT_ROWS + 1] = {nullptr, compact_tile<1>, compact_tile<2>, compact_tile<3>, compact_tile<4>};

}  // namespace

Form form_of(int64_t inputs, int span) {
    if (span == 2) return {COMPACT, COMPACT_ROWS, inputs / 8, COMPACT_STEP};
    if (span == 8) return {SPARSE<2>, SPARSE_ROWS, inputs / WINDOW, 4 * PANEL * 4};
    if (span == 16) return {SPARSE<1>, SPARSE_ROWS, inputs / WINDOW, 2 * PANEL * 4};
    return {DENSE, ROWS, (inputs + 3) / 4, PANEL * 4};
}

}  // namespace sq
