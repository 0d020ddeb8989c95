// 16 x 16 values of 32 bits, turned in registers.
#pragma once

#include "common.h"

namespace sq {

// Column j of the 16 rows goes to `to + j * stride`, 64-byte aligned.
SQ_INLINE void transpose(const __m512* in, float* to, int64_t stride) {
    __m512 t[16], u[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_ps(in[2 * i], in[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(in[2 * i], in[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) {
            const __m512d a = _mm512_castps_pd(t[4 * i + j]), b = _mm512_castps_pd(t[4 * i + 2 + j]);
            u[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            u[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int j = 0; j < 4; ++j) {  // u[4 i + j]: columns 4 l + j of rows 4 i .. 4 i + 3, for the four 128-bit parts l
        const __m512 a = _mm512_shuffle_f32x4(u[j], u[4 + j], 0x88), b = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0x88);
        const __m512 c = _mm512_shuffle_f32x4(u[j], u[4 + j], 0xdd), d = _mm512_shuffle_f32x4(u[8 + j], u[12 + j], 0xdd);
        _mm512_store_ps(to + j * stride, _mm512_shuffle_f32x4(a, b, 0x88));
        _mm512_store_ps(to + (4 + j) * stride, _mm512_shuffle_f32x4(c, d, 0x88));
        _mm512_store_ps(to + (8 + j) * stride, _mm512_shuffle_f32x4(a, b, 0xdd));
        _mm512_store_ps(to + (12 + j) * stride, _mm512_shuffle_f32x4(c, d, 0xdd));
    }
}

}  // namespace sq
