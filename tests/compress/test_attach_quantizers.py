"""Attached models with every quantizer: training, saving, folding, shared inputs, embedding tables."""

import copy

import pytest
import torch
from squeezoo.compress.attach import (
    attach_,
    compressed_weights,
    fold_,
    latent_OI,
    parameters_without_decay,
    quantized_tables,
    quantizers,
)
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.quantizers import (
    LsqQuantizer,
    MinMaxQuantizer,
    PactQuantizer,
    SawbQuantizer,
)
from squeezoo.models.dense import logits
from systems import MAPS, SYSTEMS, attached, outputs, ready
from tiny import ALL, tiny_batch, tiny_loss


@pytest.fixture(params=list(SYSTEMS))
def system(request):
    return SYSTEMS[request.param]


@pytest.fixture(params=["bert", "timm_vit", "gpt2"])
def name(request):
    return request.param


def test_attached_is_the_original_until_calibrated_and_close_to_it_afterwards(name, system):
    original = outputs(ALL[name](), name)
    model, _ = attached(name, *system, sparsity=None)
    torch.testing.assert_close(outputs(model, name), original, atol=1e-5, rtol=0)
    calibrate_(model, [tiny_batch(name)])
    quantized = outputs(model, name)
    assert not torch.equal(quantized, original)
    four_bits = system[0].get("bits") == 4
    assert (quantized - original).norm() < (0.7 if four_bits else 0.1) * original.norm()


def test_training_keeps_zeros_patterns_and_gives_every_parameter_a_gradient(name, system):
    """Quantize first, then mask (D.5): pruned weights stay zero whatever the quantizer does."""
    model, plan = ready(name, *system)
    model.train()
    tiny_loss(model, name, tiny_batch(name)).backward()
    learned = dict(model.named_parameters())
    for parameter in parameters_without_decay(model):
        assert learned[parameter].grad is not None, parameter
    for gemm_name, module, parametrization in compressed_weights(model):
        gradient = module.parametrizations["weight"].original.grad
        gradient = gradient.t() if parametrization.transposed else gradient
        assert not gradient[~parametrization.mask_OI].any(), gemm_name
        assert gradient.any(), gemm_name
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    for _, module, parametrization in compressed_weights(model):
        weight = module.weight.t() if parametrization.transposed else module.weight
        assert check_nm(weight, Pattern(2, 4))
    assert len(plan.gemms) == len(list(compressed_weights(model)))


def test_a_state_dict_restores_the_model(name, system):
    model, plan = ready(name, *system)
    fresh = ALL[name]()
    attach_(fresh, plan)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh, name), outputs(model, name))


def test_folding_keeps_the_quantized_weights_and_the_original_keys(name, system):
    original, (model, _) = ALL[name](), ready(name, *system)
    expected = {n: module.weight.detach().clone() for n, module, _ in compressed_weights(model)}
    twin = copy.deepcopy(model)
    fold_(twin)
    fold_(model)
    for folded in (model, twin):
        assert folded.state_dict().keys() == original.state_dict().keys()
        assert [type(m) for m in folded.modules()] == [type(m) for m in original.modules()]
        assert all(torch.equal(dict(folded.named_modules())[n].weight, w) for n, w in expected.items())
        assert not any(m._forward_pre_hooks for m in folded.modules())


def test_exported_integers_are_the_attached_weights(name, system):
    """Masked integers times scale are what the forward pass multiplies with, bit for bit."""
    model, _ = ready(name, *system)
    for _, module, parametrization in compressed_weights(model):
        found = parametrization.quantizer.export(latent_OI(module, parametrization))
        used = module.weight.t() if parametrization.transposed else module.weight
        assert torch.equal(found.q_OI * parametrization.mask_OI * found.scale_O1, used.detach())


def test_per_tensor_quantizers_see_three_parts_of_a_fused_matrix():
    """A.3: with Q, K and V of very different sizes a single scale would crush the smallest."""
    model, _ = attached("timm_vit", *SYSTEMS["deepcomp-int4"])
    weight = next(p for n, _, p in compressed_weights(model) if n.endswith("qkv"))
    assert isinstance(weight.quantizer, SawbQuantizer)
    assert weight.quantizer.groups == 3
    assert all(p.quantizer.groups == 1 for n, _, p in compressed_weights(model) if not n.endswith("qkv"))


def test_a_shared_input_is_counted_once_a_step():
    """Q, K and V read one tensor: its running range moves once per step (D.2), not three times."""
    model, _ = ready("bert", *SYSTEMS["deepcomp-int8"])
    query = model.bert.encoder.layer[0].attention.self.query
    quantizer = query.input_quantizer
    seen = []
    query.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    before = quantizer.high.item()
    with torch.no_grad():
        logits(model.train(), tiny_batch("bert", seed=5))
    # the hook runs after the quantizer's: it sees rounded values, whose largest is that of the batch to half a step
    expected = 0.9 * before + 0.1 * seen[0].max().item()
    assert quantizer.high.item() == pytest.approx(expected, abs=0.1 * quantizer.export().scale)


@pytest.mark.parametrize("inputs", [{"method": "lsq"}, {"method": "minmax"}, {"method": "pact", "bits": 4}])
def test_a_shared_input_is_rounded_once_in_training(monkeypatch, inputs):
    """Q, K and V get the very same tensor; values and gradients are those of three separate roundings."""
    model, _ = ready("bert", {"method": "lsq"}, inputs)
    alone = copy.deepcopy(model.train())
    calls = []
    for m, shares in ((model, True), (alone, False)):
        tiny = tiny_batch("bert", seed=5)
        if not shares:
            for _, q in quantizers(m):
                q.follow = lambda x, q=q: q.fake_quantize(x, update=False)
        for n, q in quantizers(m):
            if n.endswith("input_quantizer"):
                original = q.fake_quantize
                monkeypatch.setattr(q, "fake_quantize", lambda *a, f=original, **k: (calls.append(1), f(*a, **k))[1])
        torch.manual_seed(0)
        tiny_loss(m, "bert", tiny).backward()
        assert len(calls) == (2 * 4 if shares else 2 * 4 + 2 * 6)
    for (n, a), (_, b) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=n)


def test_evaluation_of_a_fresh_attachment_moves_no_range():
    """New modules are in training mode; attached to a model in evaluation mode they must not be."""
    model, _ = ready("bert", *SYSTEMS["deepcomp-int8"], attention=MAPS)
    assert not any(q.training for _, q in quantizers(model))
    before = copy.deepcopy(model.state_dict())
    outputs(model, "bert")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_q8bert_trains_its_embedding_tables():
    """Per table one scale (D.7): at most 255 different values, exactly the integers times the scale; then folded."""
    original = ALL["bert"]()
    model, _ = ready("bert", *SYSTEMS["q8bert"], sparsity=None, embeddings={"method": "q8bert"})
    tables = list(quantized_tables(model))
    assert [n for n, *_ in tables] == [n for n, m in original.named_modules() if isinstance(m, torch.nn.Embedding)]
    for _, module, table in tables:
        found = table.quantizer.export(module.parametrizations["weight"].original)
        assert torch.equal(found.q_OI * found.scale_O1, module.weight.detach())
        assert len(found.scale_O1.unique()) == 1
    tiny_loss(model, "bert", tiny_batch("bert")).backward()
    assert tables[0][1].parametrizations["weight"].original.grad.any()
    quantized = tables[0][1].weight.detach().clone()
    twin = copy.deepcopy(model)
    fold_(model)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, quantized)
    assert model.state_dict().keys() == original.state_dict().keys()
    assert torch.equal(twin.bert.embeddings.word_embeddings.weight, quantized)


def test_absmax_embeddings_are_only_stored_that_way():
    model, plan = attached("bert", *SYSTEMS["q8bert"], sparsity=None, embeddings={"method": "absmax"})
    assert plan.embeddings
    assert not list(quantized_tables(model))


def test_learned_clip_values_get_no_weight_decay():
    model, _ = ready("bert", {"method": "sawb", "bits": 4}, {"method": "pact", "bits": 4}, attention=MAPS)
    names = parameters_without_decay(model)
    assert set(names) <= {n for n, _ in model.named_parameters()}
    owners = len([q for _, q in quantizers(model) if isinstance(q, PactQuantizer)])
    learned_maps = len([q for _, q in quantizers(model) if isinstance(q, LsqQuantizer)])
    assert len(names) == 2 * owners + learned_maps
    assert not any(isinstance(q, MinMaxQuantizer) and list(q.parameters()) for _, q in quantizers(model))
