"""The Triton kernels around integer GEMMs against their plain forms, and against the reference's rounding.

Runs twice: in Triton's interpreter on the CPU (tests/compress/test_nm_attention.py starts it, in a process of its own),
and on a GPU (tests/gpu takes the cases over). Both may run in one session.
Legend: T rows, I in_features, O out_features, D width.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from emulated import emulating
from gemms import asymmetric, symmetric
from squeezoo.compress.quantizers import InputQuantization
from squeezoo.compress.runtime import triton_quantize
from squeezoo.compress.runtime.cuda_waiting import LevelsNorm, waiting_levels
from squeezoo.compress.runtime.inputs import fake_quantize
from squeezoo.compress.runtime.nonfinite import NonFinite
from squeezoo.compress.runtime.triton_quantize import Int8Levels, finish, layer_norm, quantize, quantize_rows, rounded
from squeezoo.compress.runtime.triton_support import interpreting
from torch import Tensor, nn

DEVICE = "cpu" if interpreting() and not emulating() else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INPUTS = {
    "lsq": symmetric(0.0371), "lsq4": symmetric(0.31, bits=4), "minmax": asymmetric(0.021, 20),
    "pact": asymmetric(0.013, 0), "minmax6": asymmetric(0.11, 31, bits=6),
}  # fmt: skip
ACTIVATIONS: list[Any] = [None, "gelu", "gelu_tanh", "relu"]


def static(found: InputQuantization) -> Int8Levels:
    assert found.scale is not None
    assert found.zero_point is not None
    return Int8Levels.of(found, found.scale, found.zero_point)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype).to(DEVICE)


def plain(function: Any, *args: Any, **kwargs: Any) -> Any:
    with mock.patch.object(triton_quantize, "fused_kernels", return_value=False):
        return function(*args, **kwargs)


def divided(x: Tensor, levels: Int8Levels) -> Tensor:
    """Levels by PyTorch on the CPU: on a GPU it multiplies by the reciprocal of a number instead of dividing by it."""
    return plain(quantize, x.cpu(), levels).to(DEVICE)


def test_the_kernels_are_taken_here() -> None:
    assert triton_quantize.fused_kernels(numbers(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", INPUTS)
def test_levels_are_those_of_the_reference(name: str, dtype: torch.dtype) -> None:
    """Expected: ``(level - shift) * scale`` is the fake-quantized input, clipped ends and ties to even included (but
    for ties of inexact steps: PyTorch divides by a number on a GPU by multiplying with its reciprocal)."""
    found = INPUTS[name]
    x_TI = numbers(13, 50, dtype=dtype)
    levels = static(found)
    level_TI = quantize(x_TI, levels)
    assert level_TI.dtype == torch.int8
    again = (level_TI.float() - levels.shift) * levels.scale
    torch.testing.assert_close(again.cpu(), fake_quantize(x_TI.cpu().float(), found), rtol=1e-6, atol=1e-6)
    floats = rounded(x_TI, levels, torch.float32)
    torch.testing.assert_close(floats, again, rtol=1e-6, atol=1e-6)
    assert rounded(x_TI, levels, torch.float16).dtype == torch.float16
    assert int(level_TI.min()) - levels.shift >= levels.low
    assert int(level_TI.max()) - levels.shift <= levels.high
    ties = quantize(
        torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 300.0, -300.0]]).to(DEVICE), Int8Levels(1.0, -127, 127, 0)
    )
    assert ties.tolist() == [[0, 2, 2, 0, -2, 127, -127]]


def test_a_strided_and_an_empty_input() -> None:
    levels = static(INPUTS["lsq"])
    wide = numbers(6, 40)
    assert torch.equal(quantize(wide[:, ::2], levels), divided(wide[:, ::2].contiguous(), levels))
    assert quantize(wide[:0], levels).shape == (0, 40)
    assert quantize_rows(wide[:0])[1].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_per_token(dtype: torch.dtype) -> None:
    """Each row spans -127..127 by its own largest value; a row of zeros has scale 1."""
    x_TI = numbers(9, 50, dtype=dtype)
    x_TI[4] = 0
    level_TI, scale_T = quantize_rows(x_TI)
    expected_TI, expected_T = plain(quantize_rows, x_TI)
    torch.testing.assert_close(scale_T, expected_T, rtol=1e-6, atol=0)
    assert (level_TI.int() - expected_TI.int()).abs().max() <= (0 if DEVICE == "cpu" else 1)
    assert float(scale_T[4]) == 1.0
    assert not level_TI[4].any()
    assert (level_TI.abs().amax(1)[[0, 1, 2, 3, 5, 6, 7, 8]] == 127).all()


@pytest.mark.parametrize("emit", [None, "lsq", "minmax"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_end_of_an_integer_gemm(activation: Any, emit: str | None) -> None:
    """Scales per channel and token, zero-point correction, bias, activation, levels: the plain form; a level may differ
    by one at a rounding boundary, since erf and exp are other approximations."""
    generator = torch.Generator().manual_seed(1)
    sum_TO = torch.randint(-30000, 30000, (11, 600), generator=generator, dtype=torch.int32).to(DEVICE)[:, :300]
    given: dict[str, Any] = dict(
        step_O=torch.rand(300, generator=generator).to(DEVICE) / 5000,
        row_T=torch.rand(11, generator=generator).to(DEVICE) + 0.5,
        correction_O=torch.randint(-500, 500, (300,), generator=generator, dtype=torch.int32).to(DEVICE),
        bias_O=torch.randn(300, generator=generator).to(DEVICE),
        activation=activation,
        emit=None if emit is None else static(INPUTS[emit]),
    )
    found, expected = finish(sum_TO, **given), plain(finish, sum_TO, **given)
    assert found.dtype == expected.dtype
    assert found.is_contiguous()
    if emit is None:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)
    else:
        assert (found.int() - expected.int()).abs().max() <= 1
        assert (found != expected).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_end_of_a_sixteen_bit_gemm(dtype: torch.dtype) -> None:
    """A result that has its scales: bias and GELU in float32, one rounding at the end."""
    y_TO, bias_O = numbers(5, 70, dtype=dtype), numbers(70, seed=2)
    found = finish(y_TO, bias_O=bias_O, activation="gelu", dtype=dtype)
    expected = plain(finish, y_TO, bias_O=bias_O, activation="gelu", dtype=dtype)
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.float(), expected.float(), rtol=step, atol=step / 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_layer_norm_writes_levels_beside_its_output(residual: bool, dtype: torch.dtype) -> None:
    """The output is PyTorch's to one unit in the last place (Triton's interpreter cuts bfloat16 off instead of
    rounding: two with the sum), and the levels are exactly those of the output that was written."""
    x_TD, w_D, b_D = numbers(7, 100, dtype=dtype), numbers(100, dtype=dtype, seed=1), numbers(100, dtype=dtype, seed=2)
    other = numbers(7, 100, dtype=dtype, seed=3) if residual else None
    levels = static(INPUTS["lsq"])
    y_TD, level_TD = layer_norm(x_TD, other, w_D, b_D, 1e-5, levels)
    expected_TD, _ = plain(layer_norm, x_TD, other, w_D, b_D, 1e-5, levels)
    step = torch.finfo(dtype).eps
    wide = 3 if dtype == torch.bfloat16 and DEVICE == "cpu" else 1
    # float32 on a GPU: square root and division of the compiler's fast kind, and another order of summation.
    rtol, atol = wide * max(step, 1e-6), wide * max(step, 1e-6) * 4
    torch.testing.assert_close(y_TD.float(), expected_TD.float(), rtol=rtol, atol=atol)
    assert level_TD is not None
    assert torch.equal(level_TD, divided(y_TD, levels))
    bare, none = layer_norm(x_TD, None, None, None, 1e-5, None)
    assert none is None
    assert float((bare.float().mean(1)).abs().max()) < 0.05


NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_what_is_not_finite_is_marked_or_carried(value: float, dtype: torch.dtype) -> None:
    """Integers hold no NaN, so one in an input leaves a mark (whatever the input's shape, wherever it is); where the
    result or a scale is a float, it is NaN there, and nowhere else. Both forms alike. A finite input leaves no mark,
    even the largest number."""
    levels = static(INPUTS["minmax"])
    x_TI = numbers(70, 50, dtype=dtype)
    x_TI[3, 4] = torch.finfo(dtype).max / 4  # PyTorch's own GELU overflows beyond
    bad_TI = x_TI.clone()
    bad_TI[69, 49] = value
    expected_T = torch.arange(70, device=DEVICE) == 69
    for run in (lambda function, *args, **kwargs: function(*args, **kwargs), plain):
        for given, is_bad in ((x_TI, False), (bad_TI, True)):
            calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
                (quantize, (given, levels), {}),
                (finish, (given,), dict(emit=levels, activation="gelu", dtype=dtype)),
                (layer_norm, (given.float() / 1e30, None, None, None, 1e-5, levels), {}),
            ]
            for function, args, kwargs in calls:
                seen = NonFinite(DEVICE)
                assert seen.begin_()
                run(function, *args, **kwargs, seen=seen)
                assert bool(seen.put_on(torch.zeros(2, device=DEVICE)).isnan().all()) == is_bad
            floats = run(rounded, given, levels, torch.float32)
            assert torch.equal(floats.isnan(), (expected_T[:, None] & (torch.arange(50, device=DEVICE) == 49)) & is_bad)
            assert not floats.isinf().any()
            assert torch.equal(run(quantize_rows, given)[1].isnan(), expected_T & is_bad)


def test_a_norm_learns_whose_levels_to_write() -> None:
    """The first reader tells its levels; from the next call on they wait, unless the tensor was changed since."""
    norm = LevelsNorm(nn.LayerNorm(20).to(DEVICE)).eval()
    levels = static(INPUTS["lsq"])
    x = numbers(2, 3, 20)
    with torch.no_grad():
        assert waiting_levels(norm(x), levels) is None
        y = norm(x)
        waiting = waiting_levels(y, levels)
        assert waiting is not None
        assert torch.equal(waiting, divided(y.reshape(-1, 20), levels))
        assert waiting_levels(y, static(INPUTS["lsq4"])) is None
        y += 1
        assert waiting_levels(y, levels) is None
        both = norm(x, x)
        torch.testing.assert_close(both, torch.nn.functional.layer_norm(2 * x, (20,), norm.weight, norm.bias))
