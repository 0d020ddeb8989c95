"""One GEMM of the CUDA runtime, layouts and operators, without a GPU: the operators have CPU forms that define them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cuda_models import two_of_four
from gemms import DYNAMIC, asymmetric, exact, inputs, random_gemm, symmetric
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.packing import compress_nm, expand_nm
from squeezoo.compress.quantizers import InputQuantization
from squeezoo.compress.runtime import QuantizedGemm
from squeezoo.compress.runtime.choice import EVER, Choice
from squeezoo.compress.runtime.cuda_layout import built, padded, padded_input, padded_rows
from squeezoo.compress.runtime.cuda_linear import CudaGemm
from squeezoo.compress.runtime.cuda_ops import multiply, searched_rows, sparse_mm_operator
from squeezoo.compress.runtime.cuda_source import CudaOptions, FloatGemm
from squeezoo.compress.runtime.inputs import fake_quantize
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

CPU32 = CudaOptions(dtype=torch.float32, device="cpu")
CPU16 = CudaOptions(dtype=torch.bfloat16, device="cpu")
INT8 = ("sparse_int8", "dense_int8")


def gemm_of(out_features: int, in_features: int, **changes: Any) -> QuantizedGemm:
    return two_of_four(random_gemm(out_features, in_features, **changes))


# -- layouts


@pytest.mark.parametrize(
    ("backend", "shape", "expected"),
    [
        ("sparse_int8", (40, 48), (64, 64)),
        ("sparse_int8", (64, 96), (64, 96)),
        ("sparse_fp8", (1, 1), (32, 32)),
        ("sparse_half", (24, 16), (32, 16)),
        ("dense_int8", (3, 20), (8, 24)),
        ("dense_half", (3, 20), (3, 20)),
    ],
)
def test_layouts_are_padded_with_zeros(backend: Any, shape: tuple[int, int], expected: tuple[int, int]) -> None:
    """Multiples of torch.sparse's table for cuSPARSELt and of _int_mm; on a CPU the weight stays dense, so it shows."""
    w_OI = torch.randint(-9, 10, shape, dtype=torch.int8)
    if backend == "sparse_fp8":
        w_OI = w_OI.float().to(torch.float8_e4m3fn)
    layout = built(backend, w_OI, "cpu")
    assert tuple(layout.weight.shape) == expected == (layout.padded_out, layout.padded_in)
    whole = layout.weight.float()
    assert torch.equal(whole[: shape[0], : shape[1]], w_OI.float())
    assert int((whole != 0).sum()) == int((w_OI.float() != 0).sum())


def test_padding_uses_pytorchs_own_table() -> None:
    """torch.sparse says which multiples cuSPARSELt takes; ours must be theirs."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT as Official

    for backend, dtype in (
        ("sparse_int8", torch.int8),
        ("sparse_half", torch.bfloat16),
        ("sparse_half", torch.float16),
    ):
        rule = Official._DTYPE_SHAPE_CONSTRAINTS[dtype]
        layout = built(backend, torch.zeros(1, 1, dtype=dtype), "cpu")  # type: ignore[arg-type]
        assert (layout.padded_out, layout.padded_in) == (rule.sparse_min_rows, rule.sparse_min_cols)
        assert padded_rows(1, backend) == rule.dense_min_rows  # type: ignore[arg-type]


def test_a_matrix_that_fits_is_not_copied() -> None:
    w_OI = torch.zeros(64, 64)
    assert padded(w_OI, 32, 32) is w_OI
    assert padded_input(w_OI, "sparse_int8") is w_OI


@pytest.mark.parametrize(("rows", "expected"), [(1, 16), (16, 16), (17, 32), (384, 384)])
def test_rows_of_the_sparse_kernel(rows: int, expected: int) -> None:
    assert padded_rows(rows, "sparse_int8") == expected
    assert padded_input(torch.ones(rows, 40, dtype=torch.int8), "sparse_int8").shape == (expected, 64)


def test_rows_of_the_dense_kernel() -> None:
    """``_int_mm`` refuses 16 rows and fewer on a GPU (Blas.cpp); any number above is taken."""
    assert [padded_rows(rows, "dense_int8") for rows in (1, 16, 17, 32, 33)] == [32, 32, 32, 32, 33]
    assert [searched_rows(rows, "sparse_int8") for rows in (1, 16, 17, 100, 4096)] == [16, 16, 32, 128, 4096]


def test_the_disk_format_gives_the_kernels_weights() -> None:
    """Neutral values and indices -> dense -> kernel layout -> product: the integers of the matrix that was packed."""
    gemm = gemm_of(40, 48)
    values_OC, indices_OC = compress_nm(gemm.weight_q_OI, Pattern(2, 4))
    w_OI = expand_nm(values_OC, indices_OC, Pattern(2, 4), 48)
    layout = built("sparse_int8", w_OI, "cpu")
    assert check_nm(layout.weight, Pattern(2, 4))
    x_TI = torch.randint(-127, 128, (5, 48), dtype=torch.int8)
    found = multiply(layout, x_TI, out_dtype=torch.int32)
    assert torch.equal(found.long(), x_TI.long() @ gemm.weight_q_OI.long().t())


# -- operators


@pytest.mark.parametrize("out_dtype", [torch.int32, torch.bfloat16, torch.float16])
def test_the_sparse_operator_on_fake_tensors(out_dtype: torch.dtype) -> None:
    """Shapes and dtypes on a device that this machine lacks, without computing; a compressed weight is opaque, so the
    number of output features is an argument."""
    with FakeTensorMode():
        x_TI = torch.empty(48, 64, dtype=torch.int8, device="cuda")
        packed = torch.empty(64 * 64 * 10 // 16, dtype=torch.int8, device="cuda")
        y_TO = sparse_mm_operator()(x_TI, packed, None, None, 64, out_dtype, 0, 1, -1)
    assert (tuple(y_TO.shape), y_TO.dtype, y_TO.device.type) == ((48, 64), out_dtype, "cuda")


def test_the_sparse_operator_keeps_torchs_rules() -> None:
    """``torch.library.opcheck``: schema without mutation, fake form, autograd registration, tracing with symbols."""
    layout = built("sparse_int8", gemm_of(64, 64).weight_q_OI, "cpu")
    x_TI = torch.randint(-9, 9, (16, 64), dtype=torch.int8)
    for arguments in ((None, None, 64, torch.int32), (torch.rand(64), torch.rand(64), 64, torch.bfloat16)):
        torch.library.opcheck(sparse_mm_operator(), (x_TI, layout.weight, *arguments, 0, 1, -1))


def test_scales_and_bias_are_rounded_once() -> None:
    """alpha * sum + bias in float32, then bfloat16: expected from int64 sums."""
    gemm = gemm_of(40, 48)
    layout = built("sparse_int8", gemm.weight_q_OI, "cpu")
    x_TI = torch.randint(-127, 128, (3, 48), dtype=torch.int8)
    assert gemm.bias_O is not None
    y_TO = multiply(layout, x_TI, gemm.scale_O, gemm.bias_O, out_dtype=torch.bfloat16)
    sums = x_TI.long() @ gemm.weight_q_OI.long().t()
    assert torch.equal(y_TO, (sums.float() * gemm.scale_O + gemm.bias_O).bfloat16())


# -- one GEMM

STATIC = {
    "lsq": symmetric(0.25), "lsq4": symmetric(1.0, bits=4), "minmax": asymmetric(0.25, 100),
    "pact": asymmetric(0.25, 0), "minmax6": asymmetric(1.0, 30, bits=6),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(40, 48), (64, 64), (8, 16)])
@pytest.mark.parametrize("kernel", INT8)
@pytest.mark.parametrize("name", STATIC)
def test_integer_kernels_are_exact(name: str, kernel: str, shape: tuple[int, int]) -> None:
    """Expected: the definition in 64 bits, for symmetric and asymmetric levels, padded and unpadded shapes, one row and
    more, and any leading dimensions; scales are powers of two, so float32 results are exact."""
    gemm = gemm_of(*shape, input=STATIC[name])
    fast = CudaGemm(gemm, CPU32)
    for rows in ((1,), (3, 7)):
        x = inputs(*rows, shape[1])
        y = fast.run(kernel, x)
        assert y.dtype == torch.float32
        assert torch.equal(y.double(), exact(gemm, x))


@pytest.mark.parametrize("kernel", INT8)
@pytest.mark.parametrize("name", ["lsq", "minmax"])
def test_sixteen_bit_results_are_the_rounded_exact_ones(name: str, kernel: str) -> None:
    """bfloat16 between the modules: one rounding of the exact result (inputs are multiples of 1/16, exact in it)."""
    gemm = gemm_of(40, 48, input=STATIC[name])
    x = inputs(20, 48).clamp(-8, 8)
    y = CudaGemm(gemm, CPU16).run(kernel, x.bfloat16())
    assert torch.equal(y, exact(gemm, x).bfloat16())


def expected_dynamic(gemm: QuantizedGemm, x: Tensor, found: InputQuantization) -> Tensor:
    w_OI = gemm.weight_q_OI.double() * gemm.scale_O.double()[:, None]
    return fake_quantize(x, found).double() @ w_OI.t() + (0 if gemm.bias_O is None else gemm.bias_O.double())


@pytest.mark.parametrize("kernel", INT8)
@pytest.mark.parametrize(
    "found", [DYNAMIC, InputQuantization("dynamic", 8, None, 0, -127, 127)], ids=["minmax", "absmax"]
)
def test_dynamic_inputs_by_tensor_and_by_token(found: InputQuantization, kernel: str) -> None:
    """By tensor: the reference's range of the whole input. By token: each row alone, symmetric."""
    gemm = gemm_of(40, 48, input=found)
    x = inputs(9, 48)
    by_tensor = CudaGemm(gemm, CPU32).run(kernel, x)
    torch.testing.assert_close(by_tensor.double(), expected_dynamic(gemm, x, found), rtol=1e-5, atol=1e-3)
    by_token = CudaGemm(gemm, CudaOptions(dtype=torch.float32, device="cpu", dynamic="token")).run(kernel, x)
    symmetric_row = InputQuantization("dynamic", 8, None, 0, -127, 127)
    rows = torch.cat([expected_dynamic(gemm, row[None], symmetric_row) for row in x])
    torch.testing.assert_close(by_token.double(), rows, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kernel", ["dense_half", "sparse_half"])
@pytest.mark.parametrize("name", STATIC)
def test_half_kernels_multiply_the_dequantized_weight(name: str, kernel: str) -> None:
    """Inputs are rounded and clipped to their levels, a dynamic one is not. Expected: the definition, as near as
    bfloat16 is (weights, inputs and result are rounded to 8 bits each)."""
    x = inputs(20, 48)
    gemm = gemm_of(40, 48, input=STATIC[name])
    y, expected = CudaGemm(gemm, CPU16).run(kernel, x), exact(gemm, x)
    assert y.dtype == torch.bfloat16
    assert float((y - expected).norm() / expected.norm()) < 0.01
    dynamic = gemm_of(40, 48, input=DYNAMIC)
    plain = x @ (dynamic.weight_q_OI.float() * dynamic.scale_O[:, None]).t() + dynamic.bias_O
    y = CudaGemm(dynamic, CPU16).run(kernel, x)
    assert float((y.float() - plain).norm() / plain.norm()) < 0.01


def test_float8_is_near_and_only_on_request() -> None:
    """Weights and inputs of three mantissa bits each: 2^-4 relative each at most, less on average."""
    gemm = gemm_of(64, 64, input=symmetric(0.25))
    assert "sparse_fp8" not in CudaGemm(gemm, CPU16).kernels()
    allowed = CudaGemm(gemm, CudaOptions(dtype=torch.bfloat16, device="cpu", allow_fp8=True))
    assert allowed.kernels()[-1] == "sparse_fp8"
    x = inputs(30, 64)
    expected = exact(gemm, x)
    y = allowed.run("sparse_fp8", x).double()
    assert 1e-4 < float((y - expected).norm() / expected.norm()) < 0.05


def test_float_weights_run_in_half() -> None:
    """A recipe without quantizers: 2:4 float weights, no integer kernels."""
    mask = torch.tensor([0.0, 1, 0, 1]).repeat(12)
    w_OI, bias_O = torch.randn(40, 48) * mask, torch.randn(40)
    gemm = CudaGemm(FloatGemm("g", w_OI, bias_O), CPU16)
    assert gemm.kernels() == ("sparse_half", "dense_half")
    x = torch.randn(5, 48)
    expected = torch.nn.functional.linear(x, w_OI, bias_O)
    for kernel in gemm.kernels():
        assert float((gemm.run(kernel, x).float() - expected).norm() / expected.norm()) < 0.01
    assert CudaGemm(FloatGemm("g", torch.randn(40, 48)), CPU16).kernels() == ("dense_half",)


def test_the_choice_says_which_kernel_runs() -> None:
    """``choose`` gets the number of rows; what it names runs. Layouts of others are dropped by ``prepare_``."""
    gemm = CudaGemm(gemm_of(40, 48), CPU32)
    assert gemm.kernels() == ("sparse_int8", "dense_int8", "dense_half")
    gemm.choose = Choice(((4, "dense_half"), (EVER, "dense_int8")))
    gemm.prepare_(("dense_half", "dense_int8"))
    assert set(gemm._layouts) == {"dense_half", "dense_int8"}
    x = inputs(8, 48)
    assert torch.equal(gemm(x), gemm.run("dense_int8", x))
    assert torch.equal(gemm(x[:4]), gemm.run("dense_half", x[:4]))
    assert gemm.workload().key == "linear 40x48 float32 static bias two_of_four"
    (example,) = gemm.example(7)
    assert example.shape == (7, 48)
    with pytest.raises(ValueError, match="'sparse_half' cannot run here"):
        gemm.run("sparse_half", x)


def test_copies_and_pickles_compute_the_same() -> None:
    gemm = CudaGemm(gemm_of(40, 48), CPU16)
    x = inputs(8, 48)
    expected = gemm(x)
    for other in (copy.deepcopy(gemm), pickle.loads(pickle.dumps(gemm))):
        assert torch.equal(other(x), expected)


def test_bad_inputs() -> None:
    gemm = CudaGemm(gemm_of(40, 48), CudaOptions(dtype=torch.float32, device="cpu", check_finite=True))
    with pytest.raises(ValueError, match=r"g: expected an input of 48 features, found the shape \[3, 47\]"):
        gemm(torch.zeros(3, 47))
    with pytest.raises(TypeError, match="found int64"):
        gemm(torch.zeros(3, 48, dtype=torch.long))
    with pytest.raises(TypeError, match="found int8"):
        gemm(torch.zeros(3, 48, dtype=torch.int8))
    x = torch.zeros(3, 48)
    x[1, 2], x[2, 5] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="input of g: expected finite values, found 2 of 144"):
        gemm(x)
    assert gemm(torch.zeros(0, 48)).shape == (0, 40)
