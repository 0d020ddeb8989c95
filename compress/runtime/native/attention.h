// softmax(scale * Q K^T + mask) V in float32, exact: no approximation but rounding.
#pragma once

#include "common.h"

namespace sq {

// Strides in elements; the last axis of all is dense. Legend: B batch, H heads, Q queries, K keys, D head dimension.
struct AttentionShape {
    int64_t batch, heads, queries, keys, width;
    int64_t q_stride[3], k_stride[3], v_stride[3];  // of batch, head, row
    int64_t heads_per_group;                        // query heads that share one key head
    float scale;
    int32_t causal;  // 1: query i sees keys 0..i + keys - queries
};

struct Mask {
    const void* at;  // null: none
    int32_t is_bool; // bytes, 1 = valid; else floats to add
    int64_t stride[3];  // of batch, head, query; in elements
};

// Writes [B, Q, H * D] as floats, or as levels where `levels` is given.
void attention(const float* q, const float* k, const float* v, const AttentionShape& shape, const Mask& mask,
               const Levels* levels, void* out, int threads);

}  // namespace sq
