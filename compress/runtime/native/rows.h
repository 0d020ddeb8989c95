// Work on rows of floats: into levels, and layer normalization with or without levels.
#pragma once

#include <cmath>

#include "common.h"

namespace sq {

// The affine part of a layer norm; weight and bias may be null.
struct Norm {
    const float* weight;
    const float* bias;
    int64_t width;
    float epsilon;
};

// Whether all values were finite: 0 * x is NaN for infinity and NaN.
SQ_INLINE bool quantize_row(const float* x, int64_t width, const Quantizer& quantize, uint8_t* level) {
    __m512 zeros = _mm512_setzero_ps();
    int64_t at = 0;
    for (; at + LANES <= width; at += LANES) {
        const __m512 value = _mm512_loadu_ps(x + at);
        zeros = _mm512_fmadd_ps(value, _mm512_setzero_ps(), zeros);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(level + at), quantize(value));
    }
    if (at < width) {
        const __mmask16 mask = first(width - at);
        const __m512 value = _mm512_maskz_loadu_ps(mask, x + at);
        zeros = _mm512_fmadd_ps(value, _mm512_setzero_ps(), zeros);
        _mm_mask_storeu_epi8(level + at, mask, quantize(value));
    }
    return !_mm512_cmp_ps_mask(zeros, zeros, _CMP_UNORD_Q);
}

// y = (x - mean) / sqrt(variance + epsilon) * weight + bias; y and level may be null, y may be x. Whether all of y is
// finite, which it is not if a value of x is not.
template <bool EMIT>
SQ_INLINE bool normalize_row(const float* x, const Norm& norm, const Quantizer& quantize, float* y, uint8_t* level) {
    const int64_t width = norm.width;
    const float count = static_cast<float>(width);
    __m512 total = _mm512_setzero_ps();
    for (int64_t at = 0; at < width; at += LANES)
        total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(first(width - at), x + at));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / count);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t at = 0; at < width; at += LANES) {
        const __mmask16 mask = first(width - at);
        const __m512 off = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + at), mean);
        squares = _mm512_fmadd_ps(off, off, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / count;
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(variance + norm.epsilon));
    __m512 zeros = _mm512_setzero_ps();
    for (int64_t at = 0; at < width; at += LANES) {
        const __mmask16 mask = first(width - at);
        __m512 value = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + at), mean), inverse);
        if (norm.weight) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, norm.weight + at));
        if (norm.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, norm.bias + at));
        zeros = _mm512_fmadd_ps(value, _mm512_setzero_ps(), zeros);
        if (y) _mm512_mask_storeu_ps(y + at, mask, value);
        if constexpr (EMIT) _mm_mask_storeu_epi8(level + at, mask, quantize(value));
    }
    return !_mm512_cmp_ps_mask(zeros, zeros, _CMP_UNORD_Q);
}

// Both: whether all values were finite.
bool quantize_rows(const float* x_TI, int64_t rows, int64_t width, const Levels& levels, uint8_t* level_TI,
                   int threads);
bool normalize_rows(const float* x_TI, int64_t rows, const Norm& norm, float* y_TI, const Levels* levels,
                    uint8_t* level_TI, int threads);

}  // namespace sq
