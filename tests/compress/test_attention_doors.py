"""Attaching N:M attention maps to transformers' and timm's models, and taking them off again."""

import inspect

import pytest
import torch
from maps import Level, Spec, level, make_sharp, make_sparse, slow_keep, specs
from squeezoo.compress.attention_doors import attach_attention_, detach_attention_
from squeezoo.compress.attention_hooks import AttentionDoorError
from squeezoo.compress.attention_map import activate_attention_, attention_maps
from squeezoo.models.dense import logits
from tiny import make, tiny_batch, tiny_loss
from torch import nn

# One row for each attention class; the adapter test runs over the other heads of the same backbones.
NAMES = (
    "bert", "roberta", "distilbert", "opt", "gpt2", "llama", "mistral", "qwen2", "bart", "mbart",
    "vit", "deit", "dinov2", "timm_vit", "timm_deit", "wav2vec2", "wav2vec2_stable", "hubert",
)  # fmt: skip
# One of each way to compute a map, for the longer tests.
SOME = ("bert", "opt", "gpt2", "llama", "bart", "vit", "timm_vit", "wav2vec2")
MAPS = {"bart": 6, "mbart": 6}  # 2 blocks: encoder self, decoder self and cross


@pytest.fixture(params=SOME)
def name(request):
    return request.param


def scores(model, name):
    with torch.no_grad():
        return logits(model, tiny_batch(name))


def keys(model):
    return list(model.state_dict())


def implementation(model):
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def explicit_(model):
    """The original, computing its maps explicitly: what an attached model must equal to the last bit."""
    if implementation(model) is not None:
        model.set_attn_implementation("eager")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


@pytest.mark.parametrize(("name", "sparsity"), [*((name, "2:4") for name in NAMES), ("bart", None), ("timm_vit", None)])
def test_attached_equals_the_original_until_activated(name, sparsity):
    """To 1e-5 the original as it was (sdpa, fused), exactly the original computed explicitly."""
    model = make_sharp(name)
    found = attach_attention_(model, specs(model, sparsity))
    assert len(found) == MAPS.get(name, 2)
    activate_attention_(model, active=sparsity is None)  # without a pattern there is nothing to activate
    torch.testing.assert_close(scores(model, name), scores(make_sharp(name), name), atol=1e-5, rtol=0)
    assert torch.equal(scores(model, name), scores(explicit_(make_sharp(name)), name))


@pytest.mark.parametrize(
    ("name", "renormalize"), [*((name, False) for name in SOME), ("bart", True), ("llama", True), ("timm_vit", True)]
)
def test_activated_equals_the_plain_formula_with_its_gradients(name, renormalize, monkeypatch):
    """C.1 and C.4 inside the real model: softmax, slow N of M, product, all by autograd on the explicit original."""
    model = make_sparse(name, renormalize=renormalize)
    plain = explicit_(make_sharp(name))

    def pruned_softmax(x, dim=-1, dtype=None):
        p = torch.softmax(x, dim, dtype=dtype)
        p = p * slow_keep(p, 2, 4)
        return p / p.sum(-1, keepdim=True) if renormalize else p

    batch = tiny_batch(name)
    found = tiny_loss(model, name, batch)
    found.backward()
    forward = inspect.unwrap(type(next(attention_maps(model))[1]).forward)
    with monkeypatch.context() as patch:
        if name.startswith("timm"):
            patch.setattr(torch.Tensor, "softmax", pruned_softmax)
        else:
            assert "softmax" in inspect.getsource(forward.__globals__["eager_attention_forward"])
            patch.setattr(torch.nn.functional, "softmax", pruned_softmax)
        want = tiny_loss(plain, name, batch)
    want.backward()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert (want - tiny_loss(make_sharp(name), name, batch)).abs() > 1e-6
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    for key, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("sparsity", ["1:4", "2:8"])
def test_maps_hold_at_most_n_of_m_and_are_returned(sparsity):
    """output_attentions gives the pruned maps: BART's encoder (padded), decoder (causal) and cross maps."""
    from squeezoo.compress.masks import Pattern, check_nm

    model = make_sparse("bart", sparsity)
    batch = tiny_batch("bart")
    with torch.no_grad():
        output = model(**batch, output_attentions=True)
    every = [*output.encoder_attentions, *output.decoder_attentions, *output.cross_attentions]
    assert len(every) == 6
    for p in every:
        assert check_nm(p, Pattern.parse(sparsity))
        assert (p.sum(-1) <= 1 + 1e-6).all()
        assert (p.sum(-1) > 0).all()
    padding = batch["attention_mask"][:, None, None, :].expand_as(every[0]) == 0
    assert not every[0][padding].any()
    assert not every[2][..., torch.ones(6, 6).triu(1) > 0].any()


def test_detach_puts_everything_back(name):
    """Keys, implementation, fused attention, hooks and outputs, quantized or not, active or not."""
    model, original = make_sharp(name), make_sharp(name)
    attach_attention_(model, specs(model, q=1, k=1, p=1, v=1), level)
    activate_attention_(model)
    assert keys(model) != keys(original)
    assert not torch.equal(scores(model, name), scores(original, name))
    detach_attention_(model)
    assert keys(model) == keys(original)
    assert implementation(model) == implementation(original)
    for (where, module), (_, before) in zip(model.named_modules(), original.named_modules()):
        hooks = [getattr(module, kind) for kind in ("_forward_pre_hooks", "_forward_hooks")]
        assert [len(h) for h in hooks] == [len(before._forward_pre_hooks), len(before._forward_hooks)], where
        assert getattr(module, "fused_attn", None) == getattr(before, "fused_attn", None)
    assert torch.equal(scores(model, name), scores(original, name))
    detach_attention_(model)  # nothing left to do
    attach_attention_(model, specs(model))


def test_quantizers_stand_where_the_products_read(name):
    """D.4: one call of each of Q, K, P, V per map and forward pass; Q has the queries, K and V the keys."""
    model = make_sharp(name)
    found = attach_attention_(model, specs(model, None, q=1, k=1, p=1, v=1), level)
    before = scores(make_sharp(name), name)
    assert (scores(model, name) - before).abs().max() > 1e-4
    for compressor in found.values():
        numbers = {which: getattr(compressor, which).shapes for which in "qkpv"}
        assert {which: len(shapes) for which, shapes in numbers.items()} == dict.fromkeys("qkpv", 1)
        (p,) = numbers["p"]
        width = 16
        assert torch.Size(numbers["q"][0]).numel() == p[0] * p[1] * p[2] * width
        assert torch.Size(numbers["k"][0]).numel() == torch.Size(numbers["v"][0]).numel()
        assert torch.Size(numbers["k"][0]).numel() in (p[0] * p[1] * p[3] * width, p[0] * p[3] * width)
        for which in "qkpv":
            getattr(compressor, which).active = False
    torch.testing.assert_close(scores(model, name), before, atol=1e-5, rtol=0)


def test_each_quantizer_alone_equals_rounding_that_tensor():
    """timm's V is a slice of its fused product; Q and K are what its norms give: against the formula by hand."""
    torch.manual_seed(0)
    x = torch.randn(2, 17, 32)
    for which in "qkpv":
        model = make_sharp("timm_vit")
        attn = model.blocks[0].attn
        attach_attention_(model, [Spec("blocks.0.attn", None, **{which: 1})], level)
        b, n, h, d = 2, 17, 2, 16
        q, k, v = attn.qkv(x).reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4)
        if which == "v":  # already rounded by the hook on qkv; rounding it again changes nothing
            torch.testing.assert_close(v, Level("v")(v))
        rounded = Level(which)
        q, k = rounded(q) if which == "q" else q, rounded(k) if which == "k" else k
        p = (q @ k.transpose(-1, -2) / 4).softmax(-1)
        p = rounded(p) if which == "p" else p
        want = attn.proj((p @ v).transpose(1, 2).reshape(b, n, 32))
        torch.testing.assert_close(attn(x), want, atol=1e-5, rtol=1e-5)


def test_only_the_planned_maps_change():
    model = make_sharp("bert")
    attach_attention_(model, specs(model)[1:])
    activate_attention_(model)
    first, second = "bert.encoder.layer.0.attention.self", "bert.encoder.layer.1.attention.self"
    assert [name for name, _, _ in attention_maps(model)] == [second]
    with torch.no_grad():
        found = model(**tiny_batch("bert"), output_attentions=True).attentions
    assert (found[0].sum(-1) - 1).abs().max() < 1e-5
    assert (found[1].sum(-1) < 1 - 1e-3).any()
    attach_attention_(model, [Spec(first)])  # the rest can follow later
    detach_attention_(model)
    assert implementation(model) == "sdpa"


class Pair(nn.Module):
    """Two transformers models in a module of one's own, with different implementations."""

    def __init__(self):
        super().__init__()
        self.text, self.image = make("bert"), make("vit")
        self.image.set_attn_implementation("eager")


def test_models_inside_another_module():
    pair = Pair()
    names = ["text.bert.encoder.layer.0.attention.self", "image.vit.layers.1.attention"]
    attach_attention_(pair, [Spec(name) for name in names])
    assert implementation(pair.text) == implementation(pair.image) == "squeezoo"
    detach_attention_(pair)
    assert (implementation(pair.text), implementation(pair.image)) == ("sdpa", "eager")
    attach_attention_(pair, [Spec(names[1])])
    assert implementation(pair.text) == "sdpa"
    detach_attention_(pair)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


REFUSED = [
    (["bert.encoder.layer.7.attention.self"], {}, "this model has no such module"),
    (["bert.encoder.layer.0.output"], {}, "no door to the attention map of .*BertOutput.*There are doors for transf"),
    (["bert.encoder.layer.0.attention"], {}, "Its child 'bert.encoder.layer.0.attention.self' has a door"),
    (["bert.encoder.layer.1.attention.self"], {}, "names this attention module twice"),
    (["bert.encoder.layer.0.attention.self"], {"q": 1}, "quantizes this attention map; pass make_quantizer"),
    (["bert.encoder.layer.0.attention.self"], {"sparsity": "4:2"}, 'Write "2:4"'),
]


@pytest.mark.parametrize(("names", "options", "message"), REFUSED)
def test_refused_with_the_model_untouched(names, options, message):
    """Beside a record that could be attached stands one that cannot: neither is."""
    model = make("bert")
    before = keys(model)
    good = Spec("bert.encoder.layer.1.attention.self")
    with pytest.raises(ValueError, match=message):
        attach_attention_(model, [good, *(Spec(name, **options) for name in names)])
    assert keys(model) == before
    assert implementation(model) == "sdpa"
    assert not list(attention_maps(model))


def test_what_else_is_refused():
    model = make("bert")
    attach_attention_(model, specs(model))
    with pytest.raises(AttentionDoorError, match="attached already"):
        attach_attention_(model, specs(model))
    with pytest.raises(AttentionDoorError, match=r"of torch\.nn\.modules\.activation\.MultiheadAttention"):
        attach_attention_(Odd(), [Spec("attention")])
    eager = make("bert")
    eager.set_attn_implementation("eager")
    eager.config.output_attentions = True
    with pytest.raises(AttentionDoorError, match="pass output_attentions=True to the call"):
        attach_attention_(eager, specs(eager))
    alone = nn.Sequential(make("bert").bert.encoder.layer[0].attention.self)
    with pytest.raises(AttentionDoorError, match="outside of any transformers model"):
        attach_attention_(alone, [Spec("0")])


def test_a_failure_half_way_is_undone(monkeypatch):
    from squeezoo.compress import attention_doors

    model = make("bert")
    before = keys(model)

    def fail(models):
        raise RuntimeError("no")

    monkeypatch.setattr(attention_doors, "route_", fail)
    with pytest.raises(RuntimeError, match="no"):
        attach_attention_(model, specs(model))
    assert keys(model) == before
    assert implementation(model) == "sdpa"


def test_arguments_that_change_the_map_otherwise_are_refused():
    """Gemma's soft cap and the like are not part of N:M attention: an error, not a wrong map."""
    model = make_sparse("bert")
    with pytest.raises(AttentionDoorError, match="BertSelfAttention passes 'softcap'"), torch.no_grad():
        model(**tiny_batch("bert"), softcap=50.0)
