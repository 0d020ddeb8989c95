"""Every quantizer against the reference vectors: values, integers and gradients, at the tolerance of their README.

Masks and integers are exact; values that float32 code produced agree to 1e-5 relative + 1e-6 absolute.
"""

import json
from pathlib import Path

import pytest
import torch
from squeezoo.compress.quantizers import (
    MinMaxQuantizer,
    PactQuantizer,
    affine_step,
    input_quantizer,
    pact_fake_quantize,
    sawb_alpha,
    sawb_coefficients,
    sawb_fake_quantize,
    weight_quantizer,
)
from torch import tensor
from torch.testing import assert_close


def vector(name):
    return json.loads((Path(__file__).parents[1] / "vectors" / f"{name}.json").read_text())


def close(found, expected):
    assert_close(found.detach(), tensor(expected), rtol=1e-5, atol=1e-6)


def trained(record, w_OI, g_OI, parts=1):
    """Quantizer, output and gradient of a weight."""
    w_OI = tensor(w_OI).requires_grad_()
    quantizer = weight_quantizer(record, tuple(w_OI.shape), parts)
    quantizer.init_from_weight_(w_OI.detach())
    out_OI = quantizer(w_OI)
    out_OI.backward(tensor(g_OI))
    return quantizer, out_OI, w_OI.grad


SAWB = vector("sawb")


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_sawb_zero_aligned(bits):
    """Expected: sawb.json, zero_aligned_<k>bit (SAWBPlusZeroSTE, SAWBZeroSTE)."""
    case = SAWB[f"zero_aligned_{bits}bit"]
    for gradient, key in (("plus", "grad_sawb_plus"), ("clipped", "grad_sawb")):
        record = {"method": "sawb", "bits": bits, "gradient": gradient}
        quantizer, out_OI, grad_OI = trained(record, SAWB["weight"], SAWB["grad_output"])
        close(out_OI, case["dequant"])
        close(grad_OI, case[key])
        integers = quantizer.export(tensor(SAWB["weight"]))
        assert torch.equal(integers.q_OI.float(), tensor(case["int"]))
        close(integers.scale_O1[0, 0] * quantizer.qp, case["alpha"])
        assert torch.equal(integers.q_OI * integers.scale_O1, out_OI.detach())


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_sawb_full_range(bits):
    """Expected: sawb.json, not_aligned_<k>bit (SAWBPlusSTE)."""
    case = SAWB[f"not_aligned_{bits}bit"]
    record = {"method": "sawb", "bits": bits, "levels": "full-range"}
    _, out_OI, grad_OI = trained(record, SAWB["weight"], SAWB["grad_output"])
    close(out_OI, case["dequant"])
    assert torch.equal(grad_OI, tensor(SAWB["grad_output"]))
    alpha = sawb_alpha(tensor(SAWB["weight"])[None], sawb_coefficients(bits, "full-range"))
    close(alpha.squeeze(), case["alpha"])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_sawb_per_channel(bits):
    """Expected: sawb.json, per_channel_zero_aligned (SAWBPlusZeroPerChSTE)."""
    case = SAWB["per_channel_zero_aligned"][f"{bits}bit"]
    record = {"method": "sawb", "bits": bits, "granularity": "channel"}
    quantizer, out_OI, _ = trained(record, SAWB["weight"], SAWB["grad_output"])
    close(out_OI, case["dequant"])
    close(quantizer.export(tensor(SAWB["weight"])).scale_O1.squeeze(1) * quantizer.qp, case["alpha"])


def test_sawb_guards_its_clip_value():
    """Expected: sawb.json, edge cases: nearly constant |w| takes max|w|; a clip value above max|w| is kept."""
    edge = SAWB["edge_constant_magnitude"]
    w_GRI = tensor(edge["weight"])[None]
    for bits, key in ((4, "alpha_raw_4bit_code403"), (8, "alpha_raw_8bit_code803")):
        c1, c2 = sawb_coefficients(bits)
        close(c1 * w_GRI.square().mean().sqrt() + c2 * w_GRI.abs().mean(), edge[key])
        close(sawb_alpha(w_GRI, (c1, c2)).squeeze(), 0.1)
    edge = SAWB["edge_very_sparse"]
    alpha = sawb_alpha(tensor(edge["weight"])[None], sawb_coefficients(4)).squeeze()
    close(alpha, edge["alpha_4bit_code403"])
    assert alpha > tensor(edge["weight"]).abs().max()


def test_quantize_then_mask():
    """Expected: quantize_then_mask.json: statistics of the dense weight, masked afterwards; the wrong value differs."""
    case = vector("quantize_then_mask")
    w_OI, mask_OI = tensor(case["weight"]).requires_grad_(), tensor(case["mask"]).bool()
    quantizer = weight_quantizer({"method": "sawb", "bits": 4}, tuple(w_OI.shape))
    quantizer.init_from_weight_(w_OI.detach(), mask_OI)
    out_OI = quantizer(w_OI) * mask_OI
    close(out_OI, case["forward"])
    out_OI.backward(tensor(case["grad_output"]))
    close(w_OI.grad, case["grad_weight"])
    close(quantizer.export(w_OI).scale_O1[0, 0] * 7, case["alpha"])
    wrong = sawb_alpha((w_OI * mask_OI).detach()[None], sawb_coefficients(4)).squeeze()
    close(wrong, case["alpha_if_statistics_on_masked_weight_WRONG"])


def in_range(bits, x):
    """A MinMax quantizer in training mode, calibrated on ``x``."""
    quantizer = input_quantizer({"method": "minmax", "bits": bits})
    quantizer.observe(x)
    quantizer.finish_calibration_()
    return quantizer.train()


@pytest.mark.parametrize(("key", "bits"), [("4bit", 4), ("8bit", 8), ("nonneg_8bit", 8)])
def test_minmax(key, bits):
    """Expected: minmax.json (torch.fake_quantize_per_tensor_affine); the gradient is the identity."""
    case = vector("minmax")
    x = tensor(case[key].get("x", case["x"])).requires_grad_()
    quantizer = in_range(bits, x.detach())
    out = quantizer(x)
    close(out, case[key]["dequant"])
    levels = quantizer.export()
    assert levels.scale == pytest.approx(case[key]["scale"], rel=1e-6)
    assert (levels.kind, levels.zero_point, levels.qmin, levels.qmax) == (
        "static", -case[key]["zero_level"], 0, 2**bits - 1,
    )  # fmt: skip
    q = (x.detach() / levels.scale).round().add(levels.zero_point).clamp(levels.qmin, levels.qmax)
    assert torch.equal(q, tensor(case[key]["q"]).float())
    g = torch.randn_like(x)
    out.backward(g)
    assert torch.equal(x.grad, g)


def test_minmax_running_range():
    """Expected: minmax.json, ema (Qmax, momentum 0.1): by training steps, and the same by calibration batches."""
    steps = vector("minmax")["ema"]
    training = in_range(8, tensor(steps[0]["x"]))
    calibration = MinMaxQuantizer(8)
    for step in steps:
        x = tensor(step["x"])
        training(x)
        close(training.low, step["min_buffer"])
        close(training.high, step["max_buffer"])
        calibration.observe(x)
    calibration.finish_calibration_()
    close(calibration.low, steps[-1]["min_buffer"])
    close(calibration.high, steps[-1]["max_buffer"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("plus", [False, True])
def test_pact(bits, plus):
    """Expected: pact.json (PACT2_STE, PACTplus2STE): values, integers, gradients of x and of both clip values."""
    vectors = vector("pact")
    case = vectors[f"pact_plus_{bits}bit" if plus else f"pact_{bits}bit"]
    x = tensor(vectors["x"]).requires_grad_()
    alpha, alpha_n = tensor(case["alpha"]).requires_grad_(), tensor(case["alpha_n"]).requires_grad_()
    out = pact_fake_quantize(x, alpha, alpha_n, bits, plus)
    close(out, case["dequant"])
    out.backward(tensor(vectors["grad_output"]))
    close(x.grad, case["grad_x"])
    close(alpha.grad, case["grad_alpha"])
    close(alpha_n.grad, case["grad_alpha_n"])
    if "q" in case:
        step, z = affine_step(alpha_n.detach(), alpha.detach(), bits)
        close(step, case["scale"])
        assert int(z) == case["zero_level"]
        assert torch.equal((out.detach() / step).round() - z, tensor(case["q"]).float())


def test_pact_starts_from_percentiles():
    """Expected: pact_init.json: per batch by rank, then the mean; batch k is numpy's generator 50 + k."""
    import numpy as np

    case = vector("pact_init")
    batches = [np.round(np.random.default_rng(50 + k).standard_normal((20, 25)), 4) for k in range(10)]
    assert batches[0].tolist() == case["batch0"]
    quantizer = PactQuantizer(4)
    for k, batch in enumerate(batches):
        quantizer.observe(torch.from_numpy(batch).float())
        alone = PactQuantizer(4)
        alone.observe(torch.from_numpy(batch).float())
        alone.finish_calibration_()
        close(alone.alpha_n, case["per_batch_lo_1pct"][k])
        close(alone.alpha, case["per_batch_hi_99pct"][k])
    quantizer.finish_calibration_()
    close(quantizer.alpha_n, case["alpha_n"])
    close(quantizer.alpha, case["alpha"])


def test_q8bert():
    """Expected: q8bert.json (QuantizedLinear, decay 0.9): weight integers, running threshold, three outputs."""
    case = vector("q8bert")
    w_OI = tensor(case["weight"])
    weight = weight_quantizer({"method": "q8bert", "bits": 8}, tuple(w_OI.shape))
    weight.init_from_weight_(w_OI)
    integers = weight.export(w_OI)
    assert integers.q_OI.tolist() == case["weight_q"]
    close(1 / integers.scale_O1[0, 0], case["weight_scale"])
    inputs = input_quantizer({"method": "q8bert", "bits": 8, "decay": 0.9})
    inputs.observe(tensor(case["steps"][0]["x"]))
    inputs.finish_calibration_()
    for step in case["steps"]:
        y = inputs(tensor(step["x"])) @ weight(w_OI).T + tensor(case["bias"])
        close(inputs.peak, step["ema_threshold"])
        close(y, step["y"])


def test_q8bert_dynamic_mode():
    """Expected: q8bert.json, dynamic_*: the range of the input itself, without any calibration data."""
    case = vector("q8bert")
    inputs = input_quantizer({"method": "q8bert", "bits": 8, "decay": 0.9, "dynamic": True}).eval()
    assert not inputs.needs_batches
    inputs.finish_calibration_()
    expected = tensor(case["dynamic_q"]) / case["dynamic_scale"]
    close(inputs(tensor(case["dynamic_x"])), expected.tolist())
    levels = inputs.export()
    assert (levels.kind, levels.scale, levels.zero_point, levels.qmin, levels.qmax) == ("dynamic", None, 0, -127, 127)


def test_dynamic_quantization():
    """Expected: dynamic_quant.json (torch.ao.quantization.quantize_dynamic, qnnpack): integers exact, output close."""
    case = vector("dynamic_quant")
    w_OI, x = tensor(case["weight"]), tensor(case["x"])
    weight = weight_quantizer({"method": "dynamic", "bits": 8}, tuple(w_OI.shape))
    weight.init_from_weight_(w_OI)
    integers = weight.export(w_OI)
    assert integers.q_OI.tolist() == case["weight_q"]
    close(integers.scale_O1[0, 0], case["weight_scale"])
    inputs = input_quantizer({"method": "dynamic", "bits": 8})
    inputs.finish_calibration_()
    step, z = affine_step(*x.aminmax(), 8)
    close(step, case["x_scale"])
    assert -int(z) == case["x_zero_point"]
    assert torch.equal((inputs(x) / step).round() - z, tensor(case["x_q"]).float())
    close(inputs(x) @ weight(w_OI).T + tensor(case["bias"]), case["y_qnnpack"])
    levels = inputs.export()
    assert (levels.kind, levels.scale, levels.zero_point, levels.qmin, levels.qmax) == ("dynamic", None, None, 0, 255)


def test_sawb_full_range_gradient_clipped():
    """Expected: by hand from D.1: g where |w| <= alpha, else 0, in the full-range form too."""
    w_GRI = tensor([[[0.5, -1.0, 1.0, 1.5, -2.0]]]).requires_grad_()
    sawb_fake_quantize(w_GRI, tensor([[[1.0]]]), 2, "full-range", "clipped").sum().backward()
    assert w_GRI.grad.flatten().tolist() == [1, 1, 1, 0, 0]
