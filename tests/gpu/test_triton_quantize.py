"""The cases of triton_quantize_cases.py on a GPU: LayerNorm, GELU and rounding in one kernel; and real widths."""

from __future__ import annotations

import pytest
import torch
from squeezoo.compress.runtime.triton_quantize import finish, layer_norm, quantize_rows
from triton_quantize_cases import *  # noqa: F403
from triton_quantize_cases import DEVICE, DTYPES, INPUTS, divided, numbers, plain, static

pytestmark = pytest.mark.gpu


def test_they_run_on_the_device() -> None:
    assert DEVICE == "cuda", "TRITON_INTERPRET is set: Triton interprets its kernels on the CPU in this process"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 768, 1024, 4096])
@pytest.mark.parametrize("rows", [1, 385])
def test_layer_norm_of_real_widths(rows: int, width: int, dtype: torch.dtype) -> None:
    """Expected: PyTorch's, in float64, rounded to the dtype (one more rounding where a residual is added first); the
    levels are those of the output, and the same twice."""
    x_TD, other_TD = numbers(rows, width, dtype=dtype), numbers(rows, width, dtype=dtype, seed=3)
    w_D, b_D = numbers(width, dtype=dtype, seed=1), numbers(width, dtype=dtype, seed=2)
    levels = static(INPUTS["lsq"])
    y_TD, level_TD = layer_norm(x_TD, other_TD, w_D, b_D, 1e-5, levels)
    wide = [(x_TD + other_TD).double(), (width,), w_D.double(), b_D.double(), 1e-5]
    expected_TD = torch.nn.functional.layer_norm(*wide)  # type: ignore[arg-type]
    step = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(y_TD.double(), expected_TD, rtol=2 * step, atol=8 * step)
    assert level_TD is not None
    # Of 100,000s of numbers a few lie so near to the middle of two levels that it depends on the division
    assert float((level_TD != divided(y_TD, levels)).float().mean()) <= 1e-5
    again_TD, again_levels_TD = layer_norm(x_TD, other_TD, w_D, b_D, 1e-5, levels)
    assert torch.equal(again_TD, y_TD)
    assert torch.equal(again_levels_TD, level_TD)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu"])
def test_gelu_and_rounding_behind_a_padded_gemm(activation: str) -> None:
    """The result of BERT-base's first FFN matrix, rows apart in memory. Expected: the plain form, levels one apart in
    less than one of 2,000 places (erf and exp are other approximations)."""
    generator = torch.Generator().manual_seed(7)
    sum_TO = torch.randint(-50_000, 50_000, (385, 3104), generator=generator, dtype=torch.int32).to(DEVICE)[:, :3072]
    step_O = (torch.rand(3072, generator=generator) / 20_000).to(DEVICE)
    bias_O = torch.randn(3072, generator=generator).to(DEVICE)
    for emit in ("lsq", "minmax"):
        given = dict(step_O=step_O, bias_O=bias_O, activation=activation, emit=static(INPUTS[emit]))
        found_TO = finish(sum_TO, **given)  # type: ignore[arg-type]
        expected_TO = plain(finish, sum_TO, **given)
        assert (found_TO.int() - expected_TO.int()).abs().max() <= 1
        assert (found_TO != expected_TO).float().mean() < 5e-4
        assert torch.equal(finish(sum_TO, **given), found_TO)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [768, 3072, 16_384, 20_000])
def test_levels_per_token_of_real_widths(width: int) -> None:
    """Expected: the plain form, which is taken where a row is wider than one program holds. Half of a row's largest
    number is a tie, which a division by the reciprocal (the plain form's, on a GPU) may break the other way."""
    x_TI = numbers(17, width, dtype=torch.bfloat16)
    level_TI, scale_T = quantize_rows(x_TI)
    expected_TI, expected_T = plain(quantize_rows, x_TI)
    torch.testing.assert_close(scale_T, expected_T, rtol=1e-6, atol=0)
    assert (level_TI.int() - expected_TI.int()).abs().max() <= 1
    assert (level_TI != expected_TI).float().mean() < 1e-2
