// Layouts of a matrix of int8 weights, and the sums of products that are made from each.
//
// The weights lie in panels of 64 outputs; in a panel, 4 inputs of each output next to each other, as VPDPBUSD takes
// them: panel[i / 4][o][i % 4]. A tile of 6 rows x 64 outputs stays in registers while it runs over all inputs; its
// int32 sums are exact and written once.
//
// Sparse weights are not expanded: where at most 4 of each 8 (16) consecutive inputs of every output have weights, the
// panel holds those 4 and, as bytes, where among 16 inputs they belong. VPSHUFB gives each output its own 4 inputs, so
// one VPDPBUSD does the work of two (four). The shuffles run beside the multiplications where the CPU has a unit for
// them: on AMD Zen 4 2:4 weights go 1.2 to 1.3 times faster than dense ones, which take all the multipliers give.
//
// With few rows the time is that of reading the weights. There 2:4 weights lie as 4 bytes and 4 indices of 2 bits for 8
// inputs, 5/8 of the dense bytes, and the indices are spread out while the next weights are on their way.
#pragma once

#include "common.h"

namespace sq {

constexpr int PANEL = 64;             // outputs of a panel: 4 registers
constexpr int ROWS = 6;               // rows of a tile: 6 * 4 sums, 4 weights, 1 input and some spare of 32 registers
constexpr int SPARSE_ROWS = 5;        // 5 * 4 sums, 4 weights, 4 indices, 1 input, 1 shuffled
constexpr int COMPACT_ROWS = 4;
constexpr int WINDOW = 16;            // inputs that a shuffle chooses from
constexpr int COMPACT_STEP = PANEL * 5;  // bytes of a panel for 8 inputs: 4 times 64 weights, then 4 times 16 of indices

// Sums of some rows times the 64 outputs of a panel: levels, bytes from row to row, the panel, its steps, [rows][64].
using Tile = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*);

// How a matrix is laid out: `steps` of `bytes` for each panel, and the tiles that read them.
struct Form {
    const Tile* tiles;
    int rows;
    int64_t steps, bytes;
};

// By `Gemm::span`.
Form form_of(int64_t inputs, int span);

}  // namespace sq
