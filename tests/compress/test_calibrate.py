"""Calibration of every quantizer: what needs data and what does not, attention maps, and what is refused."""

import pytest
import torch
from squeezoo.compress.attach import (
    compressed_weights,
    fold_,
    latent_OI,
    quantizers,
)
from squeezoo.compress.calibrate import CalibrationError, calibrate_
from squeezoo.compress.quantizers import (
    DynamicQuantizer,
)
from squeezoo.models.dense import logits
from systems import MAPS, SYSTEMS, attached, outputs
from tiny import ALL, tiny_batch


@pytest.fixture(params=list(SYSTEMS))
def system(request):
    return SYSTEMS[request.param]


def test_dynamic_quantization_needs_no_batches():
    model, _ = attached("bert", *SYSTEMS["dynamic"], sparsity=None, roles=("block", "pooler", "final"))
    assert calibrate_(model, []) == {}
    found = [type(q) for _, q in quantizers(model)]
    assert found.count(DynamicQuantizer) == len({n for n, _ in quantizers(model) if n.endswith("input_quantizer")})
    assert all(q.active for _, q in quantizers(model))
    assert {"bert.pooler.dense", "classifier"} <= {n for n, *_ in compressed_weights(model)}
    assert (outputs(model, "bert") - outputs(ALL["bert"](), "bert")).abs().max() < 0.1


def test_weights_alone_need_no_batches():
    for method in ("sawb", "q8bert", "absmax", "lsq"):
        model, _ = attached("bert", {"method": method}, None, sparsity=None)
        assert calibrate_(model, []) == {}
        assert all(q.active for _, q in quantizers(model))


def test_weights_rounded_while_pruning_keep_their_scales():
    """SparseGPT's joint mode: the scales of the dense weight, not of what is left after pruning."""
    model, _ = attached("bert", {"method": "lsq"}, {"method": "lsq"})
    scales = {}
    for n, module, parametrization in compressed_weights(model):
        w_OI = latent_OI(module, parametrization)
        parametrization.quantizer.rounder(w_OI)
        scales[n] = parametrization.quantizer.scale.detach().clone()
        with torch.no_grad():
            w_OI.mul_(0.5)
    calibrate_(model, [tiny_batch("bert")], keep_weights=True)
    for n, _, parametrization in compressed_weights(model):
        assert parametrization.quantizer.active
        assert torch.equal(parametrization.quantizer.scale, scales[n])
    calibrate_(model, [tiny_batch("bert")])
    for n, _, parametrization in compressed_weights(model):
        torch.testing.assert_close(parametrization.quantizer.scale.detach(), 0.5 * scales[n])


def test_calibration_says_what_is_missing(system):
    model, _ = attached("bert", *system)
    if system[1] is not None and system[1]["method"] != "dynamic":
        with pytest.raises(CalibrationError, match=r"at least one batch.*input of bert\.encoder\.layer\.0"):
            calibrate_(model, [])
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.parametrizations["weight"].original[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"layer\.1\.output\.dense|calibration batch 0: .*NaN"):
        calibrate_(model, [tiny_batch("bert")])
    assert not any(q.active or q.observing for _, q in quantizers(model))


def test_nan_in_a_later_batch_names_module_and_batch():
    model, _ = attached("bert", *SYSTEMS["deepcomp-int4"], attention=MAPS)
    good = tiny_batch("bert")

    def call(model, batch):
        if batch is not good:
            with torch.no_grad():
                model.bert.encoder.layer[1].attention.self.value.bias.fill_(float("nan"))
        return logits(model, batch)

    with pytest.raises(CalibrationError, match=r"v of .*layer\.1\.attention.*, calibration batch 1: .*NaN"):
        calibrate_(model, [good, dict(good)], call=call)
    assert not any(q.active or q.observing for _, q in quantizers(model))
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.value.bias.fill_(0.0)
    calibrate_(model, [good])
    assert all(q.active for _, q in quantizers(model))


def test_a_module_that_no_batch_reaches_is_named():
    model, _ = attached("bert", *SYSTEMS["deepcomp-int8"], roles=("block", "final"))
    with pytest.raises(CalibrationError, match="input of classifier was not reached in 1 calibration batches"):
        calibrate_(model, [tiny_batch("bert")], call=lambda model, batch: model.bert(batch["input_ids"]))
    assert not any(q.active or q.observing for _, q in quantizers(model))


def test_attention_maps_are_calibrated_with_the_rest():
    """Each quantizer of Q, K, P and V gets its range from the map itself; P is a probability."""
    model, plan = attached("bert", *SYSTEMS["deepcomp-int8"], sparsity=None, attention=MAPS)
    scales = calibrate_(model, [tiny_batch("bert")])
    assert len(plan.attention) == 2
    names = [f"{site.name}.attention_map.{side}" for site in plan.attention for side in "qkpv"]
    assert set(names) < set(scales)
    found = dict(quantizers(model))
    for name in names:
        assert found[name].active
        if name.endswith(".p"):
            assert found[name].low.item() >= 0
            assert found[name].high.item() <= 1
    assert not torch.equal(outputs(model, "bert"), outputs(ALL["bert"](), "bert"))
    fold_(model)
    assert model.state_dict().keys() == ALL["bert"]().state_dict().keys()
