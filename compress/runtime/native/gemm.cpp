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
    const Emit& emit;
    void* out_TO;  // float, uint8 levels or bfloat16
    const Bump* bump;
};

// To the nearest, half to even; NaN does not come here. In integers: not every CPU with VNNI converts.
SQ_INLINE __m256i bfloat16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}

// Rows row..end of the 64 outputs from `output` on.
template <int ACTIVATION, Emit::As AS>
void piece(const Call& call, int64_t row, int64_t end, int64_t output) {
    const Activate<ACTIVATION> activate(call.bump);
    const Quantizer quantize(call.emit.levels);
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
        __m512 by = _mm512_mul_ps(_mm512_set1_ps(call.scale), _mm512_maskz_loadu_ps(mask[n], gemm.scale_O + at));
        __m512 plus = gemm.bias_O ? _mm512_maskz_loadu_ps(mask[n], gemm.bias_O + at) : _mm512_setzero_ps();
        if constexpr (AS == Emit::BFLOAT16) {
            const __mmask16 scaled = first(call.emit.scaled - at);
            by = _mm512_mask_mul_ps(by, scaled, by, _mm512_set1_ps(call.emit.by));
            plus = _mm512_mask_mul_ps(plus, scaled, plus, _mm512_set1_ps(call.emit.by));
        }
        _mm512_store_ps(step + n * LANES, by);
        _mm512_store_ps(bias + n * LANES, plus);
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
                if constexpr (AS == Emit::LEVELS)
                    _mm_mask_storeu_epi8(static_cast<uint8_t*>(call.out_TO) + to, mask[n], quantize(y));
                else if constexpr (AS == Emit::BFLOAT16)
                    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(call.out_TO) + to, mask[n], bfloat16(y));
                else
                    _mm512_mask_storeu_ps(static_cast<float*>(call.out_TO) + to, mask[n], y);
            }
        }
    }
}

using Piece = void (*)(const Call&, int64_t, int64_t, int64_t);

template <Emit::As AS>
Piece piece_of(int activation) {
    switch (activation) {
        case RELU: return piece<RELU, AS>;
        case GELU:
        case GELU_TANH: return piece<GELU, AS>;  // they differ by their table
        default: return piece<NONE, AS>;
    }
}

Piece piece_of(int activation, Emit::As as) {
    if (as == Emit::BFLOAT16) return piece<NONE, Emit::BFLOAT16>;
    return as == Emit::LEVELS ? piece_of<Emit::LEVELS>(activation) : piece_of<Emit::FLOATS>(activation);
}

const Bump* bump_of(int activation) {
    static const Bump gelu(GELU), gelu_tanh(GELU_TANH);
    return activation == GELU ? &gelu : activation == GELU_TANH ? &gelu_tanh : nullptr;
}

}  // namespace

void multiply(const Gemm& gemm, const uint8_t* level_TI, int64_t rows, int64_t stride, float scale, int32_t zero_point,
              const float* residual_TO, const Emit& emit, void* out_TO, int threads) {
    const Call call{gemm, level_TI, stride, scale, zero_point, residual_TO, emit, out_TO, bump_of(gemm.activation)};
    const Piece run = piece_of(gemm.activation, emit.as);
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
    const sq::Emit emit = emitted ? sq::Emit{sq::Emit::LEVELS, *emitted} : sq::Emit{};
    sq::multiply(*gemm, level_TI, rows, stride, scale, zero_point, residual_TO, emit, out_TO, threads);
}
