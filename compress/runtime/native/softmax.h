// Softmax of a row of scores in float32.
#pragma once

#include <limits>

#include "common.h"

namespace sq {

constexpr float LOG2E = 1.4426950408889634f;

// 2^x for x <= 0, to 1 unit in the last place; -inf gives 0.
SQ_INLINE __m512 exp2_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // in this order a NaN stays one
    const __m512 whole = _mm512_roundscale_ps(x, 8);
    const __m512 r = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.5403530e-4f);  // 2^r on -1/2..1/2: Taylor's ln(2)^k / k!
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3333558e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(9.6181291e-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(5.5504109e-2f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(2.4022651e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(6.9314718e-1f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

// scores[keys] → exp(scale * score + mask - maximum), zeros up to `padded`; returns 1 / their sum (0 without a key).
SQ_INLINE float softmax_row(float* score, int64_t keys, int64_t padded, float scale, const float* add,
                            const uint8_t* valid) {
    const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const __m512 by = _mm512_set1_ps(scale * LOG2E), log2e = _mm512_set1_ps(LOG2E);
    __m512 largest = none;
    for (int64_t at = 0; at < keys; at += LANES) {
        __mmask16 mask = first(keys - at);
        __m512 s = _mm512_mul_ps(_mm512_load_ps(score + at), by);
        if (add) s = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, add + at), log2e, s);
        if (valid) mask = _mm512_mask_test_epi32_mask(mask, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, valid + at)),
                                                      _mm512_set1_epi32(255));
        s = _mm512_mask_mov_ps(none, mask, s);
        _mm512_store_ps(score + at, s);
        largest = _mm512_max_ps(largest, s);
    }
    const float top = _mm512_reduce_max_ps(largest);
    if (top == -std::numeric_limits<float>::infinity()) {
        for (int64_t at = 0; at < padded; at += LANES) _mm512_store_ps(score + at, _mm512_setzero_ps());
        return 0.0f;
    }
    const __m512 off = _mm512_set1_ps(top);
    __m512 total = _mm512_setzero_ps();
    for (int64_t at = 0; at < keys; at += LANES) {
        const __m512 p = exp2_of(_mm512_sub_ps(_mm512_load_ps(score + at), off));
        _mm512_store_ps(score + at, p);
        total = _mm512_add_ps(total, p);
    }
    for (int64_t at = (keys + LANES - 1) / LANES * LANES; at < padded; at += LANES)
        _mm512_store_ps(score + at, _mm512_setzero_ps());
    return 1.0f / _mm512_reduce_add_ps(total);
}

}  // namespace sq
