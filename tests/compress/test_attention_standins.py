"""The doors of fairseq and Megatron, on stand-ins that compute as those libraries' classes do and bear their names.

The tests of the extras open the same doors of the real libraries.
"""

import copy
import math

import pytest
import torch
from maps import Spec, level, slow_keep
from squeezoo.compress.attention_doors import attach_attention_, detach_attention_
from squeezoo.compress.attention_fairseq import door_fairseq
from squeezoo.compress.attention_hooks import AttentionDoorError
from squeezoo.compress.attention_map import activate_attention_
from squeezoo.compress.attention_megatron import door_megatron
from squeezoo.compress.quantizers import LsqQuantizer
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, BATCH, TIME = 8, 2, 3, 10


class MultiheadAttention(nn.Module):
    """fairseq 0.12: torch's own function on raw weights, or, told to skip a check, the explicit path; [T, B, C]."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.dropout_module = nn.Dropout(0.0)
        self.skip_embed_dim_check = False
        self.bias_k = None

    def forward(self, query, key, value, key_padding_mask=None):
        if not self.skip_embed_dim_check:
            bias = torch.cat((self.q_proj.bias, self.k_proj.bias, self.v_proj.bias))
            return F.multi_head_attention_forward(
                query, key, value, WIDTH, HEADS, torch.empty([0]), bias, None, None, False, self.dropout_module.p,
                self.out_proj.weight, self.out_proj.bias, self.training, key_padding_mask, False, None,
                use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight,
                v_proj_weight=self.v_proj.weight,
            )  # fmt: skip
        t, b, _ = query.shape
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q *= (WIDTH // HEADS) ** -0.5
        q, k, v = (x.contiguous().view(-1, b * HEADS, WIDTH // HEADS).transpose(0, 1) for x in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2))
        if key_padding_mask is not None:
            weights = (
                weights.view(b, HEADS, t, -1).masked_fill(key_padding_mask[:, None, None], -math.inf).view_as(weights)
            )
        attn = torch.bmm(self.dropout_module(weights.softmax(-1)), v)
        return self.out_proj(attn.transpose(0, 1).contiguous().view(t, b, WIDTH)), weights


class DotProductAttention(nn.Module):
    """megatron-core 0.16: [T, B, heads, width of a head] in, [T, B, C] out; the mask is True where blocked."""

    def __init__(self):
        super().__init__()
        self.scale_mask_softmax = ScaleMaskSoftmax()
        self.attention_dropout = nn.Dropout(0.0)

    def forward(self, query, key, value, attention_mask, attn_mask_type=None):
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        probs = self.scale_mask_softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, attention_mask)
        return (self.attention_dropout(probs) @ v).permute(2, 0, 1, 3).flatten(2)


class ScaleMaskSoftmax(nn.Module):
    def forward(self, scores, mask):
        return scores.masked_fill(mask, -10000.0).softmax(-1)


MultiheadAttention.__module__ = "fairseq.modules.multihead_attention"
DotProductAttention.__module__ = "megatron.core.transformer.dot_product_attention"


class FairseqBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = MultiheadAttention()

    def forward(self, x, blocked):
        return self.self_attn(query=x, key=x, value=x, key_padding_mask=blocked)[0]


class MegatronBlock(nn.Module):
    """Q, K and V from one matrix, as ``linear_qkv`` gives them; called by position, or by name."""

    def __init__(self, by_name=False):
        super().__init__()
        self.linear_qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.core_attention = DotProductAttention()
        self.by_name = by_name

    def forward(self, x, blocked):
        q, k, v = self.linear_qkv(x).unflatten(-1, (HEADS, 3, WIDTH // HEADS)).unbind(-2)
        mask = blocked[:, None, None, :]
        if self.by_name:
            return self.core_attention(query=q, key=k, value=v, attention_mask=mask)
        return self.core_attention(q, k, v, mask, attn_mask_type=None)


BLOCKS = {
    "fairseq": (FairseqBlock, "self_attn"),
    "megatron": (MegatronBlock, "core_attention"),
    "megatron by name": (lambda: MegatronBlock(by_name=True), "core_attention"),
}


@pytest.fixture(params=list(BLOCKS))
def library(request):
    return request.param


def block(library):
    torch.manual_seed(0)
    made = BLOCKS[library][0]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made


def batch():
    generator = torch.Generator().manual_seed(1)
    blocked = torch.arange(TIME) >= torch.tensor([[10], [7], [5]])
    return torch.randn(TIME, BATCH, WIDTH, generator=generator), blocked


def attached(library, **options):
    model = block(library)
    attach_attention_(model, [Spec(BLOCKS[library][1], **options)], level)
    return model


def test_attached_equals_the_original_until_activated(library):
    torch.testing.assert_close(attached(library)(*batch()), block(library)(*batch()), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("renormalize", [False, True])
def test_activated_equals_the_plain_formula_with_its_gradients(library, renormalize, monkeypatch):
    """C.1, C.4: slow N of M between softmax and dropout of the explicit path, by autograd."""
    model, plain = attached(library, renormalize=renormalize), block(library)
    activate_attention_(model)
    found = model(*batch())
    found.square().sum().backward()
    if library == "fairseq":
        plain.self_attn.skip_embed_dim_check = True
    softmax = torch.Tensor.softmax

    def pruned(x, dim):
        p = softmax(x, dim)
        p = p * slow_keep(p, 2, 4)
        return p / p.sum(-1, keepdim=True) if renormalize else p

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", pruned)
        want = plain(*batch())
    want.square().sum().backward()
    torch.testing.assert_close(found, want)
    assert (want - block(library)(*batch())).abs().max() > 1e-2
    for one, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["q", "k", "p", "v"])
def test_each_quantizer_rounds_its_tensor_and_trains(library, which):
    """fairseq scales Q in place after the projection: the backward pass must survive it. Elements are those of Q, K, V
    [T, B, C] or P [B, heads, T, T]."""
    model = attached(library, sparsity=None, **{which: 1})
    out = model(*batch())
    (quantizer,) = [m for m in model.modules() if type(m).__name__ == "Level"]
    assert quantizer.which == which
    sizes = [torch.Size(shape).numel() for shape in quantizer.shapes]
    assert sizes == [BATCH * HEADS * TIME * TIME if which == "p" else TIME * BATCH * WIDTH]
    assert (out - block(library)(*batch())).abs().max() > 1e-4
    out.square().sum().backward()
    assert quantizer.scale.grad.abs() > 0
    quantizer.active = False
    torch.testing.assert_close(model(*batch()), block(library)(*batch()), atol=1e-6, rtol=1e-5)


def test_a_quantizer_that_saves_its_output_survives_fairseq():
    """fairseq multiplies Q by its scale in place; LSQ's backward pass needs what it returned."""
    q = LsqQuantizer(8)
    q.init_from_amax_(torch.tensor(4.0))
    model = block("fairseq")
    attach_attention_(model, [Spec("self_attn", None, q=1)], lambda record, which: q)
    model(*batch()).square().sum().backward()
    assert q.scale.grad.abs() > 0


def test_dropout_comes_between_selection_and_quantizer(library):
    model = attached(library, p=1)
    activate_attention_(model)
    dropout = next(m for name, m in model.named_modules() if "dropout" in name)
    seen = []
    dropout.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    dropout.p = 0.5
    model.train()
    model(*batch())
    ((selected, quantized),) = seen
    assert torch.equal(selected > 0, (selected > 0) & slow_keep(selected, 2, 4))
    assert 0 < (quantized > 0).sum() < (selected > 0).sum()
    torch.testing.assert_close(quantized * 16, (quantized * 16).round())


def test_copies_and_detach(library):
    model = attached(library, q=1, k=1, p=1, v=1)
    other = copy.deepcopy(model)
    activate_attention_(other)
    assert not torch.equal(other(*batch()), model(*batch()))
    detach_attention_(model)
    assert list(model.state_dict()) == list(block(library).state_dict())
    assert torch.equal(model(*batch()), block(library)(*batch()))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    detach_attention_(other)
    assert torch.equal(other(*batch()), block(library)(*batch()))


def test_doors_know_their_own_classes_only():
    fairseq, megatron = block("fairseq").self_attn, block("megatron").core_attention
    assert door_fairseq(fairseq).library == "fairseq"
    assert door_megatron(megatron).library == "megatron"
    assert door_fairseq(megatron) is door_megatron(fairseq) is door_fairseq(nn.MultiheadAttention(8, 2)) is None


def test_moved_names_are_refused():
    model = block("fairseq")
    del model.self_attn.skip_embed_dim_check
    with pytest.raises(AttentionDoorError, match="MultiheadAttention has no 'skip_embed_dim_check'"):
        attach_attention_(model, [Spec("self_attn")])
    model = block("fairseq")
    model.self_attn.bias_k = nn.Parameter(torch.zeros(1, 1, WIDTH))
    before = list(model.state_dict())
    with pytest.raises(AttentionDoorError, match="add_bias_kv"):
        attach_attention_(model, [Spec("self_attn", k=1)], level)
    assert list(model.state_dict()) == before
    assert not model.self_attn.skip_embed_dim_check
