// A thread takes some queries of one head: it lays K of this head out as columns and V as rows, both dense, then goes
// through 24 queries at a time: scores of all keys, softmax, product with V. The scores stay in the L2 cache.
#include "attention.h"

#include "scratch.h"
#include "softmax.h"
#include "transpose.h"

namespace sq {
namespace {

constexpr int BLOCK = ATTENTION_BLOCK;  // queries at a time: 4 tiles of 6 rows, or 2 of 12

// c[M][16 N] = a[M][count] @ b[count][16 N]; strides in floats.
template <int M, int N>
__attribute__((noinline)) void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                       int64_t count, float* c, int64_t c_stride) {
    __m512 sum[M][N];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; ++i, b += b_stride) {
        __m512 w[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            w[n] = _mm512_load_ps(b + n * LANES);
            __asm__("" : "+v"(w[n]));
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const __m512 x = _mm512_set1_ps(a[m * a_stride + i]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum[m][n]) : "v"(x), "v"(w[n]));
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) _mm512_store_ps(c + m * c_stride + n * LANES, sum[m][n]);
}

// c[rows][columns] = a[rows][count] @ b[count][columns], columns a multiple of 32, b in panels of 64 columns (the last
// of 64 or 32) one after the other. All rows of a up to the next multiple of 6 must be there (and may hold anything).
SQ_INLINE void matmul(const float* a, int64_t a_stride, int64_t rows, const float* b, int64_t count, int64_t columns,
                      float* c, int64_t c_stride) {
    for (int64_t column = 0; column < columns; column += 64) {
        const float* panel = b + column * count;
        if (columns - column >= 64) {
            int64_t row = 0;
            for (; row + 6 <= rows; row += 6)
                product<6, 4>(a + row * a_stride, a_stride, panel, 64, count, c + row * c_stride + column, c_stride);
            for (; row < rows; ++row)
                product<1, 4>(a + row * a_stride, a_stride, panel, 64, count, c + row * c_stride + column, c_stride);
        } else {
            int64_t row = 0;
            for (; row + 12 <= rows; row += 12)
                product<12, 2>(a + row * a_stride, a_stride, panel, 32, count, c + row * c_stride + column, c_stride);
            for (; row + 3 <= rows; row += 3)
                product<3, 2>(a + row * a_stride, a_stride, panel, 32, count, c + row * c_stride + column, c_stride);
            for (; row < rows; ++row)
                product<1, 2>(a + row * a_stride, a_stride, panel, 32, count, c + row * c_stride + column, c_stride);
        }
    }
}

// Width of the panel that begins at `column` of `columns` (a multiple of 32).
SQ_INLINE int64_t panel_width(int64_t column, int64_t columns) { return columns - column / 64 * 64 >= 64 ? 64 : 32; }

// K [keys, width] as [width, keys] in panels of 64 keys, zeros beyond the last key.
void lay_out_columns(const float* k, int64_t stride, int64_t keys, int64_t padded, int64_t width, float* to) {
    for (int64_t key = 0; key < padded; key += LANES) {
        float* panel = to + key / 64 * 64 * width + key % 64;
        const int64_t across = panel_width(key, padded);
        for (int64_t at = 0; at < width; at += LANES) {
            __m512 row[16];
            const __mmask16 mask = first(width - at);
            for (int i = 0; i < 16; ++i)
                row[i] = key + i < keys ? _mm512_maskz_loadu_ps(mask, k + (key + i) * stride + at) : _mm512_setzero_ps();
            if (width - at >= LANES) {
                transpose(row, panel + at * across, across);
            } else {
                alignas(64) float columns[16 * 16];
                transpose(row, columns, 16);
                for (int64_t i = 0; i < width - at; ++i)
                    _mm512_store_ps(panel + (at + i) * across, _mm512_load_ps(columns + i * 16));
            }
        }
    }
}

// V [keys, width] in panels of 64 columns, zeros in the columns up to `padded`.
void lay_out_rows(const float* v, int64_t stride, int64_t keys, int64_t width, int64_t padded, float* to) {
    for (int64_t column = 0; column < padded; column += LANES) {
        float* panel = to + column / 64 * 64 * keys + column % 64;
        const int64_t across = panel_width(column, padded);
        const __mmask16 mask = first(width - column);
        for (int64_t key = 0; key < keys; ++key)
            _mm512_store_ps(panel + key * across, _mm512_maskz_loadu_ps(mask, v + key * stride + column));
    }
}

}  // namespace

void queries_float32(const AttentionCall& call, int64_t batch, int64_t head, int64_t begin, int64_t end) {
    const AttentionShape& s = call.shape;
    int64_t keys = s.keys;
    if (s.causal && end + s.keys - s.queries < keys) keys = end + s.keys - s.queries;
    const int64_t padded = up(keys, 32), width = s.width, wide = up(width, 32);
    static thread_local Scratch scratch;
    const int64_t floats = up(padded * width, LANES) + keys * wide + BLOCK * (padded + wide);
    float* columns = static_cast<float*>(scratch.of(floats * 4));
    float* rows = columns + up(padded * width, LANES);
    float* scores = rows + keys * wide;
    float* results = scores + BLOCK * padded;
    lay_out_columns(call.k_of<float>(batch, head), s.k_stride[2], keys, padded, width, columns);
    lay_out_rows(call.v_of<float>(batch, head), s.v_stride[2], keys, width, wide, rows);
    const float* q = call.q_of<float>(batch, head);
    const Quantizer quantize(call.levels ? *call.levels : Levels{1.0f, 0, 0, 255});
    for (int64_t query = begin; query < end; query += BLOCK) {
        const int64_t count = end - query < BLOCK ? end - query : BLOCK;
        matmul(q + query * s.q_stride[2], s.q_stride[2], count, columns, width, padded, scores, padded);
        float inverse[BLOCK];
        for (int64_t i = 0; i < count; ++i) {
            const RowMask mask = mask_of(call, batch, head, query + i);
            inverse[i] = softmax_row(scores + i * padded, mask.seen, padded, s.scale, mask.add, mask.valid);
        }
        matmul(scores, padded, count, rows, keys, wide, results, wide);
        for (int64_t i = 0; i < count; ++i)
            write_row(call, quantize, results + i * wide, inverse[i], batch, head, query + i);
    }
}

namespace {

void all_queries(const AttentionCall& call, void (*run)(const AttentionCall&, int64_t, int64_t, int64_t, int64_t),
                 int threads) {
    const AttentionShape& shape = call.shape;
    const int64_t maps = shape.batch * shape.heads;
    int64_t pieces = 1;  // of the queries of a head; each lays K and V out anew
    while (maps * pieces < 3 * threads && shape.queries / (2 * pieces) >= 2 * BLOCK) pieces *= 2;
    const int64_t piece = up((shape.queries + pieces - 1) / pieces, BLOCK);
    pieces = (shape.queries + piece - 1) / piece;
    parallel(maps * pieces, threads, [&](int64_t index) {
        const int64_t map = index / pieces, begin = index % pieces * piece;
        const int64_t end = begin + piece < shape.queries ? begin + piece : shape.queries;
        run(call, map / shape.heads, map % shape.heads, begin, end);
    });
}

}  // namespace

void attention(const float* q, const float* k, const float* v, const AttentionShape& shape, const Mask& mask,
               const MapLevels* map, const Levels* levels, void* out, int threads) {
    const bool bfloat16 = shape.bfloat16 && has_bfloat16();
    all_queries({q, k, v, shape, mask, map, levels, out, false},
                map ? queries_int8 : bfloat16 ? queries_bfloat16 : queries_float32, threads);
}

void attention_bfloat16(const uint16_t* q, const uint16_t* k, const uint16_t* v, const AttentionShape& shape,
                        const Mask& mask, const Levels* levels, void* out, int threads) {
    all_queries({q, k, v, shape, mask, nullptr, levels, out, true}, queries_bfloat16, threads);
}

}  // namespace sq

SQ_EXPORT void sq_attention(const float* q, const float* k, const float* v, const sq::AttentionShape* shape,
                            const sq::Mask* mask, const sq::MapLevels* map, const sq::Levels* levels, void* out,
                            int threads) {
    sq::attention(q, k, v, *shape, *mask, map, levels, out, threads);
}
