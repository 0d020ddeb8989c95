"""Quantized attention maps on integers: the native kernel against the definition, and fused blocks against modules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from squeezoo import bench_models
from squeezoo.compress.attention_map import attention_maps
from squeezoo.compress.masks import Pattern
from squeezoo.compress.runtime import int8_supported, native
from squeezoo.compress.runtime.levels import Levels, MapLevels
from squeezoo.compress.runtime.native.block import FusedForward
from torch import Tensor

AVAILABLE, WHY_NOT = native.available()
pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason=WHY_NOT),
    pytest.mark.skipif(not int8_supported()[0], reason=int8_supported()[1]),
]

MINMAX = MapLevels(
    Levels(0.031, 121, 0, 255), Levels(0.029, 140, 0, 255), Levels(1 / 255, 0, 0, 255), Levels(0.033, 3, 0, 255)
)
LSQ = MapLevels(
    Levels(0.02, 128, 1, 255), Levels(0.03, 128, 1, 255), Levels(1 / 100, 128, 1, 255), Levels(0.02, 128, 1, 255)
)
INT4 = MapLevels(Levels(0.4, 7, 0, 15), Levels(0.5, 8, 0, 15), Levels(1 / 15, 0, 0, 15), Levels(0.4, 7, 0, 15))


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def fake(x: Tensor, levels: Levels) -> Tensor:
    low, high = levels.low - levels.zero_point, levels.high - levels.zero_point
    return (x * (1 / torch.tensor(levels.scale))).round().clamp(low, high).double() * levels.scale


def definition(q: Tensor, k: Tensor, v: Tensor, levels: MapLevels, mask: Tensor | None) -> Tensor:
    """Fake quantization of the four factors (ALGORITHMS D.4), products and softmax in float64."""
    q, k, v = (fake(x, of).transpose(1, 2) for x, of in ((q, levels.q), (k, levels.k), (v, levels.v)))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return (fake(scores.softmax(-1).nan_to_num(0.0), levels.p) @ v).transpose(1, 2).flatten(2)


def assert_equal_but_for_flips(found: Tensor, expected: Tensor, levels: MapLevels) -> None:
    """Float32 probabilities that lie within 1e-6 of a rounding boundary move one level of P: rare, and by one step of P
    times one V."""
    error = (found.double() - expected).abs()
    largest_v = levels.v.scale * max(levels.v.zero_point - levels.v.low, levels.v.high - levels.v.zero_point)
    assert float(error.max()) <= 2 * levels.p.scale * largest_v
    assert float((error > 2e-5 * largest_v).double().mean()) < 5e-3


SHAPES = [(1, 1, 1, 4), (2, 9, 2, 16), (2, 37, 3, 20), (3, 197, 2, 32), (2, 65, 2, 48), (1, 128, 4, 64), (1, 70, 2, 80)]
SHAPES += [(1, 33, 1, 131), (1, 31, 3, 7)]


@pytest.mark.parametrize("levels", [MINMAX, LSQ, INT4], ids=["minmax", "lsq", "int4"])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "causal", "nothing valid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_products_are_those_of_the_levels(shape: tuple[int, int, int, int], kind: str, levels: MapLevels) -> None:
    """Expected: the definition, but for float32 in the softmax. Zero points on both sides, clipped values, ragged
    widths and lengths; the same bits on any number of threads."""
    batch, length, heads, width = shape
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, length, 3 * heads * width, generator=generator) * 1.5
    q, k, v = (t.unflatten(-1, (heads, width)) for t in qkv.chunk(3, -1))
    mask: Tensor | None = {
        "none": None,
        "bool": torch.rand(batch, heads, length, length, generator=generator) < 0.5,
        "float": torch.randn(1, heads, length, length, generator=generator) * 3,
        "causal": torch.ones(length, length, dtype=torch.bool).tril(),
        "nothing valid": torch.zeros(batch, 1, length, length, dtype=torch.bool),
    }[kind]
    given = None if kind == "causal" else mask
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append(native.attention(q, k, v, given, causal=kind == "causal", map_levels=levels))
    assert torch.equal(*found)
    assert_equal_but_for_flips(found[0], definition(q, k, v, levels, mask), levels)
    assert kind != "nothing valid" or not found[0].any()


def test_the_largest_sums_are_exact() -> None:
    """Expected by hand: every factor at its largest level. One key has all the probability, which P = 255/256 clips."""
    levels = MapLevels(*(Levels(1.0, 0, 0, 255),) * 2, Levels(1 / 256, 0, 0, 255), Levels(1.0, 0, 0, 255))
    q, k, v = (torch.full((1, 5, 1, 256), 255.0) for _ in range(3))
    k[:, 1:] = 0.0
    expected = torch.full((1, 5, 256), 255 * 255 / 256)
    assert torch.equal(native.attention(q, k, v, map_levels=levels, scale=1.0), expected)


def squeezed(monkeypatch: pytest.MonkeyPatch, method: str) -> Any:
    """A tiny BERT whose attention maps have quantizers, as a checkpoint builds it."""
    factors = {factor: {"method": method, "bits": 8} for factor in "qkpv"}
    recipe = {**bench_models.RECIPE, "attention": factors}
    monkeypatch.setattr(bench_models, "RECIPE", recipe)
    dense = tiny.make("bert")
    return bench_models.squeeze(dense, [tiny.tiny_batch("bert", seed=seed) for seed in (1, 2)])


def fused_blocks(model: torch.nn.Module) -> list[FusedForward]:
    forwards = (vars(module).get("forward") for module in model.modules())
    return [forward for forward in forwards if isinstance(forward, FusedForward)]


@pytest.mark.parametrize("method", ["minmax", "lsq", "pact"])
def test_blocks_with_quantized_maps_run_as_one_call(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Expected: what the same block computes module by module (attention in PyTorch on fake-quantized factors), but for
    inputs that fall to a neighbouring level. Changed levels are seen."""
    model = squeezed(monkeypatch, method).build("int8")
    (forward, *_) = fused_blocks(model)
    x = torch.randn(3, 21, forward.gemms[0].in_features, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(3, 1, 21, 21)
    mask[1, ..., 13:] = torch.finfo(torch.float32).min
    calls: list[int] = []
    whole = FusedForward.fused
    monkeypatch.setattr(FusedForward, "fused", lambda self, *given: (calls.append(1), whole(self, *given))[1])
    for given in (None, mask):
        expected = forward.own((x,), {forward.mask: given})
        found = forward(x, **{forward.mask: given})
        assert float((found - expected).norm()) <= 0.01 * float((expected - x).norm())
    assert len(calls) == 2
    before = forward.map_levels()
    compressor = next(iter(attention_maps(model)))[2]
    for tensor in (*compressor.v.parameters(), *compressor.v.buffers()):
        tensor.mul_(2.0)
    after = forward.map_levels()
    assert before is not None
    assert after is not None
    assert after.v.scale == pytest.approx(2 * before.v.scale, rel=1e-5)
    expected, found = forward.own((x,), {}), forward(x)
    assert float((found - expected).norm()) <= 0.01 * float((expected - x).norm())


def test_other_maps_are_left_to_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """With N:M selection, without a quantizer of one factor, or with one that was never calibrated, the block's own
    forward runs."""
    model = squeezed(monkeypatch, "minmax").build("int8")
    (forward, *_) = fused_blocks(model)
    x = torch.randn(2, 9, forward.gemms[0].in_features, generator=torch.Generator().manual_seed(0))
    compressor = next(iter(attention_maps(model)))[2]
    assert forward._fits(x, None)
    compressor.p.active = False
    assert not forward._fits(x, None)
    compressor.p.active = True
    kept, compressor.k = compressor.k, None
    assert not forward._fits(x, None)
    compressor.k = kept
    assert forward._fits(x, None)
    assert torch.equal(forward(x), forward.fused(x, None))
    compressor.pattern, compressor.active = Pattern(2, 4), True
    assert not forward._fits(x, None)
    assert torch.equal(forward(x), forward.own((x,), {}))
