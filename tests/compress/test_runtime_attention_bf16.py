"""The native attention in bfloat16 against the definition in float64, and against the exact kernel."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import squeezoo
import torch
from squeezoo.compress.runtime import native
from squeezoo.compress.runtime.levels import Levels
from squeezoo.compress.runtime.native.block import FusedForward
from torch import Tensor

AVAILABLE, WHY_NOT = native.available()
pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason=WHY_NOT),
    pytest.mark.skipif(AVAILABLE and not native.has_bfloat16(), reason="the CPU has no AVX512_BF16 with VBMI"),
]

# bfloat16 has 8 significant bits: V is off by 2^-9 of itself, P by 2^-9 and by half a step of 2^(1/128), 2^-8.5 in all,
# and a score by some 2^-9 |q| |k| scale / sqrt(D), at most 0.01 here. Relative to the largest |V|.
LARGEST_ERROR = 0.008


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heads_of(batch: int, length: int, heads: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Q, K and V as strided views of one tensor, as a block has them."""
    qkv = torch.randn(batch, length, 3 * heads * width, generator=generator(seed))
    q, k, v = (t.unflatten(-1, (heads, width)) for t in qkv.chunk(3, -1))
    return q, k, v


def definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """In float64, written out; a row without a valid key gives 0."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2).flatten(2)


def assert_near(found: Tensor, expected: Tensor, v: Tensor, allowed: float = LARGEST_ERROR) -> None:
    assert float((found.double() - expected).abs().max()) <= allowed * float(v.abs().max())


SHAPES = [
    (1, 1, 1, 4),
    (2, 9, 2, 16),
    (2, 37, 3, 20),
    (3, 197, 2, 32),
    (2, 65, 2, 48),
    (1, 128, 4, 64),
    (1, 70, 2, 80),
    (1, 33, 1, 129),
    (1, 31, 3, 7),
    (1, 384, 2, 32),
]
KINDS = ["none", "padding", "bool", "float", "far below", "minimum", "-inf", "causal", "nothing valid", "all minimum"]


def mask_of(kind: str, batch: int, heads: int, length: int) -> Tensor | None:
    """Of several ranks of broadcasting."""
    some = torch.rand(batch, heads, length, length, generator=generator(1)) < 0.5
    keys = torch.rand(batch, 1, 1, length, generator=generator(2)) < 0.7
    keys[..., 0] = True
    everywhere = torch.zeros(batch, 1, length, length)
    return {
        "none": None,
        "padding": torch.arange(length).expand(batch, 1, 1, length)
        < torch.arange(1, batch + 1)[:, None, None, None] * 5,
        "bool": some,
        "float": torch.randn(1, heads, length, length, generator=generator(3)) * 3,
        "far below": torch.randn(1, heads, length, length, generator=generator(3)) - 10_000,
        "minimum": torch.zeros(keys.shape).masked_fill(~keys, torch.finfo(torch.float32).min),
        "-inf": torch.zeros(some.shape).masked_fill(~some, -math.inf),
        "causal": torch.ones(length, length, dtype=torch.bool).tril(),
        "nothing valid": everywhere.bool(),
        "all minimum": everywhere + torch.finfo(torch.float32).min,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_definition_but_for_rounding(shape: tuple[int, int, int, int], kind: str) -> None:
    """Expected: float64, within what bfloat16 allows; rows without a valid key are 0; the same bits again, on one
    thread and on several, and for a row of the batch that is alone."""
    batch, length, heads, _ = shape
    q, k, v = heads_of(*shape)
    mask = mask_of(kind, batch, heads, length)
    given, causal = None if kind == "causal" else mask, kind == "causal"
    found = []
    for threads in (1, 4, 1):
        torch.set_num_threads(threads)
        found.append(native.attention(q, k, v, given, causal=causal, bfloat16=True))
    if kind in ("nothing valid", "all minimum"):
        assert not found[0].any()
    else:
        assert_near(found[0], definition(q, k, v, mask), v)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    part = given if given is None or given.shape[0] == 1 else given[-1:]
    alone = native.attention(q[-1:], k[-1:], v[-1:], part, causal=causal, bfloat16=True)
    assert torch.equal(alone, found[0][-1:])


def test_it_is_not_the_exact_kernel_and_errs_without_bias() -> None:
    """The mean error is far below the largest one (softmax and V are rounded to nearest), and rows still sum to 1: a
    constant V comes back to its own rounding, 2^-9."""
    q, k, v = heads_of(2, 384, 4, 32)
    exact, found = (native.attention(q, k, v, bfloat16=bfloat16) for bfloat16 in (False, True))
    error = (found - exact).double()
    assert 1e-5 < float(error.abs().max()) < LARGEST_ERROR * float(v.abs().max())
    assert abs(float(error.mean())) < float(error.std()) / 20
    ones = native.attention(q, k, torch.full_like(v, 0.7), bfloat16=True)
    torch.testing.assert_close(ones, torch.full_like(ones, 0.7), rtol=2**-9, atol=0)


def test_shared_keys_fewer_queries_scale_and_levels() -> None:
    """Expected: float64; two query heads read each key head, queries are fewer than keys (with ``causal`` the last one
    sees all keys), and the levels are those of the floats."""
    q = torch.randn(2, 5, 6, 24, generator=generator(0))
    k, v = (torch.randn(2, 3, 75, 24, generator=generator(i)).transpose(1, 2) for i in (1, 2))
    levels = Levels(0.01, 128, 1, 255)
    for causal in (False, True):
        mask = torch.ones(5, 75, dtype=torch.bool).tril(70) if causal else None
        found = native.attention(q, k, v, scale=0.3, causal=causal, bfloat16=True)
        assert_near(found, definition(q, k, v, mask, 0.3), v, 2 * LARGEST_ERROR)  # larger scores
        emitted = native.attention(q, k, v, scale=0.3, causal=causal, levels=levels, bfloat16=True)
        assert torch.equal(emitted, native.quantize(found.flatten(0, 1), levels).view(emitted.shape))


@pytest.mark.parametrize("value", [40.0, 300.0, 1e20, math.inf, math.nan])
def test_scores_beyond_the_reach_are_computed_in_float32(value: float) -> None:
    """Expected: the bits of the exact kernel, for the blocks of 24 queries that hold such a row and for no other one;
    on any number of threads. 40 * |k| / sqrt(32) / ln(2) is above 100 for |k| = 8."""
    q, k, v = heads_of(2, 190, 3, 32)
    q, k = q.clone(), k.clone()
    k[:, :, :, 0] += 8.0
    q[1, 50, 1, 0] = value
    exact = native.attention(q, k, v)
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found = native.attention(q, k, v, bfloat16=True)
        same = (found == exact) | (found.isnan() & exact.isnan())
        rows = same.unflatten(-1, (3, 32)).all(-1)  # [batch, query, head]
        assert rows[1, 48:72, 1].all()
        rows[1, 48:72, 1] = False
        assert not rows.any()


def test_broken_keys_are_not_hidden() -> None:
    """A NaN or infinity in K or V reaches the result of its own head, and of no other one."""
    for which in (1, 2):
        for value in (math.nan, math.inf):
            inputs = [t.clone() for t in heads_of(1, 40, 2, 32)]
            inputs[which][0, 7, 1, 3] = value
            found = native.attention(*inputs, bfloat16=True).unflatten(-1, (2, 32))
            assert found[:, :, 0].isfinite().all()
            assert not found[:, :, 1].isfinite().all()


def test_large_scores_within_the_reach_do_not_overflow() -> None:
    """Scores of +-60: the largest keys win, as in float64; V of thousands stays finite."""
    q, k, v = heads_of(1, 100, 1, 32)
    q, k = (4 * t / t.norm(dim=-1, keepdim=True) * 32**0.25 * 60**0.5 / 4 for t in (q, k))
    found = native.attention(q, k, v * 4000, bfloat16=True)
    assert_near(found, definition(q, k, v * 4000, None), v * 4000, 0.1)
    exact = native.attention(q, k, v * 4000)
    assert not torch.equal(found, exact)  # it was within the reach


def test_a_copy_keeps_the_choice() -> None:
    """The option is part of what deepcopy and pickle take along."""
    from squeezoo.compress.runtime.native.block import FusedForward

    forward = FusedForward.__new__(FusedForward)
    forward.__dict__.update(bfloat16=False, _record=None)
    assert copy.deepcopy(forward).bfloat16 is False


def test_all_blocks_of_a_trained_model_run_fused_and_float32_attention_can_be_asked_for() -> None:
    """The published digits model, whose inputs were learned; every block takes part, with either attention. The bound:
    bfloat16 moves inputs by one of 127 levels here and there."""
    reference, exact, fast = (
        squeezoo.load("digits-vit.digits.gpusq-gemm-int8", **how)
        for how in ({"backend": "reference"}, {"backend": "int8", "attention": "float32"}, {"backend": "int8"})
    )
    pixels = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected, exactly, found = (model(pixels) for model in (reference, exact, fast))
    for model, bfloat16 in ((exact, False), (fast, True)):
        forwards = [vars(block).get("forward") for block in model.blocks]
        assert len(forwards) == 3
        assert all(isinstance(forward, FusedForward) and forward.bfloat16 is bfloat16 for forward in forwards)
    assert float((exactly - expected).norm()) <= 0.05 * float(expected.norm())
    assert float((found - expected).norm()) <= 0.2 * float(expected.norm())
    with pytest.raises(RuntimeError, match="unknown attention 'fast'; allowed: auto, float32"):
        squeezoo.load("digits-vit.digits.gpusq-gemm-int8", attention="fast")


@pytest.mark.parametrize(("times", "beyond"), [(1.0, False), (20.0, True)])
def test_a_fused_block_hands_over_bfloat16_numbers(times: float, beyond: bool) -> None:
    """A block of the published digits model with its scores so many times larger: Q, K and V leave their GEMM as
    bfloat16, also where the products then are float32's because |q| |k| passes the reach of 100 binary logarithms.
    Expected: the block in float32, but for the rounding of scores (2^-8 of them) and P."""
    block = squeezoo.load("digits-vit.digits.gpusq-gemm-int8", backend="int8").blocks[0]
    forward = block.forward
    assert isinstance(forward, FusedForward)
    forward.scale, forward._record = forward.scale * times, None
    length, width = 17, forward.gemms[0].in_features
    x = torch.randn(3, length, width, generator=generator(5))
    norm = forward.norms[0]
    normed = torch.nn.functional.layer_norm(x, (width,), norm.weight, norm.bias, norm.eps)
    q, k = forward.gemms[0](normed).view(3, length, 3, forward.heads, forward.head_width).unbind(2)[:2]
    reached = float(q.norm(dim=-1).amax() * k.norm(dim=-1).amax()) * forward.scale * math.log2(math.e)
    assert (reached > 100) is beyond
    mask = torch.zeros(3, 1, 1, length).index_fill_(-1, torch.tensor([2, 9]), -math.inf)
    for given in (None, mask):
        forward.bfloat16 = False
        expected = forward.fused(x, given)
        forward.bfloat16 = True
        found = forward.fused(x, given)
        off = float((found - expected).norm() / (expected - x).norm())
        assert 0 < off < (0.03 if times == 1 else 0.15)
