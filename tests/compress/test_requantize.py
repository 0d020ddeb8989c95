"""One attached model from one plan's quantizers to another's."""

import pytest
import torch
from squeezoo.compress.attach import (
    PlanError,
    compressed_weights,
    latent_OI,
    prune_,
    quantizers,
    requantize_,
)
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.plan import make_plan
from squeezoo.compress.quantizers import (
    LsqQuantizer,
    PactQuantizer,
    SawbQuantizer,
)
from systems import MAPS, SYSTEMS, attached, outputs, ready, recipe
from tiny import ALL, tiny_batch


@pytest.fixture(params=["bert", "timm_vit", "gpt2"])
def name(request):
    return request.param


def test_from_int8_to_int4_masks_and_latent_weights_stay(name):
    """Deep Compression's chain: new quantizers start inactive, what is the same stays as it is."""
    model, _ = ready(name, *SYSTEMS["deepcomp-int8"])
    before = {n: (latent_OI(m, p).clone(), p.mask_OI.clone()) for n, m, p in compressed_weights(model)}
    four = make_plan(ALL[name](), recipe(*SYSTEMS["deepcomp-int4"]))
    requantize_(model, four)
    assert all(isinstance(p.quantizer, SawbQuantizer) and p.quantizer.bits == 4 for *_, p in compressed_weights(model))
    assert not any(q.active for _, q in quantizers(model))
    kinds = {type(q) for n, q in quantizers(model) if n.endswith("input_quantizer")}
    assert kinds == {PactQuantizer}
    for n, module, parametrization in compressed_weights(model):
        assert torch.equal(latent_OI(module, parametrization), before[n][0])
        assert torch.equal(parametrization.mask_OI, before[n][1])
    calibrate_(model, [tiny_batch(name)])
    direct, _ = attached(name, *SYSTEMS["deepcomp-int4"])
    prune_(direct)
    calibrate_(direct, [tiny_batch(name)])
    assert torch.equal(outputs(model, name), outputs(direct, name))
    same = [q for _, q in quantizers(model)]
    requantize_(model, four)
    assert all(a is b for a, (_, b) in zip(same, quantizers(model), strict=True))
    assert all(q.active for q in same)


def test_requantizing_attention_maps_and_inputs_alone():
    model, _ = ready("bert", {"method": "lsq"}, {"method": "minmax"}, attention=MAPS)
    weights = [p.quantizer for *_, p in compressed_weights(model)]
    more = {"attention": MAPS | {"p": {"method": "minmax", "bits": 4}}}
    requantize_(model, make_plan(ALL["bert"](), recipe({"method": "lsq"}, None, **more)))
    assert [p.quantizer for *_, p in compressed_weights(model)] == weights
    found = dict(quantizers(model))
    assert not any(n.endswith("input_quantizer") for n in found)
    changed = [n for n, q in found.items() if not q.active]
    assert len(changed) == 2
    assert all(n.endswith("attention_map.p") and found[n].bits == 4 for n in changed)
    assert isinstance(next(q for n, q in found.items() if n.endswith(".v")), LsqQuantizer)


def test_a_plan_of_something_else_replaces_nothing():
    model, _ = ready("bert", *SYSTEMS["deepcomp-int8"])
    before = [q for _, q in quantizers(model)]
    for other, text in (
        (recipe(*SYSTEMS["deepcomp-int4"], roles=("ffn_up",)), "other GEMMs than are attached"),
        (recipe(*SYSTEMS["deepcomp-int4"], sparsity="1:4"), "attached with sparsity 2:4, the plan has 1:4"),
        (recipe(*SYSTEMS["deepcomp-int4"], attention=MAPS), "other attention maps"),
        (recipe(*SYSTEMS["deepcomp-int4"], embeddings={"method": "q8bert"}), "other embedding tables"),
    ):
        with pytest.raises(PlanError, match=text):
            requantize_(model, make_plan(ALL["bert"](), other))
    assert all(a is b for a, (_, b) in zip(before, quantizers(model), strict=True))
