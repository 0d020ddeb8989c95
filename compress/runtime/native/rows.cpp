#include "rows.h"

namespace sq {
namespace {

constexpr int64_t SMALL = 8192;  // values below which a second thread costs more than it brings

// Whether body(row) is true for every row; all are run.
template <typename Body>
bool by_rows(int64_t rows, int64_t width, int threads, const Body& body) {
    std::atomic<bool> all{true};
    if (rows * width < SMALL) threads = 1;
    const int64_t pieces = threads == 1 ? 1 : 4 * threads, piece = (rows + pieces - 1) / pieces;
    parallel(pieces, threads, [&](int64_t index) {
        const int64_t end = (index + 1) * piece < rows ? (index + 1) * piece : rows;
        bool good = true;
        for (int64_t row = index * piece; row < end; ++row) good &= body(row);
        if (!good) all.store(false, std::memory_order_relaxed);
    });
    return all;
}

}  // namespace

bool quantize_rows(const float* x_TI, int64_t rows, int64_t width, const Levels& levels, uint8_t* level_TI,
                   int threads) {
    const Quantizer quantize(levels);
    return by_rows(rows, width, threads, [&](int64_t row) {
        return quantize_row(x_TI + row * width, width, quantize, level_TI + row * width);
    });
}

bool normalize_rows(const float* x_TI, int64_t rows, const Norm& norm, float* y_TI, const Levels* levels,
                    uint8_t* level_TI, int threads) {
    const Quantizer quantize(levels ? *levels : Levels{1.0f, 0, 0, 255});
    return by_rows(rows, norm.width, threads, [&](int64_t row) {
        const int64_t at = row * norm.width;
        return levels ? normalize_row<true>(x_TI + at, norm, quantize, y_TI ? y_TI + at : nullptr, level_TI + at)
                      : normalize_row<false>(x_TI + at, norm, quantize, y_TI + at, nullptr);
    });
}

}  // namespace sq

// 1 if all values are finite, else 0.
SQ_EXPORT int32_t sq_quantize(const float* x_TI, int64_t rows, int64_t width, const sq::Levels* levels,
                              uint8_t* level_TI, int threads) {
    return sq::quantize_rows(x_TI, rows, width, *levels, level_TI, threads);
}

SQ_EXPORT void sq_normalize(const float* x_TI, int64_t rows, const sq::Norm* norm, float* y_TI,
                            const sq::Levels* levels, uint8_t* level_TI, int threads) {
    sq::normalize_rows(x_TI, rows, *norm, y_TI, levels, level_TI, threads);
}
