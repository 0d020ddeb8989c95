"""The sparse attention map against the reference vector, a slow reference of ALGORITHMS C.1-C.4, and its edges.

Legend: B batch, H heads, G groups of heads, Q queries, K keys, D head dimension.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maps import attended, numbers, reference
from squeezoo.compress.attention import sparse_attention
from squeezoo.compress.masks import Pattern
from torch.nn import functional as F

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "attention_nm.json").read_text(encoding="utf-8"))
CASES = [name for name, value in VECTOR.items() if isinstance(value, dict)]
PATTERNS = ("2:4", "1:4", "2:8", "2:16", "1:8")
TWO_FOUR = Pattern(2, 4)


def reference_gradients(q, k, v, g, p, keep, scale, renormalize):
    """C.4 written out: dQ, dK, dV for the output gradient g."""
    a = p * keep
    if renormalize:
        a = a / a.sum(-1, keepdim=True).clamp_min(1e-300)
    d_a = g @ v.transpose(-1, -2)
    d = (a * d_a).sum(-1, keepdim=True)
    d_s = a * (d_a - d) if renormalize else p * (keep * d_a - d)
    return scale * d_s @ k, scale * d_s.transpose(-1, -2) @ q, a.transpose(-1, -2) @ g


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_the_reference_vector(case, dtype):
    """vectors/attention_nm.json (float64 autograd, closed form and online softmax agree): O, dQ, dK, dV and keep."""
    expected = VECTOR[case]
    causal = expected.get("causal", False)
    q, k, v, g = (numbers(VECTOR[name + ("c" if causal else "")]).to(dtype) for name in "QKVG")
    mask = None
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    if "keymask" in expected:
        mask = torch.tensor(expected["keymask"]).bool()[:, None, None, :]
    pattern = Pattern(expected["N"], expected["M"])
    options = dict(pattern=pattern, mask=mask, renormalize=expected.get("renorm", False))
    out, probs, *grads = attended(q, k, v, g, **options)
    tolerance = dict(rtol=1e-6, atol=1e-8) if dtype == torch.float64 else dict(rtol=1e-5, atol=1e-6)
    for name, found in zip(("O", "dQ", "dK", "dV"), (out, *grads)):
        torch.testing.assert_close(found.double(), numbers(expected[name]), **tolerance)
    keep, dense = torch.tensor(expected["keep"]).bool(), numbers(expected["P_dense"])
    assert torch.equal(probs > 0, keep)
    if not options["renormalize"]:
        torch.testing.assert_close(probs.double(), dense * keep, **tolerance)


masks = st.sampled_from(["none", "causal", "padding", "random", "all of a row"])


def make_mask(kind, shape, generator):
    b, h, q, k = shape
    if kind == "none":
        return None
    if kind == "causal":
        return torch.ones(q, k, dtype=torch.bool).tril(max(0, k - q))
    if kind == "padding":
        lengths = torch.randint(1, k + 1, (b, 1, 1, 1), generator=generator)
        return torch.arange(k) < lengths
    mask = torch.rand(b, h, q, k, generator=generator) < 0.7
    if kind == "all of a row":
        mask[:, :, 0] = False
    return mask


@settings(max_examples=80, deadline=None)
@given(
    pattern=st.sampled_from(PATTERNS),
    sizes=st.tuples(
        st.integers(1, 2), st.sampled_from([(1, 1), (2, 2), (4, 2)]), st.integers(1, 5), st.integers(1, 21)
    ),
    kind=masks,
    form=st.sampled_from(["bool", "minimum", "infinite"]),
    renormalize=st.booleans(),
    first_key=st.integers(0, 20),
    seed=st.integers(0, 2**16),
)
def test_output_and_gradients_equal_the_slow_reference(pattern, sizes, kind, form, renormalize, first_key, seed):
    """ALGORITHMS C.1, C.2 and C.4, all masks in all forms, grouped heads, any key length and alignment."""
    pattern = Pattern.parse(pattern)
    b, (h, groups), n_q, n_k = sizes
    generator = torch.Generator().manual_seed(seed)
    q, g = (torch.randn(b, h, n_q, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(b, groups, n_k, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    valid = make_mask(kind, (b, h, n_q, n_k), generator)
    mask = valid
    if valid is not None and form != "bool":
        lowest = torch.finfo(torch.float64).min if form == "minimum" else -math.inf
        mask = torch.zeros(valid.shape, dtype=torch.float64).masked_fill(~valid, lowest)
    options = dict(pattern=pattern, renormalize=renormalize, first_key=first_key)
    out, probs, d_q, d_k, d_v = attended(q, k, v, g, mask=mask, **options)
    want, p, keep = reference(q, k, v, mask=valid, **options)
    torch.testing.assert_close(out, want)
    assert torch.equal(probs > 0, keep)
    repeat = h // groups
    wide_k, wide_v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    want_q, want_k, want_v = reference_gradients(q, wide_k, wide_v, g, p, keep, 3**-0.5, renormalize)
    torch.testing.assert_close(d_q, want_q)
    torch.testing.assert_close(d_k, want_k.unflatten(1, (groups, repeat)).sum(2))
    torch.testing.assert_close(d_v, want_v.unflatten(1, (groups, repeat)).sum(2))


@pytest.mark.parametrize(("renormalize", "causal"), [(False, True), (True, False)])
def test_gradcheck_in_float64_with_an_additive_bias(renormalize, causal):
    """Finite differences of output and probabilities for Q, K, V and a bias added to the scores (C.2, C.4)."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 6, 6))
    bias = torch.randn(1, 2, 1, 6, dtype=torch.float64, requires_grad=True)
    blocked = torch.zeros(3, 6, dtype=torch.float64)
    if causal:
        blocked = blocked.masked_fill(~torch.ones(3, 6, dtype=torch.bool).tril(), -math.inf)

    def f(q, k, v, bias):
        return sparse_attention(q, k, v, pattern=TWO_FOUR, mask=bias + blocked, renormalize=renormalize)

    assert torch.autograd.gradcheck(f, (q, k, v, bias))


def test_an_additive_bias_takes_part_in_the_selection():
    """C.2: keys 2 and 3 win by their bias although all products are equal; ties go to the lower keys without it."""
    q, k, v = torch.ones(1, 1, 1, 2), torch.ones(1, 1, 4, 2), torch.eye(4)[None, None]
    _, without = sparse_attention(q, k, v, pattern=TWO_FOUR)
    out, probs = sparse_attention(q, k, v, pattern=TWO_FOUR, mask=torch.tensor([0.0, 0, 1, 1]))
    assert (without > 0).flatten().tolist() == [True, True, False, False]
    assert (probs > 0).flatten().tolist() == [False, False, True, True]
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 0, 1, 1]) * math.e / (2 + 2 * math.e))


def test_underflow_does_not_change_the_choice():
    """C.2: selection on S, not on P. In float32 all but the first of these scores give P = 0, and a choice on P would
    keep keys 0 and 1."""
    from squeezoo.compress.attention_core import select

    s = torch.tensor([[0.0, -300.0, -250.0, -200.0]])
    assert s.softmax(-1)[0, 1:].eq(0).all()
    assert select(s, TWO_FOUR).tolist() == [[True, False, False, True]]


def test_rows_without_a_valid_key_are_zero_also_next_to_others():
    """C.2: output 0, gradients 0, no NaN; the other rows are untouched by them."""
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(1, 1, 4, 3) for _ in range(4))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1] = False
    out, probs, d_q, d_k, d_v = attended(q, k, v, g, pattern=TWO_FOUR, mask=mask)
    assert not out[0, 0, 1].any()
    assert not probs[0, 0, 1].any()
    assert not d_q[0, 0, 1].any()
    rows = [0, 2, 3]
    fewer, _, _, less_k, less_v = attended(q[:, :, rows], k, v, g[:, :, rows], pattern=TWO_FOUR)
    torch.testing.assert_close(out[:, :, rows], fewer)
    torch.testing.assert_close(d_k, less_k)
    torch.testing.assert_close(d_v, less_v)


def test_invalid_is_what_stands_at_half_of_the_minimum_or_below():
    """Half-precision and summed masks: finfo.min, -inf and finfo.min + bias are invalid; -1e4 is a bias like any."""
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4, 2), torch.eye(4)[None, None]
    low = torch.finfo(torch.float16).min
    for blocked in (low, low / 2, -math.inf):
        mask = torch.tensor([blocked, 0, blocked, 0], dtype=torch.float16)
        _, probs = sparse_attention(q, k, v, pattern=Pattern(1, 2), mask=mask)
        assert probs.flatten().tolist() == [0, 0.5, 0, 0.5]
        _, none = sparse_attention(q, k, v, pattern=Pattern(1, 2), mask=torch.full((4,), blocked, dtype=torch.float16))
        assert not none.any()
    mask = torch.tensor([-1e4, 0, -1e4, 0])
    out, _ = sparse_attention(q, k, v, pattern=Pattern(1, 2), mask=mask)
    assert out.flatten().tolist() == [0, 0.5, 0, 0.5]
    _, every = sparse_attention(q, k, v, pattern=Pattern(1, 2), mask=torch.full((4,), -1e4))
    assert every.flatten().tolist() == [0.25, 0, 0.25, 0]


def test_without_a_pattern_it_is_ordinary_attention():
    torch.manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, 9, 4) for _ in range(4))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    out, probs, *grads = attended(q, k, v, g, pattern=None, mask=mask)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, want.detach())
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3, 9))
    for found, expected in zip(grads, torch.autograd.grad(want, (q, k, v), g)):
        torch.testing.assert_close(found, expected)
