// Q, K and V as pairs of bfloat16, in the order in which the products of attention_bf16.cpp read them.
#pragma once

#include <limits>

#include "transpose.h"

// Marks functions that only a CPU with these instructions may enter. Older compilers do not know them.
#if (defined(__clang__) && __clang_major__ >= 9) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 10)
#define SQ_BF16 __attribute__((target("avx512bf16,avx512vbmi")))
#endif

#ifdef SQ_BF16
namespace sq {
namespace {

SQ_INLINE SQ_BF16 __m512i rounded(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// K [keys, width] as [pairs of the width, keys] in panels of 64 keys (the last of 32), zeros beyond the last key; of 32
// keys the first 16 columns are 0-3, 8-11, .., the others 4-7, 12-15, ... Returns the largest |k|^2,
// infinity for a NaN.
SQ_BF16 float lay_out_keys(const float* k, int64_t stride, int64_t keys, int64_t padded, int64_t width, uint32_t* to) {
    const int64_t pairs = (width + 1) / 2;
    __m512 largest = _mm512_setzero_ps();
    __mmask16 broken = 0;
    for (int64_t key = 0; key < padded; key += LANES) {
        uint32_t* panel = to + key / 64 * 64 * pairs + key % 64;
        const int64_t across = padded - key / 64 * 64 >= 64 ? 64 : 32, start = key / 32 * 32 + key % 32 / 4;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t at = 0; at < pairs; at += LANES) {
            __m512 row[16];
            const __mmask16 low = first(width - 2 * at), high = first(width - 2 * at - LANES);
            for (int i = 0; i < 16; ++i) {
                const int64_t from = start + i / 4 * 8 + i % 4;
                const float* values = k + (from < keys ? from : 0) * stride + 2 * at;
                const __mmask16 there = from < keys ? 0xffff : 0;
                row[i] = _mm512_castsi512_ps(rounded(_mm512_maskz_loadu_ps(low & there, values),
                                                     _mm512_maskz_loadu_ps(high & there, values + LANES)));
            }
            alignas(64) float turned[16 * 16];
            transpose(row, turned, LANES);
            for (int64_t i = 0; i < LANES && at + i < pairs; ++i) {
                const __m512i column = _mm512_load_si512(turned + i * LANES);
                _mm512_store_si512(panel + (at + i) * across, column);
                squares = _mm512_dpbf16_ps(squares, (__m512bh)column, (__m512bh)column);
            }
        }
        broken |= _mm512_cmp_ps_mask(squares, squares, _CMP_UNORD_Q);
        largest = _mm512_max_ps(squares, largest);
    }
    return broken ? std::numeric_limits<float>::infinity() : _mm512_reduce_max_ps(largest);
}

// V [keys, width] as [pairs of keys, columns] in panels of 64 columns (the last of 16 to 64), zeros where there is none.
SQ_BF16 void lay_out_values(const float* v, int64_t stride, int64_t keys, int64_t padded, int64_t width, int64_t wide,
                            uint32_t* to) {
    alignas(64) uint16_t in_turn[32];
    for (int i = 0; i < 32; ++i) in_turn[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
    const __m512i order = _mm512_load_si512(in_turn);
    for (int64_t column = 0; column < wide; column += LANES) {
        uint32_t* panel = to + column / 64 * 64 * (padded / 2) + column % 64;
        const int64_t across = wide - column / 64 * 64 >= 64 ? 64 : wide % 64;
        const __mmask16 mask = first(width - column);
        for (int64_t key = 0; key < padded; key += 2) {
            const float* row = v + key * stride + column;
            const __m512 one = key < keys ? _mm512_maskz_loadu_ps(mask, row) : _mm512_setzero_ps();
            const __m512 next = key + 1 < keys ? _mm512_maskz_loadu_ps(mask, row + stride) : _mm512_setzero_ps();
            _mm512_store_si512(panel + key / 2 * across, _mm512_permutexvar_epi16(order, rounded(one, next)));
        }
    }
}

// Rows of Q times `by`, zeros in the rows up to `padded`; returns the largest |q|^2.
SQ_BF16 float lay_out_queries(const float* q, int64_t stride, int64_t rows, int64_t padded, int64_t width, float by,
                              uint32_t* to) {
    const int64_t pairs = (width + 1) / 2;
    float largest = 0.0f;
    for (int64_t i = 0; i < padded; ++i) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t at = 0; at < pairs; at += LANES) {
            const float* row = q + i * stride + 2 * at;
            const __mmask16 low = i < rows ? first(width - 2 * at) : 0;
            const __mmask16 high = i < rows ? first(width - 2 * at - LANES) : 0;
            const __m512i two = rounded(_mm512_mul_ps(_mm512_maskz_loadu_ps(low, row), _mm512_set1_ps(by)),
                                        _mm512_mul_ps(_mm512_maskz_loadu_ps(high, row + LANES), _mm512_set1_ps(by)));
            _mm512_mask_storeu_epi32(to + i * pairs + at, first(pairs - at), two);
            squares = _mm512_dpbf16_ps(squares, (__m512bh)two, (__m512bh)two);
        }
        const float square = _mm512_reduce_add_ps(squares);
        if (!(square <= largest) && largest == largest) largest = square;  // a NaN stays
    }
    return largest;
}

}  // namespace
}  // namespace sq
#endif
