// A whole transformer block of an encoder: QKV, attention, output, residual, norm, FFN, residual, norm, with the
// integers of each GEMM's input made where the floats before them are.
#include "attention.h"
#include "gemm.h"
#include "rows.h"
#include "scratch.h"

namespace sq {

struct Block {
    Gemm qkv, out, up, down;
    Levels of_qkv, of_out, of_up, of_down;  // of the inputs of the four
    Norm attention_norm, ffn_norm;
    int64_t heads, head_width;
    float scale;
    int32_t norm_first;  // 1: norms read the residual stream (pre-LN); 0: they are on it (post-LN)
    int32_t bfloat16;    // as in AttentionShape
    int32_t has_map;     // 1: the attention's factors are levels
    MapLevels map;
};

namespace {

// Rows that go through all of the block before the next ones start, in whole sequences: what lies between two steps
// stays in the last-level cache.
constexpr int64_t TOGETHER = 512;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

void run(const Gemm& gemm, const Levels& levels, const uint8_t* level, int64_t rows, const float* residual,
         const Emit& emit, void* out, int threads) {
    multiply(gemm, level, rows, gemm.inputs, levels.scale, levels.zero_point, residual, emit, out, threads);
}

// Whether the block's input, and what its norms read, is finite.
bool some(const Block& block, const float* x, int64_t batch, int64_t length, const Mask& mask, float* y, int threads) {
    const int64_t rows = batch * length, across = block.qkv.outputs, width = block.heads * block.head_width;
    const int64_t widest = block.qkv.inputs > width ? block.qkv.inputs : width;
    const int64_t levels = aligned(rows * widest), inner = aligned(rows * block.down.inputs);
    const int64_t floats = aligned(rows * across * 4);
    static thread_local Scratch scratch;
    char* memory = static_cast<char*>(scratch.of(levels + inner + floats + rows * block.out.outputs * 4));
    uint8_t* level = reinterpret_cast<uint8_t*>(memory);  // of QKV's input, the output projection's, FFN1's in turn
    uint8_t* hidden = reinterpret_cast<uint8_t*>(memory + levels);
    float* qkv = reinterpret_cast<float*>(memory + levels + inner);
    float* stream = reinterpret_cast<float*>(memory + levels + inner + floats);

    bool finite = block.norm_first
                      ? normalize_rows(x, rows, block.attention_norm, nullptr, &block.of_qkv, level, threads)
                      : quantize_rows(x, rows, block.qkv.inputs, block.of_qkv, level, threads);

    const int64_t stride[3] = {length * across, block.head_width, across};
    AttentionShape shape{batch, block.heads, length, length, block.head_width, {}, {}, {}, 1, block.scale, 0,
                         block.bfloat16};
    for (int axis = 0; axis < 3; ++axis)
        shape.q_stride[axis] = shape.k_stride[axis] = shape.v_stride[axis] = stride[axis];
    const MapLevels* map = block.has_map ? &block.map : nullptr;
    if (!map && reads_bfloat16(shape)) {
        const Emit emit{Emit::BFLOAT16, {}, query_factor(shape), width};
        run(block.qkv, block.of_qkv, level, rows, nullptr, emit, qkv, threads);
        const uint16_t* half = reinterpret_cast<const uint16_t*>(qkv);
        attention_bfloat16(half, half + width, half + 2 * width, shape, mask, &block.of_out, level, threads);
    } else {
        run(block.qkv, block.of_qkv, level, rows, nullptr, {}, qkv, threads);
        attention(qkv, qkv + width, qkv + 2 * width, shape, mask, map, &block.of_out, level, threads);
    }

    run(block.out, block.of_out, level, rows, x, {}, stream, threads);
    finite &= normalize_rows(stream, rows, block.norm_first ? block.ffn_norm : block.attention_norm,
                             block.norm_first ? nullptr : stream, &block.of_up, level, threads);
    run(block.up, block.of_up, level, rows, nullptr, {Emit::LEVELS, block.of_down}, hidden, threads);
    run(block.down, block.of_down, hidden, rows, stream, {}, y, threads);
    if (!block.norm_first) finite &= normalize_rows(y, rows, block.ffn_norm, y, nullptr, nullptr, threads);
    return finite;
}

}  // namespace
}  // namespace sq

// x and y: [batch, length, width] floats, dense, not the same. All widths are multiples of 4. 1 if all values are finite,
// else 0.
SQ_EXPORT int32_t sq_block(const sq::Block* block, const float* x, int64_t batch, int64_t length, const sq::Mask* mask,
                           float* y, int threads) {
    bool finite = true;
    const int64_t together = length >= sq::TOGETHER ? 1 : sq::TOGETHER / length, width = length * block->qkv.inputs;
    for (int64_t at = 0; at < batch; at += together) {
        sq::Mask part = *mask;
        if (part.at)
            part.at = static_cast<const char*>(part.at) + at * part.stride[0] * (part.is_bool ? 1 : 4);
        finite &= sq::some(*block, x + at * width, at + together < batch ? together : batch - at, length, part,
                           y + at * width, threads);
    }
    return finite;
}
