"""Dropout, quantizers, precision, memory and errors of the sparse attention map, and the selection on probabilities."""

import math

import pytest
import torch
from maps import attended, reference
from squeezoo.compress import attention_core
from squeezoo.compress.attention import AttentionQuantizers, keep_probabilities, sparse_attention
from squeezoo.compress.masks import Pattern

TWO_FOUR = Pattern(2, 4)


def test_dropout_comes_after_the_selection():
    """C.2: what dropout leaves is among the kept keys, divided by 1 - p; nothing replaces what it drops."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 32, 8) for _ in range(3))
    _, kept = sparse_attention(q, k, v, pattern=TWO_FOUR)
    out, probs = sparse_attention(q, k, v, pattern=TWO_FOUR, dropout_p=0.25, training=True)
    left = probs > 0
    assert not (left & (kept == 0)).any()
    torch.testing.assert_close(probs[left], kept[left] / 0.75)
    torch.testing.assert_close(out, probs @ v)
    share = left.sum() / (kept > 0).sum()
    assert abs(share - 0.75) < 0.05  # 2,048 kept entries: standard deviation 0.0096
    assert torch.equal(sparse_attention(q, k, v, pattern=TWO_FOUR, dropout_p=0.25)[1], kept)


def test_the_gradient_under_dropout_is_that_of_the_same_dropped_entries():
    """C.4 with A = P * keep * left / (1 - p): autograd of the plain formula with the entries that were left."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(1, 2, 8, 4, dtype=torch.float64) for _ in range(4))
    _, probs, *grads = attended(q, k, v, g, pattern=TWO_FOUR, dropout_p=0.3, training=True)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    p = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    want = torch.autograd.grad(p * (probs > 0) / 0.7 @ v, (q, k, v), g)
    for found, expected in zip(grads, want):
        torch.testing.assert_close(found, expected)


def test_the_probabilities_are_differentiable_beside_the_output():
    """A distillation loss on the map and the loss of the output share one forward pass."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(1, 2, 8, 4, dtype=torch.float64) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    for renormalize in (False, True):
        out, probs = sparse_attention(q, k, v, pattern=TWO_FOUR, renormalize=renormalize)
        found = torch.autograd.grad((out * g).sum() + (probs**2).sum(), (q, k, v))
        p = (q @ k.transpose(-1, -2) / 2).softmax(-1) * (probs > 0)
        p = p / p.sum(-1, keepdim=True) if renormalize else p
        want = torch.autograd.grad((p @ v * g).sum() + (p**2).sum(), (q, k, v))
        only = torch.autograd.grad((sparse_attention(q, k, v, pattern=TWO_FOUR)[1] ** 2).sum(), (q, k))
        assert all(grad.abs().sum() > 0 for grad in only)
        for grad, expected in zip(found, want):
            torch.testing.assert_close(grad, expected)


def recorded(log, name, factor=1.0):
    def quantizer(x):
        log.append((name, tuple(x.shape), x.dtype))
        return x * factor

    return quantizer


def test_quantizers_see_q_k_p_v_in_their_places():
    """D.4: Q and K before the scores, P after selection and dropout, V before the product; K and V once per group."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 3, 2), torch.randn(1, 2, 6, 2), torch.randn(1, 2, 6, 2)
    log = []
    factors = dict(q=2.0, k=0.5, p=3.0, v=5.0)
    quantizers = AttentionQuantizers(**{name: recorded(log, name, factor) for name, factor in factors.items()})
    out, probs = sparse_attention(q, k, v, pattern=TWO_FOUR, quantizers=quantizers)
    plain, dense = sparse_attention(q, k, v, pattern=TWO_FOUR)
    torch.testing.assert_close(out, plain * 15)
    torch.testing.assert_close(probs, dense * 3)
    shapes = {name: shape for name, shape, _ in log}
    assert shapes == {"q": (1, 4, 3, 2), "k": (1, 2, 6, 2), "v": (1, 2, 6, 2), "p": (1, 4, 3, 6)}
    assert len(log) == 4


@pytest.mark.parametrize("only", ["q", "k", "p", "v", "qkpv"])
def test_rounding_quantizers_equal_the_written_out_formula_and_its_gradients(only):
    """D.4 with straight-through rounding to 1/32: zero stays zero, so the kept keys stay N of M."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 2, 8, 4, dtype=torch.float64).requires_grad_() for _ in range(4))

    def rounded(x):
        return x + ((x * 32).round() / 32 - x).detach()

    quantizers = AttentionQuantizers(**{name: rounded for name in only})
    out, probs = sparse_attention(q, k, v, pattern=TWO_FOUR, quantizers=quantizers)
    use = {name: rounded if name in only else lambda x: x for name in "qkpv"}
    _, _, keep = reference(use["q"](q).detach(), use["k"](k).detach(), v.detach(), TWO_FOUR)
    p = use["p"]((use["q"](q) @ use["k"](k).transpose(-1, -2) / 2).softmax(-1) * keep)
    want = p @ use["v"](v)
    torch.testing.assert_close(out, want)
    assert not probs.masked_select(~keep).any()
    for found, expected in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(want, (q, k, v), g)):
        torch.testing.assert_close(found, expected)


def test_the_quantizer_of_p_comes_after_dropout():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 4) for _ in range(3))
    seen = []
    quantizers = AttentionQuantizers(p=lambda p: seen.append(p) or p)
    _, probs = sparse_attention(q, k, v, pattern=TWO_FOUR, dropout_p=0.5, training=True, quantizers=quantizers)
    _, kept = sparse_attention(q, k, v, pattern=TWO_FOUR)
    left = seen[0] > 0
    assert torch.equal(probs, seen[0])
    assert 0 < left.sum() < (kept > 0).sum()
    torch.testing.assert_close(seen[0][left], kept[left] * 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_selects_on_float32_scores(dtype):
    """The choice is that of float32 on the rounded inputs; output and gradients have the inputs' dtype."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 2, 16, 8).to(dtype) for _ in range(4))
    out, probs, *grads = attended(q, k, v, g, pattern=TWO_FOUR)
    want, want_probs, *want_grads = attended(*(x.float() for x in (q, k, v, g)), pattern=TWO_FOUR)
    assert {x.dtype for x in (out, probs, *grads)} == {dtype}
    assert torch.equal(probs > 0, want_probs > 0)
    for found, expected in zip((out, *grads), (want, *want_grads)):
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=1e-2)


def test_autocast_gives_what_its_dtype_gives():
    """Under autocast the factors are cast as a product casts them, also when some come in float32; then as above."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 2, 16, 8) for _ in range(4))
    with torch.autocast("cpu", torch.bfloat16):
        out, probs, *grads = attended(q, k, v.bfloat16(), g.bfloat16(), pattern=TWO_FOUR)
    assert out.dtype == probs.dtype == torch.bfloat16
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32, torch.bfloat16]
    want, want_probs, *want_grads = attended(*(x.bfloat16() for x in (q, k, v, g)), pattern=TWO_FOUR)
    assert torch.equal(out, want)
    assert torch.equal(probs, want_probs)
    for found, expected in zip(grads, want_grads):
        assert torch.equal(found.bfloat16(), expected)


def test_pieces_of_the_map_give_the_whole(monkeypatch):
    """The map is worked through in pieces: samples, or heads of one sample. Every size gives the same."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(3, 4, 5, 2, dtype=torch.float64) for _ in range(4))
    bias = torch.randn(3, 1, 5, 5, dtype=torch.float64, requires_grad=True)

    def run():
        q_, k_, v_ = (x.clone().requires_grad_() for x in (q, k, v))
        out, probs = sparse_attention(q_, k_, v_, pattern=TWO_FOUR, mask=bias)
        return out, probs, *torch.autograd.grad(out, (q_, k_, v_, bias), g)

    whole = run()
    for size in (1, 25, 60, 100, 250):
        monkeypatch.setattr(attention_core, "_CPU_PIECE", size)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        for found, expected in zip(run(), whole):
            torch.testing.assert_close(found, expected)


def test_memory_kept_for_the_backward_pass_is_one_map():
    """What autograd saves of size [B, H, Q, K]: one float tensor, as for plain softmax attention."""
    q, k, v = (torch.randn(1, 2, 64, 4, requires_grad=True) for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        out, _ = sparse_attention(q, k, v, pattern=TWO_FOUR, mask=torch.ones(64, 64, dtype=torch.bool).tril())
    out.sum().backward()
    assert sum(size for size in sizes if size >= 2 * 64 * 64) == 2 * 64 * 64


def test_probabilities_alone_give_the_same_map_and_gradients():
    """For doors that see P only: same choice as on S (C.3), and autograd through softmax is C.4."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 2, 10, 4, dtype=torch.float64) for _ in range(4))
    for renormalize in (False, True):
        _, probs, *want_grads = attended(q, k, v, g, pattern=TWO_FOUR, renormalize=renormalize)
        q_, k_, v_ = (x.clone().requires_grad_() for x in (q, k, v))
        kept = keep_probabilities((q_ @ k_.transpose(-1, -2) / 2).softmax(-1), TWO_FOUR, renormalize)
        torch.testing.assert_close(kept, probs)
        for found, expected in zip(torch.autograd.grad(kept @ v_, (q_, k_, v_), g), want_grads):
            torch.testing.assert_close(found, expected)


def test_a_cut_cache_keeps_its_groups():
    """Groups at absolute key index: dropping the 3 oldest keys, which are masked, changes nothing when first_key says
    so, and something when it does not."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4) for n in (1, 13, 13))
    mask = torch.arange(13) >= 3
    whole, _ = sparse_attention(q, k, v, pattern=TWO_FOUR, mask=mask)
    cut, _ = sparse_attention(q, k[:, :, 3:], v[:, :, 3:], pattern=TWO_FOUR, first_key=3)
    moved, _ = sparse_attention(q, k[:, :, 3:], v[:, :, 3:], pattern=TWO_FOUR)
    torch.testing.assert_close(cut, whole)
    assert (moved - whole).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.randn(1, 3, 4, 2)), "4 heads a multiple of G, found k \\[1, 3, 4, 2\\]"),
        (dict(q=torch.randn(4, 4, 2)), "expected q \\[B, H, Q, D\\]"),
        (dict(mask=torch.ones(1, 1, 4, 3).bool()), "broadcastable to .* \\[1, 4, 4, 4\\], found \\[1, 1, 4, 3\\]"),
        (dict(mask=torch.ones(1, 4).long()), "write mask.bool\\(\\) if 1 means valid"),
        (dict(q=torch.full((1, 4, 4, 2), math.nan)), "NaN"),
    ],
)
def test_bad_input_says_what_was_expected(change, message):
    given_ = dict(q=torch.randn(1, 4, 4, 2), k=torch.randn(1, 4, 4, 2), v=torch.randn(1, 4, 4, 2), mask=None)
    q, k, v, mask = {**given_, **change}.values()
    with pytest.raises(ValueError, match=message):
        sparse_attention(q, k, v, pattern=TWO_FOUR, mask=mask)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_it_gives_what_the_cpu_gives(dtype):
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, 33, 16).to(dtype) for _ in range(4))
    mask = torch.ones(33, 33, dtype=torch.bool).tril()
    want = attended(q, k, v, g, pattern=TWO_FOUR, mask=mask)
    found = attended(*(x.cuda() for x in (q, k, v, g)), pattern=TWO_FOUR, mask=mask.cuda())
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=3e-2, atol=2e-2)
    for x, expected in zip(found, want):
        torch.testing.assert_close(x.cpu().float(), expected.float(), **tolerance)
