// GELU and its like without exp: y = max(x, 0) - h(|x|).
//
// An activation x * g(x) whose gate has g(-x) = 1 - g(x) differs from max(x, 0) by a bump h(|x|) = |x| * g(-|x|) that is
// even and soon zero. h is a table of polynomials: SEGMENTS pieces of equal width on [0, END], each through the
// Chebyshev points of its piece in double precision, looked up by register permutation. Absolute error below 1e-7.
#pragma once

#include <cmath>

#include "common.h"

namespace sq {

enum Activation { NONE = 0, RELU = 1, GELU = 2, GELU_TANH = 3 };

constexpr int SEGMENTS = 16, DEGREE = 5;
constexpr double END = 6.0;  // GELU(-6) = -6e-9

struct Bump {
    alignas(64) float coefficient[DEGREE + 1][SEGMENTS];

    explicit Bump(int activation) {
        const double pi = std::acos(-1.0), width = END / SEGMENTS;
        for (int segment = 0; segment < SEGMENTS; ++segment) {
            double point[DEGREE + 1], newton[DEGREE + 1], power[DEGREE + 1] = {};
            for (int i = 0; i <= DEGREE; ++i) {
                point[i] = 0.5 * std::cos(pi * (2 * i + 1) / (2 * DEGREE + 2));  // in -1/2..1/2 of the piece
                newton[i] = value(activation, (segment + 0.5 + point[i]) * width);
            }
            for (int order = 1; order <= DEGREE; ++order)  // divided differences
                for (int i = DEGREE; i >= order; --i)
                    newton[i] = (newton[i] - newton[i - 1]) / (point[i] - point[i - order]);
            for (int i = DEGREE; i >= 0; --i) {  // Newton's form to powers
                for (int k = DEGREE; k > 0; --k) power[k] = power[k - 1] - power[k] * point[i];
                power[0] = newton[i] - power[0] * point[i];
            }
            for (int k = 0; k <= DEGREE; ++k) coefficient[k][segment] = static_cast<float>(power[k]);
        }
    }

    static double value(int activation, double t) {
        if (activation == GELU_TANH)
            return t * 0.5 * (1 - std::tanh(std::sqrt(2 / std::acos(-1.0)) * (t + 0.044715 * t * t * t)));
        return t * 0.5 * std::erfc(t / std::sqrt(2.0));
    }
};

// The kind is a template argument of the kernels, so that nothing is decided inside their loops.
template <int ACTIVATION>
struct Activate {
    __m512 c[DEGREE + 1];

    explicit Activate(const Bump* bump) {
        if constexpr (ACTIVATION >= GELU)
            for (int k = 0; k <= DEGREE; ++k) c[k] = _mm512_load_ps(bump->coefficient[k]);
    }

    SQ_INLINE __m512 operator()(__m512 x) const {
        if constexpr (ACTIVATION == NONE) {
            return x;
        } else if constexpr (ACTIVATION == RELU) {
            return _mm512_max_ps(_mm512_setzero_ps(), x);  // a NaN stays one
        } else {
            const __m512 t = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(static_cast<float>(SEGMENTS / END)));
            const __m512 in = _mm512_min_ps(_mm512_set1_ps(SEGMENTS - 1e-6f * SEGMENTS), t);
            const __m512i piece = _mm512_cvttps_epi32(in);
            const __m512 r = _mm512_sub_ps(_mm512_sub_ps(in, _mm512_cvtepi32_ps(piece)), _mm512_set1_ps(0.5f));
            __m512 h = _mm512_permutexvar_ps(piece, c[DEGREE]);
            for (int k = DEGREE - 1; k >= 0; --k) h = _mm512_fmadd_ps(h, r, _mm512_permutexvar_ps(piece, c[k]));
            return _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), h);
        }
    }
};

}  // namespace sq
