// y_TO = activation(scale_x * scale_O * ((level_TI - zero_point) @ q_OI^T) + bias_O + residual_TO), by AVX-512 VNNI.
//
// A tile's sums over all inputs are exact int32 (tiles.h). The zero point is taken off as zero_point * (sum of the
// output's weights), then come scale, bias, residual, activation and levels in one pass.
#include "gemm.h"

#include "activation.h"
#include "tiles.h"

namespace sq {
namespace {

constexpr int64_t CHUNK = 384 << 10;  // bytes of input that one piece of work reads: they stay in the L2 cache

struct Call {
    const Gemm& gemm;
    const uint8_t* level_TI;
    int64_t stride;
    float scale;
    int32_t zero_point;
    const float* residual_TO;  // or null
    const Levels* emitted;     // or null
    void* out_TO;              // float, or uint8 levels
    const Bump* bump;
};

// Rows row..end of the 64 outputs from `output` on.
template <int ACTIVATION, bool EMIT>
void piece(const Call& call, int64_t row, int64_t end, int64_t output) {
    const Activate<ACTIVATION> activate(call.bump);
    const Quantizer quantize(EMIT ? *call.emitted : Levels{1.0f, 0, 0, 255});
    const Gemm& gemm = call.gemm;
    const Form form = form_of(gemm.inputs, gemm.span);
    const int8_t* weight = gemm.panels + output / PANEL * form.steps * form.bytes;
    alignas(64) int32_t sums[ROWS * PANEL];
    __mmask16 mask[4];
    alignas(64) int32_t shift[PANEL];
    alignas(64) float step[PANEL], bias[PANEL];
    for (int n = 0; n < 4; ++n) {
        const int64_t at = output + n * LANES;
        mask[n] = first(gemm.outputs - at);
        const __m512i sum = _mm512_maskz_loadu_epi32(mask[n], gemm.sum_O + at);
        _mm512_store_si512(shift + n * LANES, _mm512_mullo_epi32(_mm512_set1_epi32(call.zero_point), sum));
        const __m512 scale = _mm512_maskz_loadu_ps(mask[n], gemm.scale_O + at);
        _mm512_store_ps(step + n * LANES, _mm512_mul_ps(_mm512_set1_ps(call.scale), scale));
        _mm512_store_ps(bias + n * LANES,
                        gemm.bias_O ? _mm512_maskz_loadu_ps(mask[n], gemm.bias_O + at) : _mm512_setzero_ps());
    }
    for (int rows; row < end; row += rows) {
        rows = static_cast<int>(end - row < form.rows ? end - row : form.rows);
        form.tiles[rows](call.level_TI + row * call.stride, call.stride, weight, form.steps, sums);
        for (int n = 0; n < 4; ++n) {
            const __m512i off = _mm512_load_si512(shift + n * LANES);
            const __m512 by = _mm512_load_ps(step + n * LANES), plus = _mm512_load_ps(bias + n * LANES);
            for (int m = 0; m < rows; ++m) {
                const int64_t to = (row + m) * gemm.outputs + output + n * LANES;
                const __m512i sum = _mm512_sub_epi32(_mm512_load_si512(sums + m * PANEL + n * LANES), off);
                __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), by, plus);
                if (call.residual_TO) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask[n], call.residual_TO + to));
                y = activate(y);
                if constexpr (EMIT)
                    _mm_mask_storeu_epi8(static_cast<uint8_t*>(call.out_TO) + to, mask[n], quantize(y));
                else
                    _mm512_mask_storeu_ps(static_cast<float*>(call.out_TO) + to, mask[n], y);
            }
        }
    }
}

using Piece = void (*)(const Call&, int64_t, int64_t, int64_t);

Piece piece_of(int activation, bool emit) {
    switch (activation) {
        case RELU: return emit ? piece<RELU, true> : piece<RELU, false>;
        case GELU:
        case GELU_TANH: return emit ? piece<GELU, true> : piece<GELU, false>;  // they differ by their table
        default: return emit ? piece<NONE, true> : piece<NONE, false>;
    }
}

const Bump* bump_of(int activation) {
    static const Bump gelu(GELU), gelu_tanh(GELU_TANH);
    return activation == GELU ? &gelu : activation == GELU_TANH ? &gelu_tanh : nullptr;
}

}  // namespace

void multiply(const Gemm& gemm, const uint8_t* level_TI, int64_t rows, int64_t stride, float scale, int32_t zero_point,
              const float* residual_TO, const Levels* emitted, void* out_TO, int threads) {
    const Call call{gemm,    level_TI, stride, scale, zero_point, residual_TO,
                    emitted, out_TO,   bump_of(gemm.activation)};
    const Piece run = piece_of(gemm.activation, emitted != nullptr);
    const int64_t panels = (gemm.outputs + PANEL - 1) / PANEL;
    constexpr int WHOLE = ROWS * SPARSE_ROWS;  // whole tiles of both forms
    int64_t chunk = CHUNK / (stride > 0 ? stride : 1) / WHOLE * WHOLE;
    if (chunk < 2 * WHOLE) chunk = 2 * WHOLE;
    const int64_t chunks = (rows + chunk - 1) / chunk;
    parallel(chunks * panels, threads, [&](int64_t index) {
        const int64_t row = index / panels * chunk;
        run(call, row, row + chunk < rows ? row + chunk : rows, index % panels * PANEL);
    });
}

}  // namespace sq

SQ_EXPORT void sq_gemm(const sq::Gemm* gemm, const uint8_t* level_TI, int64_t rows, int64_t stride, float scale,
                       int32_t zero_point, const float* residual_TO, const sq::Levels* emitted, void* out_TO,
                       int threads) {
    sq::multiply(*gemm, level_TI, rows, stride, scale, zero_point, residual_TO, emitted, out_TO, threads);
}
