// Attention with Q, K, V and P rounded to bfloat16, sums in float32, by AVX512_BF16: two products per lane.
//
// The scores never leave the registers: they come in units of 1/128 of a binary logarithm, since Q carries the factor
// 128 * scale * log2(e), with the exponent's offset already in the accumulator. Rounded to an integer, such a score is
// the bit pattern of a bfloat16 power of two but for its 7 bits of mantissa, 2^(f/128) instead of 1 + f/128: a table of
// 128 bytes corrects them. No maximum is taken off: 2^x and its sums fit float32 for |x| up to REACH, and by
// Cauchy and Schwarz |q| * |k| bounds x. Blocks of queries beyond the reach are computed in float32.
#include <cmath>
#include <limits>

#include "attention.h"
#include "bf16_layout.h"
#include "scratch.h"

namespace sq {

#ifdef SQ_BF16

bool has_bfloat16() {
    static const bool has = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    return has;
}

namespace {

constexpr int BLOCK = ATTENTION_BLOCK, STEPS = 128;  // steps per binary logarithm: a mantissa of 7 bits
constexpr float LOG2E = 1.4426950408889634f;
constexpr float REACH = 100.0f;
constexpr float START = STEPS * (127.0f - 20.0f);  // P lies in 2^-120..2^80: room for sums below, for V above

struct Correction {
    alignas(64) uint8_t less[STEPS];  // f - mantissa of 2^(f/128)

    Correction() {
        for (int f = 0; f < STEPS; ++f)
            less[f] = static_cast<uint8_t>(f - std::lround((std::exp2(f / double(STEPS)) - 1) * STEPS));
    }
};

SQ_INLINE __mmask32 first_words(int64_t count) {
    return count >= 32 ? 0xffffffffu : static_cast<__mmask32>((1u << (count < 0 ? 0 : count)) - 1);
}

// sum[M][16 N] += a[M][count] @ b[count][16 N], all entries pairs of bfloat16; a's stride in pairs, b dense.
template <int M, int N>
SQ_INLINE void add_products(__m512 (&sum)[M][N], const uint32_t* a, int64_t a_stride, const uint32_t* b,
                            int64_t count) {
    for (int64_t i = 0; i < count; ++i, b += N * LANES) {
        __m512i w[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            w[n] = _mm512_load_si512(b + n * LANES);
            __asm__("" : "+v"(w[n]));  // loaded once, not by each of its M uses
        }
#pragma GCC unroll 12
        for (int m = 0; m < M; ++m) {
            const __m512i x = _mm512_set1_epi32(static_cast<int>(a[m * a_stride + i]));
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n)  // as the intrinsic, but GCC 12 would move the sums about
                __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum[m][n]) : "v"(x), "v"(w[n]));
        }
    }
}

// Unnormalized P of M queries and 16 N keys from `key` on, and its sums per row added to `total`.
template <int M, int N, bool MASKED>
SQ_BF16 __attribute__((noinline)) void probabilities(const uint32_t* q, int64_t pairs, const uint32_t* k, uint16_t* p,
                                                     int64_t p_stride, float* total, const uint8_t* less,
                                                     const RowMask* mask, const float* top, int64_t key) {
    __m512 sum[M][N];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = _mm512_set1_ps(START);
    add_products<M, N>(sum, q, pairs, k, pairs);
    const __m512i low = _mm512_load_si512(less), high = _mm512_load_si512(less + 64);
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
        __m512 row = _mm512_load_ps(total + m * LANES);
#pragma GCC unroll 4
        for (int n = 0; n < N; n += 2) {
            __m512 a = sum[m][n], b = sum[m][n + 1];
            __mmask32 kept = 0xffffffffu;
            if constexpr (MASKED) {
                const int64_t at = key + n * LANES;
                kept = first_words(mask[m].seen - at);
                if (mask[m].add) {
                    const __m512 off = _mm512_set1_ps(top[m]), by = _mm512_set1_ps(STEPS * LOG2E);
                    const __m512 s = _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept), mask[m].add + at);
                    const __m512 t = _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept >> 16), mask[m].add + at + 16);
                    a = _mm512_fmadd_ps(_mm512_sub_ps(_mm512_shuffle_f32x4(s, t, 0x88), off), by, a);
                    b = _mm512_fmadd_ps(_mm512_sub_ps(_mm512_shuffle_f32x4(s, t, 0xdd), off), by, b);
                }
                if (mask[m].valid) {
                    const __m256i bytes = _mm256_maskz_loadu_epi8(kept, mask[m].valid + at);
                    kept = _mm256_mask_test_epi8_mask(kept, bytes, bytes);
                }
            }
            // Below 0, NaN and -inf saturate to 0. The pack takes 4 of a and 4 of b in turn, which brings the keys back
            // to their order.
            __m512i word = _mm512_packus_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
            const __m512i less_by = _mm512_maskz_permutex2var_epi8(0x5555555555555555u, low, word, high);
            word = MASKED ? _mm512_maskz_sub_epi16(kept, word, less_by) : _mm512_sub_epi16(word, less_by);
            _mm512_store_si512(p + m * p_stride + n * LANES, word);
            row = _mm512_dpbf16_ps(row, (__m512bh)word, ones);
        }
        _mm512_store_ps(total + m * LANES, row);
    }
}

// out[M][16 N] = p[M][pairs of keys] @ v[pairs of keys][16 N]
template <int M, int N>
__attribute__((noinline)) void outputs(const uint32_t* p, int64_t p_stride, const uint32_t* v, int64_t pairs,
                                       float* out, int64_t out_stride) {
    __m512 sum[M][N];
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = _mm512_setzero_ps();
    add_products<M, N>(sum, p, p_stride, v, pairs);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) _mm512_store_ps(out + m * out_stride + n * LANES, sum[m][n]);
}

template <int N>
SQ_INLINE void all_outputs(const uint32_t* p, int64_t p_stride, int64_t rows, const uint32_t* v, int64_t pairs,
                           float* out, int64_t out_stride) {
    constexpr int MOST = N <= 2 ? 12 : 6;
    int64_t row = 0;
    for (; row + MOST <= rows; row += MOST)
        outputs<MOST, N>(p + row * p_stride, p_stride, v, pairs, out + row * out_stride, out_stride);
    for (; row + 6 <= rows; row += 6)
        outputs<6, N>(p + row * p_stride, p_stride, v, pairs, out + row * out_stride, out_stride);
    for (; row < rows; row += 2)
        outputs<2, N>(p + row * p_stride, p_stride, v, pairs, out + row * out_stride, out_stride);
}

template <bool MASKED>
SQ_INLINE void all_probabilities(const uint32_t* q, int64_t rows, int64_t pairs, const uint32_t* k, bool wide,
                                 uint16_t* p, int64_t p_stride, float* total, const uint8_t* less, const RowMask* mask,
                                 const float* top, int64_t key) {
    int64_t row = 0;
    for (; row + 6 <= rows; row += 6)
        (wide ? probabilities<6, 4, MASKED> : probabilities<6, 2, MASKED>)(
            q + row * pairs, pairs, k, p + row * p_stride, p_stride, total + row * LANES, less, mask + row,
            top + row, key);
    for (; row < rows; row += 2)
        (wide ? probabilities<2, 4, MASKED> : probabilities<2, 2, MASKED>)(
            q + row * pairs, pairs, k, p + row * p_stride, p_stride, total + row * LANES, less, mask + row,
            top + row, key);
}

// The largest value added to a score of the row, which is taken off; a row of nothing but -inf or as good as that has
// no valid key.
float top_of_(RowMask& row) {
    if (!row.add) return 0.0f;
    __m512 top = _mm512_set1_ps(std::numeric_limits<float>::lowest());
    for (int64_t key = 0; key < row.seen; key += LANES) {
        const __mmask16 mask = first(row.seen - key);
        top = _mm512_mask_max_ps(top, mask, _mm512_maskz_loadu_ps(mask, row.add + key), top);
    }
    const float found = _mm512_reduce_max_ps(top);
    if (found <= std::numeric_limits<float>::lowest() / 2) row.seen = 0;
    return found;
}

// Numbers as floats, times `by`; rows dense.
void widen(const uint16_t* from, int64_t stride, int64_t rows, int64_t width, float by, float* to) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t at = 0; at < width; at += LANES) {
            const __mmask16 mask = first(width - at);
            const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + row * stride + at));
            const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
            _mm512_mask_storeu_ps(to + row * width + at, mask, _mm512_mul_ps(value, _mm512_set1_ps(by)));
        }
}

// Queries beyond the reach. Rounded Q, K and V are made floats again.
void exact_queries(const AttentionCall& call, int64_t batch, int64_t head, int64_t begin, int64_t end) {
    if (!call.rounded) return queries_float32(call, batch, head, begin, end);
    const AttentionShape& s = call.shape;
    static thread_local Scratch scratch;
    const int64_t width = s.width, count = end - begin;
    float* q = static_cast<float*>(scratch.of((count + 2 * s.keys) * width * 4));
    float *k = q + count * width, *v = k + s.keys * width;
    widen(call.q_of<uint16_t>(batch, head) + begin * s.q_stride[2], s.q_stride[2], count, width, 1 / query_factor(s), q);
    widen(call.k_of<uint16_t>(batch, head), s.k_stride[2], s.keys, width, 1, k);
    widen(call.v_of<uint16_t>(batch, head), s.v_stride[2], s.keys, width, 1, v);
    AttentionShape shape = s;
    for (int axis = 0; axis < 3; ++axis)
        shape.q_stride[axis] = shape.k_stride[axis] = shape.v_stride[axis] = axis == 2 ? width : 0;
    const AttentionCall alone{q - begin * width, k, v, shape, call.mask, nullptr, call.levels, call.out, false};
    queries_float32(alone, batch, head, begin, end);
}

template <typename T>
void some_queries(const AttentionCall& call, int64_t batch, int64_t head, int64_t begin, int64_t end) {
    static const Correction correction;
    const AttentionShape& s = call.shape;
    const int64_t padded = up(s.keys, 32), width = s.width, wide = up(width, LANES);
    const int64_t pairs = (width + 1) / 2, of_keys = padded * pairs, of_values = padded / 2 * wide;
    static thread_local Scratch scratch;
    uint32_t* columns = static_cast<uint32_t*>(
        scratch.of(4 * (of_keys + of_values + BLOCK * (padded / 2 + wide + LANES) + up(BLOCK * pairs, LANES))));
    uint32_t* rows = columns + of_keys;
    uint16_t* p = reinterpret_cast<uint16_t*>(rows + of_values);
    float* results = reinterpret_cast<float*>(p + BLOCK * padded);
    float* totals = results + BLOCK * wide;
    uint32_t* q = reinterpret_cast<uint32_t*>(totals + BLOCK * LANES);
    const float square = lay_out_keys(call.k_of<T>(batch, head), s.k_stride[2], s.keys, padded, width, columns);
    lay_out_values(call.v_of<T>(batch, head), s.v_stride[2], s.keys, padded, width, wide, rows);
    const Quantizer quantize(call.levels ? *call.levels : Levels{1.0f, 0, 0, 255});
    int64_t exact = begin;  // from here to `query`: beyond the reach
    for (int64_t query = begin; query < end; query += BLOCK) {
        const int64_t count = end - query < BLOCK ? end - query : BLOCK, some = up(count, 2);
        const T* from = call.q_of<T>(batch, head) + query * s.q_stride[2];
        const float bound = square * lay_out_queries(from, s.q_stride[2], count, some, width, query_factor(s), q);
        if (!(bound <= REACH * REACH * STEPS * STEPS)) continue;
        if (exact < query) exact_queries(call, batch, head, exact, query);
        exact = query + count;
        RowMask mask[BLOCK];
        float top[BLOCK];
        for (int64_t i = 0; i < some; ++i) {
            mask[i] = mask_of(call, batch, head, query + (i < count ? i : count - 1));
            top[i] = top_of_(mask[i]);
            _mm512_store_ps(totals + i * LANES, _mm512_setzero_ps());
        }
        const int64_t limit = query + count + s.keys - s.queries, keys = s.causal && limit < s.keys ? limit : s.keys;
        for (int64_t key = 0; key < keys; key += 64) {
            const uint32_t* panel = columns + key * pairs;
            const bool four = padded - key >= 64, masked = call.mask.at || s.causal || s.keys - key < 64;
            (masked ? all_probabilities<true> : all_probabilities<false>)(q, some, pairs, panel, four, p + key, padded,
                                                                          totals, correction.less, mask, top, key);
        }
        const uint32_t* pair = reinterpret_cast<const uint32_t*>(p);
        for (int64_t column = 0; column < wide; column += 64) {
            const uint32_t* panel = rows + column * (padded / 2);
            const int64_t across = (wide - column) / LANES, used = up(keys, 32) / 2;
            const auto run = across >= 4   ? all_outputs<4>
                             : across == 3 ? all_outputs<3>
                             : across == 2 ? all_outputs<2>
                                           : all_outputs<1>;
            run(pair, padded / 2, some, panel, used, results + column, wide);
        }
        for (int64_t i = 0; i < count; ++i) {
            const float total = _mm512_reduce_add_ps(_mm512_load_ps(totals + i * LANES));
            write_row(call, quantize, results + i * wide, total > 0 ? 1.0f / total : 0.0f, batch, head, query + i);
        }
    }
    if (exact < end) exact_queries(call, batch, head, exact, end);
}

}  // namespace

void queries_bfloat16(const AttentionCall& call, int64_t batch, int64_t head, int64_t begin, int64_t end) {
    (call.rounded ? some_queries<uint16_t> : some_queries<float>)(call, batch, head, begin, end);
}

bool reads_bfloat16(const AttentionShape& shape) { return shape.bfloat16 && has_bfloat16() && shape.width % 2 == 0; }

float query_factor(const AttentionShape& shape) { return shape.scale * LOG2E * STEPS; }

#else

bool has_bfloat16() { return false; }

void queries_bfloat16(const AttentionCall& call, int64_t batch, int64_t head, int64_t begin, int64_t end) {
    queries_float32(call, batch, head, begin, end);
}

bool reads_bfloat16(const AttentionShape&) { return false; }

float query_factor(const AttentionShape&) { return 1.0f; }

#endif

}  // namespace sq

SQ_EXPORT int sq_has_bfloat16() { return sq::has_bfloat16(); }
