// What the kernels share. T rows (tokens), I in_features, O out_features.
#pragma once

#include <immintrin.h>
#include <omp.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

#define SQ_EXPORT extern "C" __attribute__((visibility("default")))
#define SQ_INLINE inline __attribute__((always_inline))

namespace sq {

// The levels of a quantized tensor as bytes: x ~ (level - zero_point) * scale, level in low..high.
struct Levels {
    float scale;
    int32_t zero_point, low, high;
};

constexpr int LANES = 16;  // 32-bit values of one register

SQ_INLINE __mmask16 first(int64_t count) {
    return count >= LANES ? 0xffff : static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1);
}

// round(x / scale) half to even, then the zero point, then the ends. 2^31 and more would wrap: the ends come first as
// floats. A NaN becomes the lowest level.
struct Quantizer {
    __m512 inverse, below, above;
    __m512i zero_point;

    explicit Quantizer(const Levels& levels)
        : inverse(_mm512_set1_ps(1.0f / levels.scale)),
          below(_mm512_set1_ps(static_cast<float>(levels.low - levels.zero_point))),
          above(_mm512_set1_ps(static_cast<float>(levels.high - levels.zero_point))),
          zero_point(_mm512_set1_epi32(levels.zero_point)) {}

    SQ_INLINE __m128i operator()(__m512 x) const {
        x = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(x, inverse), below), above);
        return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(x), zero_point));
    }
};

// Runs body(index) for every index of 0..count, on up to `threads` threads of the pool that PyTorch uses too.
template <typename Body>
SQ_INLINE void parallel(int64_t count, int threads, const Body& body) {
    if (threads > count) threads = static_cast<int>(count);
    if (threads <= 1) {
        for (int64_t index = 0; index < count; ++index) body(index);
        return;
    }
    std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
    for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(index);
}

}  // namespace sq
