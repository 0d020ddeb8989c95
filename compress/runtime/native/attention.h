// softmax(scale * Q K^T + mask) V: in float32, exact but for rounding, or with products of bfloat16 numbers.
#pragma once

#include "common.h"

namespace sq {

// Strides in elements; the last axis of all is dense. Legend: B batch, H heads, Q queries, K keys, D head dimension.
struct AttentionShape {
    int64_t batch, heads, queries, keys, width;
    int64_t q_stride[3], k_stride[3], v_stride[3];  // of batch, head, row
    int64_t heads_per_group;                        // query heads that share one key head
    float scale;
    int32_t causal;    // 1: query i sees keys 0..i + keys - queries
    int32_t bfloat16;  // 1: Q, K, V and P may be rounded to bfloat16, where this CPU multiplies such numbers
};

struct Mask {
    const void* at;  // null: none
    int32_t is_bool; // bytes, 1 = valid; else floats to add
    int64_t stride[3];  // of batch, head, query; in elements
};

// The levels of a quantized map: P's are counted from its zero point, since P >= 0.
struct MapLevels {
    Levels q, k, p, v;
};

// Writes [B, Q, H * D] as floats, or as levels where `levels` is given. With `map`, Q, K, P and V are rounded to its
// levels, the products are exact sums of integers, and the softmax is float32.
void attention(const float* q, const float* k, const float* v, const AttentionShape& shape, const Mask& mask,
               const MapLevels* map, const Levels* levels, void* out, int threads);

// The same with Q, K and V that are bfloat16 numbers already, Q times `query_factor`: for shapes that
// `reads_bfloat16`.
void attention_bfloat16(const uint16_t* q, const uint16_t* k, const uint16_t* v, const AttentionShape& shape,
                        const Mask& mask, const Levels* levels, void* out, int threads);
bool reads_bfloat16(const AttentionShape& shape);
float query_factor(const AttentionShape& shape);

struct AttentionCall {
    const void *q, *k, *v;  // floats, or bfloat16 numbers as of `attention_bfloat16`
    const AttentionShape& shape;
    const Mask& mask;
    const MapLevels* map;  // or null
    const Levels* levels;  // or null
    void* out;
    bool rounded;  // Q, K and V are bfloat16 numbers

    // Row 0 of the head of a row of the batch, in numbers of type T.
    template <typename T>
    const T* q_of(int64_t batch, int64_t head) const {
        return static_cast<const T*>(q) + batch * shape.q_stride[0] + head * shape.q_stride[1];
    }
    template <typename T>
    const T* k_of(int64_t batch, int64_t head) const {
        return static_cast<const T*>(k) + batch * shape.k_stride[0] + head / shape.heads_per_group * shape.k_stride[1];
    }
    template <typename T>
    const T* v_of(int64_t batch, int64_t head) const {
        return static_cast<const T*>(v) + batch * shape.v_stride[0] + head / shape.heads_per_group * shape.v_stride[1];
    }
};

constexpr int ATTENTION_BLOCK = 24;  // pieces of the work begin at multiples of so many queries

// Queries `begin`..`end` of one head of one row of the batch.
void queries_float32(const AttentionCall& call, int64_t batch, int64_t head, int64_t begin, int64_t end);
void queries_bfloat16(const AttentionCall& call, int64_t batch, int64_t head, int64_t begin, int64_t end);
void queries_int8(const AttentionCall& call, int64_t batch, int64_t head, int64_t begin, int64_t end);

bool has_bfloat16();  // whether this CPU can run the second

// What makes keys of one row of the map invalid, or adds to their scores: one of the pointers, or none, is given.
struct RowMask {
    const float* add;
    const uint8_t* valid;
    int64_t seen;  // keys from here on are invalid
};

SQ_INLINE RowMask mask_of(const AttentionCall& call, int64_t batch, int64_t head, int64_t query) {
    const int64_t at = batch * call.mask.stride[0] + head * call.mask.stride[1] + query * call.mask.stride[2];
    const int64_t limit = query + 1 + call.shape.keys - call.shape.queries;
    RowMask row{nullptr, nullptr, call.shape.causal && limit < call.shape.keys ? limit : call.shape.keys};
    if (call.mask.at && call.mask.is_bool) row.valid = static_cast<const uint8_t*>(call.mask.at) + at;
    if (call.mask.at && !call.mask.is_bool) row.add = static_cast<const float*>(call.mask.at) + at;
    return row;
}

// result * by, of one query and head, as the call wants it.
SQ_INLINE void write_row(const AttentionCall& call, const Quantizer& quantize, const float* result, float by,
                         int64_t batch, int64_t head, int64_t query) {
    const int64_t width = call.shape.width;
    const int64_t to = ((batch * call.shape.queries + query) * call.shape.heads + head) * width;
    for (int64_t at = 0; at < width; at += LANES) {
        const __mmask16 mask = first(width - at);
        const __m512 y = _mm512_mul_ps(_mm512_load_ps(result + at), _mm512_set1_ps(by));
        if (call.levels)
            _mm_mask_storeu_epi8(static_cast<uint8_t*>(call.out) + to + at, mask, quantize(y));
        else
            _mm512_mask_storeu_ps(static_cast<float*>(call.out) + to + at, mask, y);
    }
}

inline int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace sq
