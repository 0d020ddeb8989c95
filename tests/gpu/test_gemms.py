"""Each GEMM kernel on a GPU against its definition in 64 bits, at the shapes of BERT-base and odd numbers of tokens.

Largest errors: the integer kernels none in float32, and in 16 bits the rounding of their exact results (once before the
bias, once after); the 16-bit kernels 4 units in the last place of the largest result; float8 1 % of the results' norm
against its own operands. Legend: T rows (tokens), I in_features, O out_features.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from cuda_models import DEVICE, two_of_four
from gemms import DYNAMIC, TOY, Toy, asymmetric, exact, inputs, random_gemm, symmetric
from squeezoo.compress.quantizers import InputQuantization
from squeezoo.compress.runtime import QuantizedGemm, use_reference_
from squeezoo.compress.runtime.cuda import use_cuda_
from squeezoo.compress.runtime.cuda_linear import CudaGemm
from squeezoo.compress.runtime.cuda_ops import DEFAULT_ALGORITHM, multiply, sparse_mm_operator
from squeezoo.compress.runtime.cuda_source import FP8_MAX, CudaOptions, FloatGemm, dense_numbers
from squeezoo.compress.runtime.cuda_support import CUDA_BACKENDS, cuda_capability, fused_scales, works
from squeezoo.compress.runtime.inputs import fake_quantize
from squeezoo.models.adapter import find_sites
from torch import Tensor, nn

pytestmark = pytest.mark.gpu

SHAPES = [(768, 768), (2304, 768), (3072, 768), (768, 3072)]  # attention output, Q K V, FFN up, FFN down
TOKENS = [1, 3, 17, 128, 385]
INT8 = ["sparse_int8", "dense_int8"]
HALF = ["sparse_half", "dense_half"]
DTYPES = [torch.float16, torch.bfloat16]
# Steps of 1/8: inputs are multiples of 1/16, so that a half of them are ties.
INPUTS = {"symmetric": symmetric(0.125), "asymmetric": asymmetric(0.125, 100)}


@cache
def gemm_of(out_features: int, in_features: int, name: str = "symmetric") -> QuantizedGemm:
    """2:4 weights; scales so small that float16 holds the results, and powers of two, so that they are exact."""
    scale_O = 2.0 ** torch.randint(-9, -5, (out_features,), generator=torch.Generator().manual_seed(5))
    return two_of_four(random_gemm(out_features, in_features, input=INPUTS[name], scale_O=scale_O))


@cache
def on_device(out_features: int, in_features: int, name: str, dtype: torch.dtype) -> CudaGemm:
    options = CudaOptions(dtype=dtype, device=DEVICE, allow_fp8=True)
    return CudaGemm(gemm_of(out_features, in_features, name), options)


def inputs_16(*shape: int) -> Tensor:
    """Multiples of 1/16 up to 8 in magnitude: exact in bfloat16 too."""
    return inputs(*shape).clamp(-8, 8)


def distance(found: Tensor, expected: Tensor) -> float:
    """Of the norms; NaN where anything is NaN."""
    return float((found.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("backend", CUDA_BACKENDS)
def test_the_trial_by_doing(backend: Any) -> None:
    """Every kernel runs and adds up here; float8 where device and PyTorch have it."""
    for dtype in DTYPES:
        runs, reason = works(backend, dtype, DEVICE)
        if backend == "sparse_fp8" and not runs and "add up" not in reason:
            pytest.skip(reason)
        assert runs, reason


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", INPUTS)
def test_integer_kernels_are_exact_in_float32(name: str, shape: tuple[int, int], tokens: int) -> None:
    """Expected: the definition in 64 bits; sums stay below 2^24 steps, so that float32 holds them."""
    gemm, fast = gemm_of(*shape, name), on_device(*shape, name, torch.float32)
    x = inputs(tokens, shape[1])
    expected = exact(gemm, x)
    for kernel in INT8:
        y = fast.run(kernel, x.to(DEVICE))
        assert y.dtype == torch.float32
        assert torch.equal(y.cpu().double(), expected), kernel
        assert torch.equal(fast.run(kernel, x.to(DEVICE)), y), kernel


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("shape", [(2304, 768), (768, 3072)])
def test_integer_kernels_round_only_their_results(
    shape: tuple[int, int], name: str, dtype: torch.dtype, tokens: int
) -> None:
    """16 bits: the exact result rounded once, or, where cuSPARSELt does not add the bias, before and after it."""
    gemm, fast = gemm_of(*shape, name), on_device(*shape, name, dtype)
    x = inputs_16(tokens, shape[1])
    expected = exact(gemm, x)
    assert gemm.bias_O is not None
    bound = torch.finfo(dtype).eps / 2 * (expected.abs() + (expected - gemm.bias_O).abs()) * 1.01
    for kernel in INT8:
        y = fast.run(kernel, x.to(DEVICE, dtype))
        assert y.dtype == dtype
        assert bool(((y.cpu().double() - expected).abs() <= bound).all()), kernel
        assert torch.equal(fast.run(kernel, x.to(DEVICE, dtype)), y), kernel


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_that_are_no_powers_of_two(dtype: torch.dtype) -> None:
    """As learned scales are. Expected: within a unit in the last place of the definition with those scales."""
    gemm = gemm_of(768, 768)
    scale_O = torch.rand(768, generator=torch.Generator().manual_seed(9)) / 500 + 1e-4
    gemm = QuantizedGemm("g", gemm.weight_q_OI, scale_O, symmetric(0.0371), gemm.bias_O)
    # A third of a step from every tie, so that division and reciprocal agree
    x = (torch.randint(-140, 141, (385, 768), generator=torch.Generator().manual_seed(2)) + 1 / 3) * 0.0371
    expected = exact(gemm, x)
    assert gemm.bias_O is not None
    for kernel in INT8:
        y = CudaGemm(gemm, CudaOptions(dtype=dtype, device=DEVICE)).run(kernel, x.to(DEVICE))
        bound = torch.finfo(dtype).eps * (expected.abs() + (expected - gemm.bias_O).abs())
        assert bool(((y.cpu().double() - expected).abs() <= bound).all()), kernel


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3072, 768), (768, 3072)])
def test_16_bit_kernels(shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> None:
    """Expected: the product of the rounded operands in float64. A pruned weight that is not quantized."""
    generator = torch.Generator().manual_seed(3)
    mask_I = torch.tensor([0.0, 1, 0, 1]).repeat(shape[1] // 4)
    w_OI, bias_O = torch.randn(shape, generator=generator) / 30 * mask_I, torch.randn(shape[0], generator=generator)
    w_OI, bias_O = w_OI.to(dtype).float(), bias_O.to(dtype).float()
    x_TI = torch.randn(tokens, shape[1], generator=generator).to(dtype)
    expected = x_TI.double() @ w_OI.double().t() + bias_O.double()
    gemm = CudaGemm(FloatGemm("g", w_OI, bias_O), CudaOptions(dtype=dtype, device=DEVICE))
    assert gemm.kernels() == tuple(HALF)
    for kernel in HALF:
        strided_TI = x_TI.t().contiguous().t().to(DEVICE)  # the first call, which also searches
        for _ in range(2):
            y = gemm.run(kernel, strided_TI)
            assert y.dtype == dtype
            far = float((y.cpu().double() - expected).abs().max() / expected.abs().max())
            assert far <= 4 * torch.finfo(dtype).eps, kernel
            assert torch.equal(gemm.run(kernel, strided_TI), y), kernel
            strided_TI = x_TI.to(DEVICE)


@pytest.mark.parametrize("tokens", [1, 17, 385])
@pytest.mark.parametrize("shape", [(3072, 768), (768, 3072)])
def test_float8(shape: tuple[int, int], tokens: int) -> None:
    """Expected: the product of the same float8 operands in float64, and 5 % from the integers' (3 bits of mantissa)."""
    runs, reason = works("sparse_fp8", torch.bfloat16, DEVICE)
    if cuda_capability(DEVICE) < (9, 0) or not runs:
        pytest.skip(reason)
    gemm, fast = gemm_of(*shape), on_device(*shape, "symmetric", torch.bfloat16)
    assert fast.kernels()[-1] == "sparse_fp8"
    x = inputs_16(tokens, shape[1])
    y = fast.run("sparse_fp8", x.to(DEVICE, torch.bfloat16))
    w8_OI = dense_numbers(gemm, "sparse_fp8", torch.bfloat16)
    scale_O = (gemm.weight_q_OI * gemm.scale_O[:, None]).abs().amax(1) / FP8_MAX
    scale = torch.tensor(0.125 * 127 / FP8_MAX)
    x8_TI = (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    assert gemm.bias_O is not None
    expected = x8_TI.double() @ w8_OI.double().t() * (scale_O * scale).double() + gemm.bias_O.double()
    assert distance(y, expected) <= 0.01
    assert distance(y, exact(gemm, x)) <= 0.05
    assert torch.equal(fast.run("sparse_fp8", x.to(DEVICE, torch.bfloat16)), y)


@pytest.mark.parametrize("kernel", INT8)
@pytest.mark.parametrize(
    "found", [DYNAMIC, InputQuantization("dynamic", 8, None, 0, -127, 127)], ids=["minmax", "absmax"]
)
def test_dynamic_inputs(found: InputQuantization, kernel: str) -> None:
    """By tensor: the reference's range of the whole input. By token: of each row, symmetric. Tolerance: an input that
    rounds to the neighbouring level, since PyTorch divides by numbers otherwise on a GPU."""
    gemm = QuantizedGemm("g", gemm_of(768, 768).weight_q_OI, gemm_of(768, 768).scale_O, found)
    x = torch.randn(17, 768, generator=torch.Generator().manual_seed(4))
    w_IO = (gemm.weight_q_OI.double() * gemm.scale_O.double()[:, None]).t()
    symmetric_row = InputQuantization("dynamic", 8, None, 0, -127, 127)
    by_row = torch.cat([fake_quantize(row[None], symmetric_row) for row in x])
    for dynamic, rounded in (("tensor", fake_quantize(x, found)), ("token", by_row)):
        options = CudaOptions(dtype=torch.float32, device=DEVICE, dynamic=dynamic)  # type: ignore[arg-type]
        assert distance(CudaGemm(gemm, options).run(kernel, x.to(DEVICE)), rounded.double() @ w_IO) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.ReLU()], ids=["gelu", "gelu_tanh", "relu"])
@torch.no_grad()
def test_an_ffn_hands_integers_over(activation: nn.Module, dtype: torch.dtype) -> None:
    """GELU and rounding in one kernel behind the first matrix. Expected: the reference on the same inputs; float32
    0.2 % (single levels), 16 bits 2 %: the first result is rounded before GELU, which moves a few levels by one."""
    fast = Toy(activation, width=768, hidden=3072).eval()
    slow = copy.deepcopy(fast)
    scales: dict[str, Any] = {
        "up": dict(scale_O=torch.rand(3072, generator=torch.Generator().manual_seed(1)) / 400, input=symmetric(0.03)),
        "down": dict(input=symmetric(0.02)),
    }
    gemms = {
        f"blocks.0.{name}": two_of_four(random_gemm(*shape, name=f"blocks.0.{name}", **scales[name]))
        for name, shape in (("up", (3072, 768)), ("down", (768, 3072)))
    }
    report = use_cuda_(fast, find_sites(fast, TOY), gemms, options=CudaOptions(dtype=dtype, device=DEVICE))
    assert report.fused == (("blocks.0.up", "blocks.0.down"),)
    assert report.kernels == {"sparse_int8": 2}
    use_reference_(slow, find_sites(slow, TOY), gemms)
    x = torch.randn(17, 768, generator=torch.Generator().manual_seed(6)).to(dtype)
    assert fast.blocks[0].up(x.to(DEVICE)).dtype == torch.int8
    found = fast(x.to(DEVICE))
    assert distance(found, slow(x.float()).double()) <= (2e-3 if dtype == torch.float32 else 0.02)
    assert torch.equal(fast(x.to(DEVICE)), found)


def test_strided_sliced_and_empty_inputs() -> None:
    """Rows and columns apart in memory, offsets that no kernel could load in one piece, leading dimensions, no rows."""
    gemm, fast = gemm_of(768, 768), on_device(768, 768, "symmetric", torch.bfloat16)
    wide = inputs_16(40, 2 * 768 + 1).to(DEVICE, torch.bfloat16)
    for x in (wide[:, 1:769], wide[3:, 1::2], wide[:, 768:1536].t().contiguous().t(), wide[:, :768].view(2, 20, 768)):
        expected = exact(gemm, x.cpu().float())
        for kernel in (*INT8, *HALF):
            assert distance(fast.run(kernel, x), expected) <= 0.01, kernel
    assert fast.run("sparse_int8", wide[:0, :768]).shape == (0, 768)


def test_an_algorithm_that_does_not_fit_is_left_for_the_default() -> None:
    """cuSPARSELt knows no algorithm 10,000. Expected: the default one's result."""
    layout = on_device(768, 768, "symmetric", torch.float32)._layout("sparse_int8")
    x_TI = torch.randint(-9, 9, (32, 768), dtype=torch.int8, device=DEVICE)
    expected = multiply(layout, x_TI, out_dtype=torch.int32)
    given = (x_TI, layout.weight, None, None, 768, torch.int32)
    assert torch.equal(sparse_mm_operator()(*given, 10_000, 1, -1), expected)
    assert torch.equal(sparse_mm_operator()(*given, *DEFAULT_ALGORITHM), expected)


def test_the_search_is_made_once_per_shape() -> None:
    """All GEMMs of one shape share what was found, for row counts up to the same power of two."""
    options = CudaOptions(dtype=torch.bfloat16, device=DEVICE)
    first, second = CudaGemm(gemm_of(768, 768), options), CudaGemm(gemm_of(768, 768), options)
    x = inputs_16(100, 768).to(DEVICE, torch.bfloat16)
    first.run("sparse_int8", x)
    found = dict(options.algorithms)
    assert len(found) == 1
    second.run("sparse_int8", x[:70])
    assert options.algorithms == found
    second.run("sparse_int8", x[:7])
    assert len(options.algorithms) == 2


def test_what_cusparselt_fuses_here() -> None:
    """Not a fact about our code but worth a line in the log: (scales, bias) that its int8 kernels apply themselves."""
    for dtype in DTYPES:
        scales, bias = fused_scales(dtype, DEVICE)
        print(f"{dtype}: scales per channel {scales}, float32 bias {bias}")
        assert scales or not bias
