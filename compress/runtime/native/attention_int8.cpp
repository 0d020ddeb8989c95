// Attention whose Q, K, P and V are levels (Deep Compression of pre-trained transformers, Wang et al. 2022, section
// 2.2): both products are exact sums of integers by AVX-512 VNNI, the softmax between them is float32.
//
// Of each product one factor is bytes 0..255 (Q, P), the other the levels minus 128 (K, V), as VPDPBUSD takes them.
// Zero points are taken off afterwards, in integers: with k' = k - 128 and its zero point z', over a head dimension D,
// sum (q - z)(k' - z') = sum q k' - z sum k' - z' sum q + D z z'. P >= 0, so its levels are counted from its zero point.
#include <cstring>

#include "attention.h"
#include "scratch.h"
#include "softmax.h"
#include "transpose.h"

namespace sq {
namespace {

constexpr int BLOCK = ATTENTION_BLOCK, SIGN = 128;

SQ_INLINE __m512i turned_sign(__m512i level) {
    return _mm512_xor_si512(level, _mm512_set1_epi8(static_cast<char>(SIGN)));
}

// out[M][16 N] = (a[M][count] @ b[count][16 N] - column[16 N] - row[M]) as floats; entries of a are 4 bytes, of b 4
// signed ones, `count` of them; a's stride in such entries.
template <int M, int N>
__attribute__((noinline)) void product(const uint32_t* a, int64_t a_stride, const int32_t* row, const uint32_t* b,
                                       const int32_t* column, int64_t count, float* out, int64_t out_stride) {
    __m512i sum[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; ++i, b += N * LANES) {
        __m512i w[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            w[n] = _mm512_load_si512(b + n * LANES);
            __asm__("" : "+v"(w[n]));  // loaded once, not by each of its M uses
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const __m512i x = _mm512_set1_epi32(static_cast<int>(a[m * a_stride + i]));
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n)  // as the intrinsic, but GCC 12 would move the sums about
                __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[m][n]) : "v"(x), "v"(w[n]));
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            __m512i found = _mm512_sub_epi32(sum[m][n], _mm512_set1_epi32(row[m]));
            if (column) found = _mm512_sub_epi32(found, _mm512_load_si512(column + n * LANES));
            _mm512_store_ps(out + m * out_stride + n * LANES, _mm512_cvtepi32_ps(found));
        }
}

// b in panels of 64 columns, the last of 16, 32, 48 or 64.
template <int M>
SQ_INLINE void all_columns(const uint32_t* a, int64_t a_stride, const int32_t* row, const uint32_t* b,
                           const int32_t* column, int64_t count, int64_t columns, float* out, int64_t out_stride) {
    for (int64_t at = 0; at < columns; at += 64) {
        const int64_t left = (columns - at) / LANES;
        (left >= 4 ? product<M, 4> : left == 3 ? product<M, 3> : left == 2 ? product<M, 2> : product<M, 1>)(
            a, a_stride, row, b + at * count, column ? column + at : nullptr, count, out + at, out_stride);
    }
}

// All rows of a up to the next even number must be there, and may hold anything.
void matmul(const uint32_t* a, int64_t a_stride, const int32_t* row, int64_t rows, const uint32_t* b,
            const int32_t* column, int64_t count, int64_t columns, float* out, int64_t out_stride) {
    int64_t at = 0;
    for (; at + 6 <= rows; at += 6)
        all_columns<6>(a + at * a_stride, a_stride, row + at, b, column, count, columns, out + at * out_stride,
                       out_stride);
    for (; at < rows; at += 2)
        all_columns<2>(a + at * a_stride, a_stride, row + at, b, column, count, columns, out + at * out_stride,
                       out_stride);
}

// 64 values of a row from `at` on as levels, zeros beyond `width`.
SQ_INLINE __m512i levels_of(const float* x, int64_t at, int64_t width, const Quantizer& quantize) {
    alignas(64) uint8_t level[64];
    for (int part = 0; part < 4; ++part) {
        const __mmask16 mask = first(width - at - part * LANES);
        const __m128i found = quantize(_mm512_maskz_loadu_ps(mask, x + at + part * LANES));
        _mm_store_si128(reinterpret_cast<__m128i*>(level + part * LANES), _mm_maskz_mov_epi8(mask, found));
    }
    return _mm512_load_si512(level);
}

SQ_INLINE __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1; }

// K as panels of 64 keys (the last of 16 to 64), [fours of the width][keys]; `column`: z sum k' - D z z' of each key.
void lay_out_keys(const float* k, int64_t stride, int64_t keys, int64_t padded, int64_t width, const MapLevels& map,
                  uint32_t* to, int32_t* column) {
    const Quantizer quantize(map.k);
    const int64_t fours = (width + 3) / 4;
    const int32_t constant = static_cast<int32_t>(width) * map.q.zero_point * (map.k.zero_point - SIGN);
    for (int64_t key = 0; key < padded; key += LANES) {
        uint32_t* panel = to + key / 64 * 64 * fours + key % 64;
        const int64_t across = padded - key / 64 * 64 >= 64 ? 64 : padded % 64;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t at = 0; at < fours; at += LANES) {
            __m512 row[16];
            for (int i = 0; i < 16; ++i) {
                const __m512i level = key + i < keys ? levels_of(k + (key + i) * stride, 4 * at, width, quantize)
                                                     : _mm512_setzero_si512();
                const __mmask64 there = key + i < keys ? first_bytes(width - 4 * at) : 0;
                row[i] = _mm512_castsi512_ps(_mm512_maskz_mov_epi8(there, turned_sign(level)));
            }
            alignas(64) float turned[16 * 16];
            transpose(row, turned, LANES);
            for (int64_t i = 0; i < LANES && at + i < fours; ++i) {
                const __m512i four = _mm512_load_si512(turned + i * LANES);
                _mm512_store_si512(panel + (at + i) * across, four);
                sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), four);
            }
        }
        const __m512i times = _mm512_mullo_epi32(sum, _mm512_set1_epi32(map.q.zero_point));
        _mm512_store_si512(column + key, _mm512_sub_epi32(times, _mm512_set1_epi32(constant)));
    }
}

// V as panels of 64 columns (the last of 16 to 64), [fours of keys][columns].
void lay_out_values(const float* v, int64_t stride, int64_t keys, int64_t padded, int64_t width, int64_t wide,
                    const Levels& levels, uint32_t* to) {
    const Quantizer quantize(levels);
    for (int64_t column = 0; column < wide; column += LANES) {
        uint32_t* panel = to + column / 64 * 64 * (padded / 4) + column % 64;
        const int64_t across = wide - column / 64 * 64 >= 64 ? 64 : wide % 64;
        const __mmask16 mask = first(width - column);
        for (int64_t key = 0; key < padded; key += 4) {
            __m512i four = _mm512_setzero_si512();
            for (int i = 3; i >= 0; --i) {
                const __m512 row = key + i < keys ? _mm512_maskz_loadu_ps(mask, v + (key + i) * stride + column)
                                                  : _mm512_setzero_ps();
                four = _mm512_or_si512(_mm512_slli_epi32(four, 8), _mm512_cvtepu8_epi32(quantize(row)));
            }
            _mm512_store_si512(panel + key / 4 * across, turned_sign(four));
        }
    }
}

// Unnormalized P, times `by`, as levels from its zero point on, zeros up to `padded`; returns their sum.
SQ_INLINE int32_t quantize_map(const float* p, int64_t padded, float by, float highest, uint8_t* level) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t at = 0; at < padded; at += LANES) {
        const __m512 x = _mm512_mul_ps(_mm512_load_ps(p + at), _mm512_set1_ps(by));
        const __m512 inside = _mm512_min_ps(_mm512_max_ps(x, _mm512_setzero_ps()), _mm512_set1_ps(highest));
        const __m512i found = _mm512_cvtps_epi32(inside);
        _mm_store_si128(reinterpret_cast<__m128i*>(level + at), _mm512_cvtepi32_epi8(found));
        sum = _mm512_add_epi32(sum, found);
    }
    return _mm512_reduce_add_epi32(sum);
}

}  // namespace

void queries_int8(const AttentionCall& call, int64_t batch, int64_t head, int64_t begin, int64_t end) {
    const AttentionShape& s = call.shape;
    const MapLevels& map = *call.map;
    const int64_t keys = s.keys, padded = up(keys, LANES), width = s.width;
    const int64_t wide = up(width, LANES), fours = (width + 3) / 4, across = up(fours, LANES);
    static thread_local Scratch scratch;
    uint32_t* columns = static_cast<uint32_t*>(scratch.of(
        4 * (padded * fours + padded / 4 * wide + padded + BLOCK * (across + padded + wide) + BLOCK * padded / 4)));
    uint32_t* rows = columns + padded * fours;
    int32_t* of_key = reinterpret_cast<int32_t*>(rows + padded / 4 * wide);
    uint32_t* q = reinterpret_cast<uint32_t*>(of_key + padded);
    float* scores = reinterpret_cast<float*>(q + BLOCK * across);
    float* results = scores + BLOCK * padded;
    uint8_t* p = reinterpret_cast<uint8_t*>(results + BLOCK * wide);
    lay_out_keys(call.k_of<float>(batch, head), s.k_stride[2], keys, padded, width, map, columns, of_key);
    lay_out_values(call.v_of<float>(batch, head), s.v_stride[2], keys, padded, width, wide, map.v, rows);
    const Quantizer of_q(map.q), quantize(call.levels ? *call.levels : Levels{1.0f, 0, 0, 255});
    const int32_t zero_k = map.k.zero_point - SIGN, zero_v = map.v.zero_point - SIGN;
    const float highest = static_cast<float>(map.p.high - map.p.zero_point);
    for (int64_t query = begin; query < end; query += BLOCK) {
        const int64_t count = end - query < BLOCK ? end - query : BLOCK;
        const float* from = call.q_of<float>(batch, head) + query * s.q_stride[2];
        int32_t of_query[BLOCK] = {}, of_row[BLOCK] = {};
        for (int64_t i = 0; i < count; ++i) {
            __m512i sum = _mm512_setzero_si512();
            for (int64_t at = 0; at < fours; at += LANES) {
                const __m512i level = levels_of(from + i * s.q_stride[2], 4 * at, width, of_q);
                _mm512_store_si512(q + i * across + at, level);
                sum = _mm512_dpbusd_epi32(sum, level, _mm512_set1_epi8(1));
            }
            of_query[i] = zero_k * _mm512_reduce_add_epi32(sum);
        }
        matmul(q, across, of_query, count, columns, of_key, fours, padded, scores, padded);
        for (int64_t i = 0; i < count; ++i) {
            const RowMask mask = mask_of(call, batch, head, query + i);
            float* row = scores + i * padded;
            const float scale = s.scale * map.q.scale * map.k.scale;
            const float inverse = softmax_row(row, mask.seen, padded, scale, mask.add, mask.valid);
            of_row[i] = zero_v * quantize_map(row, padded, inverse / map.p.scale, highest, p + i * padded);
        }
        matmul(reinterpret_cast<const uint32_t*>(p), padded / 4, of_row, count, rows, nullptr, padded / 4, wide,
               results, wide);
        for (int64_t i = 0; i < count; ++i)
            write_row(call, quantize, results + i * wide, map.p.scale * map.v.scale, batch, head, query + i);
    }
}

}  // namespace sq
