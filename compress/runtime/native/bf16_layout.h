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

// 16 pairs from the `at`-th of a row on, zeros beyond `width`: floats times `by`, or numbers that are bfloat16 already
// (then `width` is even and `by` 1).
SQ_INLINE SQ_BF16 __m512i pairs_of(const float* row, int64_t at, int64_t width, float by = 1.0f) {
    const __m512 low = _mm512_maskz_loadu_ps(first(width - 2 * at), row + 2 * at);
    const __m512 high = _mm512_maskz_loadu_ps(first(width - 2 * at - LANES), row + 2 * at + LANES);
    return rounded(_mm512_mul_ps(low, _mm512_set1_ps(by)), _mm512_mul_ps(high, _mm512_set1_ps(by)));
}
SQ_INLINE SQ_BF16 __m512i pairs_of(const uint16_t* row, int64_t at, int64_t width, float = 1.0f) {
    return _mm512_maskz_loadu_epi32(first(width / 2 - at), row + 2 * at);
}

// 16 numbers of each of two rows, one row after the other; zeros where `mask` has none and for a row that is null.
SQ_INLINE SQ_BF16 __m512i two_rows(const float* one, const float* next, __mmask16 mask) {
    return rounded(one ? _mm512_maskz_loadu_ps(mask, one) : _mm512_setzero_ps(),
                   next ? _mm512_maskz_loadu_ps(mask, next) : _mm512_setzero_ps());
}
SQ_INLINE SQ_BF16 __m512i two_rows(const uint16_t* one, const uint16_t* next, __mmask16 mask) {
    const __m256i low = one ? _mm256_maskz_loadu_epi16(mask, one) : _mm256_setzero_si256();
    const __m256i high = next ? _mm256_maskz_loadu_epi16(mask, next) : _mm256_setzero_si256();
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// K [keys, width] as [pairs of the width, keys] in panels of 64 keys (the last of 32), zeros beyond the last key; of 32
// keys the first 16 columns are 0-3, 8-11, .., the others 4-7, 12-15, ... Returns the largest |k|^2,
// infinity for a NaN.
template <typename T>
SQ_BF16 float lay_out_keys(const T* k, int64_t stride, int64_t keys, int64_t padded, int64_t width, uint32_t* to) {
    const int64_t pairs = (width + 1) / 2;
    __m512 largest = _mm512_setzero_ps();
    __mmask16 broken = 0;
    for (int64_t key = 0; key < padded; key += LANES) {
        uint32_t* panel = to + key / 64 * 64 * pairs + key % 64;
        const int64_t across = padded - key / 64 * 64 >= 64 ? 64 : 32, start = key / 32 * 32 + key % 32 / 4;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t at = 0; at < pairs; at += LANES) {
            __m512 row[16];
            for (int i = 0; i < 16; ++i) {
                const int64_t from = start + i / 4 * 8 + i % 4;
                const __m512i pairs_of_key = from < keys ? pairs_of(k + from * stride, at, width) : _mm512_setzero_si512();
                row[i] = _mm512_castsi512_ps(pairs_of_key);
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
template <typename T>
SQ_BF16 void lay_out_values(const T* v, int64_t stride, int64_t keys, int64_t padded, int64_t width, int64_t wide,
                            uint32_t* to) {
    alignas(64) uint16_t in_turn[32];
    for (int i = 0; i < 32; ++i) in_turn[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
    const __m512i order = _mm512_load_si512(in_turn);
    for (int64_t column = 0; column < wide; column += LANES) {
        uint32_t* panel = to + column / 64 * 64 * (padded / 2) + column % 64;
        const int64_t across = wide - column / 64 * 64 >= 64 ? 64 : wide % 64;
        const __mmask16 mask = first(width - column);
        for (int64_t key = 0; key < padded; key += 2) {
            const T* row = v + key * stride + column;
            const __m512i two = two_rows(key < keys ? row : nullptr, key + 1 < keys ? row + stride : nullptr, mask);
            _mm512_store_si512(panel + key / 2 * across, _mm512_permutexvar_epi16(order, two));
        }
    }
}

// Rows of Q times `by` (see `pairs_of`), zeros in the rows up to `padded`; returns the largest |q|^2.
template <typename T>
SQ_BF16 float lay_out_queries(const T* q, int64_t stride, int64_t rows, int64_t padded, int64_t width, float by,
                              uint32_t* to) {
    const int64_t pairs = (width + 1) / 2;
    float largest = 0.0f;
    for (int64_t i = 0; i < padded; ++i) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t at = 0; at < pairs; at += LANES) {
            const __m512i two = i < rows ? pairs_of(q + i * stride, at, width, by) : _mm512_setzero_si512();
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
