"""LSQ fake quantization, exported integers and the quantizer module against the reference vector and by hand."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezoo.compress.quantizers import (
    MIN_SCALE,
    LsqQuantizer,
    largest_level,
    lsq_fake_quantize,
    quantize_int8,
)
from torch import Tensor

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "lsq.json").read_text())
FLOAT32: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
FLOAT64: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-8}  # the vectors are rounded to 8 digits


def reference(x: Tensor, s: Tensor, qp: int, factor: float, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients written out from the equations of LSQ (arXiv:1902.08153), entry by entry."""
    v = x / s
    levels = v.clamp(-qp, qp).round()
    inside = v.abs() <= qp
    e = torch.where(inside, v.round() - v, torch.sign(v) * qp)
    return levels * s, torch.where(inside, g, 0), factor * (g * e).sum_to_size(s.shape)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.float64, FLOAT64)])
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_values_and_gradients_match_the_vector(bits: str, dtype: torch.dtype, tolerance: dict[str, Any]) -> None:
    """Expected: lsq.json, float64 autograd by hand, checked with PyTorch's learnable per-channel operator."""
    case = VECTORS[bits]
    w_OI = torch.tensor(VECTORS["weight"], dtype=dtype, requires_grad=True)
    scale_O1 = torch.tensor(case["scale"], dtype=dtype).unsqueeze(1).requires_grad_()
    g_OI = torch.tensor(VECTORS["grad_output"], dtype=dtype)
    for factor, name in ((case["grad_factor"], "grad_scale"), (1.0, "grad_scale_without_factor")):
        out_OI = lsq_fake_quantize(w_OI, scale_O1, case["Qp"], factor)
        grad_w, grad_s = torch.autograd.grad(out_OI, (w_OI, scale_O1), g_OI)
        torch.testing.assert_close(out_OI, torch.tensor(case["dequant"], dtype=dtype), **tolerance)
        torch.testing.assert_close(grad_w, torch.tensor(case["grad_w"], dtype=dtype), **tolerance)
        torch.testing.assert_close(grad_s.squeeze(1), torch.tensor(case[name], dtype=dtype), **tolerance)


@pytest.mark.parametrize("bits", [4, 8])
def test_exported_integers_match_the_vector(bits: int) -> None:
    """Expected: lsq.json, exact."""
    case = VECTORS[f"{bits}bit"]
    w_OI, scale_O1 = torch.tensor(VECTORS["weight"]), torch.tensor(case["scale"]).unsqueeze(1)
    q_OI = quantize_int8(w_OI, scale_O1, largest_level(bits))
    assert q_OI.dtype == torch.int8
    assert q_OI.tolist() == case["q"]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_module_reproduces_initial_scale_and_gradient_factor(bits: int) -> None:
    """Expected: lsq.json: init_ptq_max, and grad_scale with 1 / sqrt(in_features * Qp)."""
    case = VECTORS[f"{bits}bit"]
    w_OI = torch.tensor(VECTORS["weight"])
    quantizer = LsqQuantizer(bits, (3, 1))
    quantizer.init_from_amax_(w_OI.abs().amax(1))
    torch.testing.assert_close(
        quantizer.scale.detach().squeeze(1), torch.tensor(VECTORS["init_ptq_max"][f"{bits}bit"]), **FLOAT32
    )
    with torch.no_grad():
        quantizer.scale.copy_(torch.tensor(case["scale"]).unsqueeze(1))
    quantizer(w_OI).backward(torch.tensor(VECTORS["grad_output"]))
    assert quantizer.scale.grad is not None
    torch.testing.assert_close(quantizer.scale.grad.squeeze(1), torch.tensor(case["grad_scale"]), **FLOAT32)


@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_gradients_match_the_equations_in_float64(bits: int, channel: bool, seed: int) -> None:
    """Expected: LSQ's equations written out entry by entry, for both granularities, inside and clipped."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    scale = torch.rand((5, 1) if channel else (), generator=generator, dtype=torch.float64).add(0.01).requires_grad_()
    g = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    out = lsq_fake_quantize(x, scale, largest_level(bits), 0.3)
    expected = reference(x.detach(), scale.detach(), largest_level(bits), 0.3, g)
    for found, wanted in zip((out, *torch.autograd.grad(out, (x, scale), g)), expected):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_border_counts_as_inside_and_the_next_number_as_clipped(dtype: torch.dtype) -> None:
    """Expected: |v| = Qp inside (dx = g, e = 0); the next larger |v| clipped (dx = 0, e = +-Qp)."""
    beyond = torch.nextafter(torch.tensor(127.0, dtype=dtype), torch.tensor(math.inf, dtype=dtype)).item()
    for value, grad_x, grad_s in ((127.0, 1.0, 0.0), (-127.0, 1.0, 0.0), (beyond, 0.0, 127.0), (-beyond, 0.0, -127.0)):
        x = torch.tensor([value], dtype=dtype, requires_grad=True)
        scale = torch.tensor(1.0, dtype=dtype, requires_grad=True)
        lsq_fake_quantize(x, scale, 127, 1.0).sum().backward()
        assert x.grad is not None
        assert scale.grad is not None
        assert (x.grad.item(), scale.grad.item()) == (grad_x, grad_s)


def test_rounding_is_half_to_even() -> None:
    """Expected: by hand."""
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert lsq_fake_quantize(x, torch.tensor(1.0), 7, 1.0).tolist() == [0, 2, 2, 0, -2, -2]


@given(st.integers(2, 8), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_exported_integers_times_scale_are_the_fake_quantized_weight(bits: int, seed: int) -> None:
    """Expected: exact equality in float32, and levels within -Qp..Qp."""
    generator = torch.Generator().manual_seed(seed)
    w_OI, qp = torch.randn(6, 16, generator=generator), largest_level(bits)
    scale_O1 = torch.rand(6, 1, generator=generator) / qp + 1e-4
    q_OI = quantize_int8(w_OI, scale_O1, qp)
    assert int(q_OI.abs().max()) <= qp
    assert torch.equal(q_OI * scale_O1, lsq_fake_quantize(w_OI, scale_O1, qp, 1.0))


def test_a_weight_or_scale_that_is_no_number_is_not_exported() -> None:
    """Expected: ValueError that says what was found."""
    w_OI = torch.ones(2, 4)
    with pytest.raises(ValueError, match="expected positive finite scales"):
        quantize_int8(w_OI, torch.tensor([[1.0], [0.0]]), 127)
    w_OI[0, 0] = math.nan
    with pytest.raises(ValueError, match="found 1 NaN of 8"):
        quantize_int8(w_OI, torch.ones(2, 1), 127)


def test_the_largest_value_of_each_row_is_not_clipped_after_initialisation() -> None:
    """Expected: max|w| / s <= Qp exactly, although s = max|w| / Qp is rounded: else its gradient would be lost."""
    w_OI = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantizer = LsqQuantizer(8, (2000, 1))
    quantizer.init_from_amax_(w_OI.detach().abs().amax(1, keepdim=True))
    quantizer(w_OI).sum().backward()
    assert w_OI.grad is not None
    assert torch.equal(w_OI.grad, torch.ones_like(w_OI))


def test_a_row_of_zeros_has_scale_one_and_stays_zero() -> None:
    """Expected: s = 1 for a row of zeros; masked weights stay 0 and give the scale no gradient (e = 0)."""
    quantizer = LsqQuantizer(8, (2, 1))
    w_OI = torch.tensor([[0.0, 0, 0, 0], [0, 1.27, 0, -0.3]])
    quantizer.init_from_amax_(w_OI.abs().amax(1))
    assert quantizer.scale[0].item() == 1.0
    assert quantizer.scale[1].item() == pytest.approx(0.01, rel=1e-6)
    out_OI = quantizer(w_OI)
    assert torch.equal(out_OI == 0, w_OI == 0)
    out_OI[w_OI == 0].sum().backward()
    assert quantizer.scale.grad is not None
    assert torch.equal(quantizer.scale.grad, torch.zeros(2, 1))


def test_inactive_is_the_identity_and_activation_follows_the_state_dict() -> None:
    """Expected: a fresh quantizer returns its input; a loaded state says by its scale whether it was calibrated."""
    fresh, calibrated = LsqQuantizer(8), LsqQuantizer(8)
    x = torch.randn(3, 5)
    assert fresh(x) is x
    calibrated.init_from_amax_(torch.tensor(2.0))
    loaded = LsqQuantizer(8)
    loaded.load_state_dict(calibrated.state_dict())
    assert loaded.active
    assert torch.equal(loaded(x), calibrated(x))
    loaded.load_state_dict(fresh.state_dict())
    assert not loaded.active
    assert list(fresh.state_dict()) == ["scale"]


def test_a_deep_copy_is_independent() -> None:
    """Expected: training the copy leaves the original; calibration under way is copied too."""
    quantizer = LsqQuantizer(8)
    quantizer.observe(torch.tensor([1.0]))
    twin = copy.deepcopy(quantizer)
    twin.observe(torch.tensor([9.0]))
    quantizer.finish_calibration_()
    twin.finish_calibration_()
    assert quantizer.scale.item() == pytest.approx(1 / 127)
    assert twin.scale.item() == pytest.approx(9 / 127)


def test_calibration_takes_the_maximum_over_batches() -> None:
    """Expected: by hand, s = max|x| / 127 over all batches."""
    quantizer = LsqQuantizer(8)
    for batch in ([0.5, -1.0], [2.54, 0.0], [-2.0, 1.0]):
        quantizer.observe(torch.tensor(batch))
    quantizer.finish_calibration_()
    assert quantizer.active
    assert quantizer.scale.item() == pytest.approx(0.02, rel=1e-6)


def test_percentile_calibration_averages_over_batches() -> None:
    """Expected: by hand; the 90th percentile of |x| by rank is the 90th smallest of 100, averaged over two batches."""
    quantizer = LsqQuantizer(8)
    x = torch.arange(1, 101.0) * torch.tensor([1.0, -1.0]).repeat(50)
    quantizer.observe(x, percentile=90)
    quantizer.observe(3 * x, percentile=90)
    quantizer.finish_calibration_()
    assert quantizer.scale.item() == pytest.approx((90 + 270) / 2 / 127, rel=1e-6)


def test_channels_are_observed_row_by_row() -> None:
    """Expected: by hand."""
    quantizer = LsqQuantizer(8, (2, 1))
    quantizer.observe(torch.tensor([[1.0, -3.0], [0.5, 0.25]]))
    quantizer.observe(torch.tensor([[2.0, 0.0], [0.0, -4.0]]))
    quantizer.finish_calibration_()
    torch.testing.assert_close(quantizer.scale.detach(), torch.tensor([[3.0], [4.0]]) / 127)


def test_bad_calibration_input_is_refused_and_leaves_the_range() -> None:
    """Expected: ValueError that names what was found; the range of the batches before is kept."""
    quantizer = LsqQuantizer(8)
    with pytest.raises(RuntimeError, match="at least one calibration batch"):
        quantizer.finish_calibration_()
    quantizer.observe(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="found 2 NaN of 3 values"):
        quantizer.observe(torch.tensor([math.nan, 5.0, math.nan]))
    with pytest.raises(ValueError, match="found infinity"):
        quantizer.observe(torch.tensor([math.inf]))
    with pytest.raises(ValueError, match="empty tensor"):
        quantizer.observe(torch.empty(0, 4))
    with pytest.raises(ValueError, match="expected percentile None"):
        quantizer.observe(torch.tensor([2.0]), percentile=99.99)
    with pytest.raises(ValueError, match=r"percentile in \(0, 100\]"):
        LsqQuantizer(8).observe(torch.tensor([2.0]), percentile=0.0)
    quantizer.finish_calibration_()
    assert quantizer.scale.item() == pytest.approx(1 / 127)


@pytest.mark.parametrize("amax", [math.nan, math.inf, -1.0])
def test_a_range_that_is_no_range_is_refused(amax: float) -> None:
    """Expected: ValueError that names the value; the quantizer stays inactive."""
    quantizer = LsqQuantizer(8, (2, 1))
    with pytest.raises(ValueError, match=f"found {amax}"):
        quantizer.init_from_amax_(torch.tensor([1.0, amax]))
    with pytest.raises(ValueError, match="expected 2 ranges"):
        quantizer.init_from_amax_(torch.ones(3))
    assert not quantizer.active


@pytest.mark.parametrize("bits", [1, 9, 0, -8, 8.0, True, "8"])
def test_bits_outside_two_to_eight_are_refused(bits: Any) -> None:
    """Expected: ValueError that says 2 to 8 and what was found."""
    with pytest.raises(ValueError, match=f"expected 2 to 8 bits for a symmetric quantizer, found {bits!r}"):
        LsqQuantizer(bits)


def test_a_scale_shape_other_than_one_per_row_or_one_is_refused() -> None:
    """Expected: ValueError with the two allowed shapes."""
    for shape in ((3, 4), (3,), (3, 1, 1)):
        with pytest.raises(ValueError, match="expected the shape of the scale"):
            LsqQuantizer(8, shape)


def test_activation_gradient_factor_counts_elements_of_one_example() -> None:
    """Expected: ds = sum g * e / sqrt(numel / batch * Qp), by LSQ's equations."""
    x = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(1))
    quantizer = LsqQuantizer(8)
    quantizer.init_from_amax_(torch.tensor(2.0))
    quantizer(x).sum().backward()
    expected = reference(x, quantizer.scale.detach(), 127, 1 / math.sqrt(60 * 127), torch.ones_like(x))[2]
    assert quantizer.scale.grad is not None
    torch.testing.assert_close(quantizer.scale.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_scale_driven_below_the_floor_still_learns() -> None:
    """Expected: computed with 1e-8, a gradient for the scale nevertheless, and clamp_ raises the stored scale."""
    quantizer = LsqQuantizer(8)
    quantizer.init_from_amax_(torch.tensor(1.0))
    with torch.no_grad():
        quantizer.scale.fill_(-0.5)
    out = quantizer(torch.tensor([1.0, -1.0, 2.0]))
    torch.testing.assert_close(out.detach(), torch.tensor([1.0, -1.0, 1.0]) * 127 * MIN_SCALE)
    out.sum().backward()
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.item() > 0
    quantizer.clamp_()
    assert quantizer.scale.item() == pytest.approx(MIN_SCALE)
    fresh = LsqQuantizer(8)
    fresh.clamp_()
    assert fresh.scale.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_computed_in_float32_or_wider_and_returned_as_given(dtype: torch.dtype) -> None:
    """Expected: the float32 (float64) result cast once; gradient of the scale stays float32."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    quantizer = LsqQuantizer(8)
    quantizer.init_from_amax_(torch.tensor(1.5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(x)
    wide = x.detach() if dtype == torch.float64 else x.detach().float()
    expected = lsq_fake_quantize(wide, quantizer.scale.detach().to(wide.dtype), 127, 1.0)
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    out.sum().backward()
    assert x.grad is not None
    assert quantizer.scale.grad is not None
    assert (x.grad.dtype, quantizer.scale.grad.dtype) == (dtype, torch.float32)


def test_only_the_needed_gradients_are_computed() -> None:
    """Expected: inputs without requires_grad get none; under no_grad nothing is recorded."""
    quantizer = LsqQuantizer(8)
    quantizer.init_from_amax_(torch.tensor(1.0))
    quantizer(torch.randn(4)).sum().backward()
    assert quantizer.scale.grad is not None
    quantizer.scale.requires_grad_(False)
    x = torch.randn(4, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert quantizer(x).grad_fn is None


def test_it_compiles_as_one_graph() -> None:
    """Expected: the uncompiled value and gradient; backend "eager" needs no compiler."""
    quantizer = LsqQuantizer(8, (4, 1))
    w_OI = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    quantizer.init_from_amax_(w_OI.abs().amax(1) * 0.8)
    compiled = torch.compile(quantizer, backend="eager", fullgraph=True)
    (expected,) = torch.autograd.grad(quantizer(w_OI).square().sum(), quantizer.scale)
    (found,) = torch.autograd.grad(compiled(w_OI).square().sum(), quantizer.scale)
    torch.testing.assert_close(found, expected)
