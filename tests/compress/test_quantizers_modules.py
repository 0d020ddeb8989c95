"""What holds for every quantizer: on and off, state dicts, calibration, export equal to the forward pass, bad input."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezoo.compress.quantizers import (
    AbsmaxQuantizer,
    DynamicQuantizer,
    LsqQuantizer,
    MinMaxQuantizer,
    ObservationError,
    PactQuantizer,
    Q8BertQuantizer,
    SawbQuantizer,
    input_quantizer,
    map_quantizer,
    sawb_alpha,
    sawb_coefficients,
    weight_quantizer,
)
from squeezoo.compress.quantizers.ranks import value_of_rank
from squeezoo.compress.rules import Rule
from torch import tensor

WEIGHTS = {
    "lsq": {"method": "lsq", "bits": 8},
    "absmax": {"method": "absmax", "bits": 8},
    "sawb8": {"method": "sawb", "bits": 8},
    "sawb4": {"method": "sawb", "bits": 4},
    "sawb2": {"method": "sawb", "bits": 2, "granularity": "channel"},
    "sawb5_own": {"method": "sawb", "bits": 5, "fit": "own"},
    "q8bert": {"method": "q8bert", "bits": 8},
    "dynamic": {"method": "dynamic", "bits": 8},
}
INPUTS = {
    "lsq": {"method": "lsq", "bits": 8},
    "minmax8": {"method": "minmax", "bits": 8},
    "minmax4": {"method": "minmax", "bits": 4},
    "pact4": {"method": "pact", "bits": 4},
    "pact_plus": {"method": "pact", "bits": 4, "plus": True},
    "q8bert": {"method": "q8bert", "bits": 8},
    "q8bert_dynamic": {"method": "q8bert", "bits": 8, "dynamic": True},
    "dynamic": {"method": "dynamic", "bits": 8},
}
weights = pytest.mark.parametrize("name", WEIGHTS)
inputs = pytest.mark.parametrize("name", INPUTS)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ready_weight(name, w_OI, parts=1):
    quantizer = weight_quantizer(WEIGHTS[name], tuple(w_OI.shape), parts)
    quantizer.init_from_weight_(w_OI)
    return quantizer


def ready_input(name, *batches, percentile=None):
    quantizer = input_quantizer(INPUTS[name])
    quantizer.start_observing_(percentile)
    for batch in batches:
        assert quantizer(batch) is batch
    quantizer.finish_calibration_()
    return quantizer


@weights
def test_integers_times_scale_are_the_fake_quantized_weight(name):
    """Expected: exact equality in float32; levels within the bits; one scale per row."""
    w_OI = draw(12, 20)
    w_OI[3] = 0.0
    quantizer = ready_weight(name, w_OI)
    found = quantizer.export(w_OI)
    assert (found.q_OI.dtype, found.scale_O1.dtype) == (torch.int8, torch.float32)
    assert found.scale_O1.shape == (12, 1)
    assert torch.equal(found.q_OI * found.scale_O1, quantizer(w_OI).detach())
    assert int(found.q_OI.max()) <= 2 ** (quantizer.bits - 1) - 1
    assert int(found.q_OI.min()) >= -(2 ** (quantizer.bits - 1))
    assert not found.q_OI[3].any()


@inputs
def test_exported_levels_reproduce_the_fake_quantized_input(name):
    """Expected: (q - zero_point) * scale with q clamped to qmin..qmax is the forward pass in evaluation mode."""
    x = draw(6, 10, 16) * 2 + 0.5
    quantizer = ready_input(name, x[:3], x[3:]).eval()
    levels, out = quantizer.export(), quantizer(x)
    scale, zero_point = levels.scale, levels.zero_point
    if levels.kind == "dynamic":
        assert scale is None
        if zero_point == 0:
            scale = float(x.abs().max() / levels.qmax)
        else:
            scale = float((x.max() - x.min()) / 255)
            zero_point = -round(float(x.min()) / scale)
    q = (x / scale).round().add(zero_point).clamp(levels.qmin, levels.qmax)
    torch.testing.assert_close((q - zero_point) * scale, out.detach(), rtol=1e-6, atol=1e-6)
    assert levels.qmax - levels.qmin <= 2**levels.bits - 1
    assert levels.bits == quantizer.bits


@inputs
def test_zero_stays_exactly_zero(name):
    """Masked probabilities and padding must not turn into values (C.2, D.2)."""
    x = draw(4, 32).abs() + 0.3
    x[:, ::2] = 0.0
    quantizer = ready_input(name, x)
    for mode in (True, False):
        assert not quantizer.train(mode)(x)[:, ::2].any()


@weights
def test_fused_parts_equal_separate_matrices(name):
    """A.3: the Q, K and V row slices of a fused matrix are three tensors for a per-tensor quantizer."""
    parts = [draw(8, 16, seed=k) * (k + 1) for k in range(3)]
    fused_OI = torch.cat(parts)
    fused = ready_weight(name, fused_OI, parts=3)
    separate = [ready_weight(name, part) for part in parts]
    pairs = [(quantizer, part) for quantizer, part in zip(separate, parts, strict=True)]
    assert torch.equal(fused(fused_OI), torch.cat([quantizer(part) for quantizer, part in pairs]))
    exported = [quantizer.export(part) for quantizer, part in pairs]
    assert torch.equal(fused.export(fused_OI).q_OI, torch.cat([e.q_OI for e in exported]))
    assert torch.equal(fused.export(fused_OI).scale_O1, torch.cat([e.scale_O1 for e in exported]))


@weights
def test_a_transposed_weight_gives_the_same(name):
    """Conv1D stores [in, out]; its view as [out, in] has other strides, so sums may differ in their last bit."""
    w_OI = draw(9, 14)
    stored_IO = w_OI.t().contiguous()
    quantizer = ready_weight(name, w_OI)
    torch.testing.assert_close(quantizer(stored_IO.t()), quantizer(w_OI), rtol=1e-6, atol=1e-8)


def all_quantizers():
    made = {f"weight {name}": ready_weight(name, draw(6, 8)) for name in WEIGHTS}
    return made | {f"input {name}": ready_input(name, draw(6, 8)) for name in INPUTS}


def test_a_state_dict_tells_whether_it_was_calibrated():
    """A fresh quantizer that loads a calibrated state is active and computes the same; the other way round too."""
    x = draw(6, 8)
    for name, quantizer in all_quantizers().items():
        side, _, key = name.partition(" ")
        fresh = weight_quantizer(WEIGHTS[key], (6, 8)) if side == "weight" else input_quantizer(INPUTS[key])
        empty = copy.deepcopy(fresh.state_dict())
        assert fresh(x) is x, name
        fresh.load_state_dict(quantizer.state_dict())
        assert fresh.active, name
        assert torch.equal(fresh.eval()(x), quantizer.eval()(x)), name
        assert all(isinstance(value, torch.Tensor) for value in quantizer.state_dict().values()), name  # safetensors
        fresh.load_state_dict(empty)
        assert not fresh.active, name
        assert fresh(x) is x, name


def test_a_copy_is_independent_and_computes_the_same():
    x = draw(6, 8)
    for name, quantizer in all_quantizers().items():
        twin = copy.deepcopy(quantizer.eval())
        before = quantizer(x).detach()
        assert torch.equal(twin(x), before), name
        for tensor_ in (*twin.parameters(), *twin.buffers()):
            tensor_.data.zero_()
        twin.active = False
        assert torch.equal(quantizer(x).detach(), before), name


def test_half_precision_is_computed_in_float32_under_autocast():
    """Expected: the float32 result, cast once to the type that came in."""
    wide = draw(6, 8)
    for name, quantizer in all_quantizers().items():
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            x = wide.to(dtype)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = quantizer.eval()(x)
            assert out.dtype == dtype, name
            if dtype != torch.float64:
                assert torch.equal(out, quantizer(x.float()).to(dtype)), name


def test_torch_compile_runs_every_quantizer():
    x = draw(6, 8)
    for name, quantizer in all_quantizers().items():
        torch.compiler.reset()
        quantizer.eval()
        compiled = torch.compile(lambda x, q=quantizer: q(x), backend="eager")
        assert torch.equal(compiled(x), quantizer(x)), name


@weights
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_refused(name, bad):
    w_OI = draw(6, 8)
    w_OI[1, 2] = bad
    quantizer = weight_quantizer(WEIGHTS[name], (6, 8))
    with pytest.raises(ValueError, match=r"NaN|infinity|found inf"):
        quantizer.init_from_weight_(w_OI)
    assert not quantizer.active
    good = ready_weight(name, draw(6, 8))
    w_OI[1, 2] = math.nan
    with pytest.raises(ValueError, match="found 1 NaN of 48"):
        good.export(w_OI)


@pytest.mark.parametrize("name", [n for n in INPUTS if "dynamic" not in n])
def test_bad_calibration_input_names_what_was_found_and_is_forgotten(name):
    """Expected: the error knows its quantizer; what was observed before stays until the calibration is given up."""
    quantizer = input_quantizer(INPUTS[name])
    assert quantizer.needs_batches
    quantizer.start_observing_()
    quantizer(tensor([1.0, -2.0]))
    for values, text in (([math.nan, 1.0], "found 1 NaN of 2"), ([math.inf, 1.0], "found infinity"), ([], "empty")):
        with pytest.raises(ObservationError, match=text) as caught:
            quantizer(tensor(values))
        assert caught.value.quantizer is quantizer
    quantizer.stop_observing_()
    with pytest.raises(RuntimeError, match="at least one calibration batch"):
        quantizer.finish_calibration_()
    assert not quantizer.active


@pytest.mark.parametrize("name", ["dynamic", "q8bert_dynamic"])
def test_dynamic_inputs_need_no_data(name):
    quantizer = input_quantizer(INPUTS[name])
    assert not quantizer.needs_batches
    quantizer.finish_calibration_()
    x = draw(3, 7)
    assert (quantizer(x) - x).abs().max() <= (x.max() - x.min()) / 254 * 1.01


def test_nothing_is_exported_before_calibration():
    with pytest.raises(RuntimeError, match="never calibrated"):
        weight_quantizer(WEIGHTS["sawb4"], (4, 8)).export(draw(4, 8))
    with pytest.raises(RuntimeError, match="never calibrated"):
        input_quantizer(INPUTS["minmax8"]).export()
    with pytest.raises(TypeError, match="MinMaxQuantizer does not quantize weights"):
        ready_input("minmax8", draw(2, 2)).export(draw(4, 8))
    with pytest.raises(TypeError, match="SawbQuantizer does not quantize inputs"):
        ready_weight("sawb4", draw(4, 8)).export()


def test_full_range_sawb_exports_no_integers():
    quantizer = weight_quantizer({"method": "sawb", "bits": 4, "levels": "full-range"}, (4, 8))
    quantizer.init_from_weight_(draw(4, 8))
    assert not (quantizer(draw(4, 8)) == 0).any()
    assert not quantizer(torch.zeros(4, 8)).any()
    with pytest.raises(ValueError, match=r"no zero level.*write `levels: zero-aligned`"):
        quantizer.export(draw(4, 8))


@pytest.mark.parametrize("levels", ["zero-aligned", "full-range"])
def test_bits_without_published_coefficients_say_what_is_used(levels):
    """Expected: D.1's table. max|w| with a note, or our own fit when asked for. Nothing warns: the plan tells it."""
    published = {"zero-aligned": {2, 4, 7, 8}, "full-range": {2, 3, 4, 5, 8}}[levels]
    for bits in range(2, 9):
        record = {"method": "sawb", "bits": bits, "levels": levels}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantizer = weight_quantizer(record, (4, 8))
        w_GRI = draw(1, 4, 8)
        alpha = sawb_alpha(w_GRI, quantizer.coefficients).item()
        if bits in published:
            assert quantizer.note == ""
        else:
            assert f"{bits} bits, {levels}: the clip value is max|w|" in quantizer.note
            assert "write `fit: own`" in quantizer.note
            assert quantizer.note in repr(quantizer)
            assert alpha == w_GRI.abs().max().item()
        own = weight_quantizer(record | {"fit": "own"}, (4, 8))
        assert own.coefficients is not None
        assert own.note == ""
        assert (own.coefficients == quantizer.coefficients) == (bits in published)


@pytest.mark.parametrize(("bits", "levels"), [(3, "zero-aligned"), (5, "zero-aligned"), (6, "zero-aligned"),
                                              (6, "full-range"), (7, "full-range")])  # fmt: skip
def test_our_own_fits_come_close_to_the_best_clip_value(bits, levels):
    """Expected: on Gaussian weights a squared error at most 35 % above that of the best clip value (grid search);
    one line serves six distributions, so it is not the best for any of them."""
    from squeezoo.compress.quantizers import sawb_fake_quantize

    w_GRI = draw(1, 100, 300)

    def error(alpha):
        return (sawb_fake_quantize(w_GRI, alpha, bits, levels) - w_GRI).square().mean().item()

    best = min(error(torch.full((1, 1, 1), 0.1 * k)) for k in range(10, 55))
    assert error(sawb_alpha(w_GRI, sawb_coefficients(bits, levels, "own"))) < 1.35 * best


def test_sawb_follows_the_weight_while_it_trains():
    """The clip value is recomputed at each step; the exported one is that of the final weights."""
    w_OI = draw(8, 16)
    quantizer = ready_weight("sawb4", w_OI)
    assert torch.equal(quantizer(2 * w_OI), 2 * quantizer(w_OI))
    assert torch.equal(quantizer.export(2 * w_OI).q_OI, quantizer.export(w_OI).q_OI)


def test_minmax_in_training_takes_the_batch_and_in_evaluation_the_running_range():
    quantizer = ready_input("minmax8", tensor([-1.0, 1.0]))
    wide = tensor([-4.0, 0.0, 4.0])
    assert torch.equal(quantizer.train()(wide).sign(), wide.sign())
    assert quantizer(wide).abs().max() > 3.9
    low, high = quantizer.low.item(), quantizer.high.item()
    assert low == pytest.approx(-(0.9 * (0.9 + 0.4) + 0.4))  # two steps: 1 -> 1.3 -> 1.57
    clipped = quantizer.eval()(wide)
    assert clipped.abs().max() == pytest.approx(high, rel=0.02)
    assert (quantizer.low.item(), quantizer.high.item()) == (low, high)
    quantizer.train().follow(wide)
    assert (quantizer.low.item(), quantizer.high.item()) == (low, high)


def test_percentiles_leave_the_outliers_out():
    """Expected: by hand on -50..50: by rank 99 % of |x| is 50 (of 101 values), of either end the second value."""
    x = torch.arange(-50.0, 51.0)
    assert ready_input("q8bert", x, percentile=90).peak.item() == 45
    minmax = ready_input("minmax8", x, percentile=99)
    assert (minmax.low.item(), minmax.high.item()) == (-49, 49)


@pytest.mark.parametrize("name", ["pact4", "pact_plus"])
def test_pact_keeps_its_clip_values_in_range(name):
    """D.3: alpha >= 1e-6 and alpha_n <= 0; a positive percentile becomes 0; a gradient flows at the border too."""
    quantizer = ready_input(name, draw(8, 8).abs() + 1)
    assert quantizer.alpha_n.item() == 0
    with torch.no_grad():
        quantizer.alpha.fill_(-3.0)
        quantizer.alpha_n.fill_(2.0)
    out = quantizer(tensor([1.0, -1.0]))
    assert out.abs().max() <= 1e-6
    out.sum().backward()
    assert quantizer.alpha.grad.item() == pytest.approx(1.0)
    assert quantizer.alpha_n.grad.item() == pytest.approx(1.0)
    quantizer.clamp_()
    assert quantizer.alpha.item() == pytest.approx(1e-6)
    assert quantizer.alpha_n.item() == 0


@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_pact_gradients_follow_the_equations(bits, plus, seed):
    """Expected: D.3 written out entry by entry in float64."""
    from squeezoo.compress.quantizers import pact_fake_quantize

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    alpha = torch.rand((), generator=generator, dtype=torch.float64) + 0.1
    alpha_n = -torch.rand((), generator=generator, dtype=torch.float64)
    x[0, :2] = torch.stack([alpha, alpha_n])  # the borders count as clipped
    g = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, alpha, alpha_n)]
    out = pact_fake_quantize(*leaves, bits, plus)
    n = 2**bits - 1
    step = (alpha - alpha_n) / n
    z = (alpha_n / step).round()
    expected = (((x.clamp(alpha_n, alpha) / step).round() - z).clamp(0, n) + z) * step
    inside = (x > alpha_n) & (x < alpha)
    d_alpha, d_alpha_n = g[x >= alpha].sum(), g[x <= alpha_n].sum()
    if plus:
        v = (x - alpha_n) / step
        term = (((v - v.round()) / n) * g)[inside].sum()
        d_alpha, d_alpha_n = d_alpha - term, d_alpha_n + term
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for found, wanted in zip(torch.autograd.grad(out, leaves, g), (torch.where(inside, g, 0), d_alpha, d_alpha_n)):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@given(st.integers(2, 8), st.integers(0, 2**31), st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_minmax_rounds_to_the_nearest_level(bits, seed, shift):
    """Expected: half a step of error at most, one step at the ends (the zero level is rounded)."""
    from squeezoo.compress.quantizers import affine_step, minmax_fake_quantize

    x = draw(50, seed=seed % 2**31) + shift
    low, high = x.aminmax()
    step, _ = affine_step(low, high, bits)
    out = minmax_fake_quantize(x, low, high, bits)
    assert (out - x).abs().max() <= step * 1.001
    assert len((out / step).round().unique()) <= 2**bits


@given(st.integers(1, 10**6), st.integers(0, 2**31), st.booleans())
@settings(max_examples=15, deadline=None)
def test_the_fast_rank_is_the_exact_rank(place, seed, ties):
    """Expected: torch.kthvalue; with many equal values and at any rank."""
    x = draw(100_000, seed=seed)
    x = (x * 3).round() if ties else x
    rank = 1 + place % x.numel()
    assert value_of_rank(x, rank).item() == x.kthvalue(rank).values.item()


@weights
def test_a_rounder_rounds_columns_to_the_levels_of_the_dense_weight(name):
    """SparseGPT's joint mode: scales from the dense weight, then column by column."""
    w_OI = draw(6, 8)
    quantizer = weight_quantizer(WEIGHTS[name], (6, 8))
    round_column = quantizer.rounder(w_OI)
    assert quantizer.active
    columns = torch.stack([round_column(w_OI[:, j], j) for j in range(8)], 1)
    torch.testing.assert_close(columns, quantizer(w_OI).detach(), rtol=1e-6, atol=1e-7)


def test_factories_refuse_what_a_side_does_not_have():
    with pytest.raises(ValueError, match="no weight quantizer 'pact'; known: lsq, absmax, sawb, q8bert, dynamic"):
        weight_quantizer({"method": "pact", "bits": 4}, (4, 4))
    with pytest.raises(ValueError, match="no input quantizer 'sawb'; known: lsq, minmax, pact, q8bert, dynamic"):
        input_quantizer({"method": "sawb", "bits": 4})
    with pytest.raises(ValueError, match="no attention map quantizer of p 'dynamic'; known: lsq, minmax, pact"):
        map_quantizer({"method": "dynamic", "bits": 8}, "p")
    with pytest.raises(ValueError, match="3 parts share evenly, found 8"):
        weight_quantizer(WEIGHTS["sawb4"], (8, 4), parts=3)
    for kind in (AbsmaxQuantizer, SawbQuantizer):
        with pytest.raises(ValueError, match="2 to 8 bits"):
            kind(9, 1)
    for kind in (MinMaxQuantizer, PactQuantizer, Q8BertQuantizer, LsqQuantizer):
        with pytest.raises(ValueError, match="2 to 8 bits"):
            kind(1)
    with pytest.raises(ValueError, match="dynamic quantization has 8 bits, found 4"):
        DynamicQuantizer(4)


def test_the_recipe_s_records_make_quantizers():
    """Every record that a recipe can hold is understood, with all its options."""
    for method in ("lsq", "absmax", "sawb", "q8bert"):
        rule = Rule(roles=("q",), weight={"method": method})
        made = weight_quantizer(rule.weight.model_dump(mode="json"), (4, 8))
        assert made.record == rule.weight.model_dump(mode="json")
    for method in ("lsq", "minmax", "pact", "q8bert"):
        rule = Rule(roles=("q",), weight={"method": "lsq"}, input={"method": method})
        made = input_quantizer(rule.input.model_dump(mode="json"))
        assert made.record == rule.input.model_dump(mode="json")
    rule = Rule(roles=("q",), weight={"method": "dynamic"}, input={"method": "dynamic"})
    assert isinstance(input_quantizer(rule.input.model_dump(mode="json")), DynamicQuantizer)
    assert weight_quantizer(rule.weight.model_dump(mode="json"), (4, 8)).lowest == -128
