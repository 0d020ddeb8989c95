// One matrix of int8 weights times rows of uint8 levels.
#pragma once

#include "common.h"

namespace sq {

// A packed matrix. `panels` is laid out by sq_pack; bias_O may be null; activation is one of activation.h. `span`: so
// many inputs of which at most 4 have weights other than 0 share one multiplication (8: 2:4 and 4:8; 16: 1:4, 2:8, 4:16;
// the inputs are then a multiple of 16); 4: dense; 2: 2:4 with indices of 2 bits, for few rows.
struct Gemm {
    const int8_t* panels;
    const int32_t* sum_O;
    const float* scale_O;
    const float* bias_O;
    int64_t outputs, inputs;
    int32_t activation, span;
};

// What becomes of the results: floats, the levels `levels`, or bfloat16 numbers, the first `scaled` outputs times `by`.
struct Emit {
    enum As { FLOATS, LEVELS, BFLOAT16 } as = FLOATS;
    Levels levels{1.0f, 0, 0, 255};
    float by = 1.0f;
    int64_t scaled = 0;
};

// activation(scale * scale_O * ((level_TI - zero_point) @ q_OI^T) + bias_O + residual_TO), emitted as `emit` says.
// `stride`: bytes from row to row of the levels, at least `inputs` rounded up to 4. residual_TO may be null, and may be
// out_TO.
void multiply(const Gemm& gemm, const uint8_t* level_TI, int64_t rows, int64_t stride, float scale, int32_t zero_point,
              const float* residual_TO, const Emit& emit, void* out_TO, int threads);

}  // namespace sq
