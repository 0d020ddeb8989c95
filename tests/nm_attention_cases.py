"""The N:M attention kernel against the reference vector, the slow definition and ``sparse_attention``.

Runs twice: in Triton's interpreter on the CPU (tests/compress/test_nm_attention.py starts it, in a process of its own),
and on a GPU (tests/gpu takes the cases over). Both may run in one session.
Inputs are small multiples of 1/4, so that scores are exact in any order of summation, and ties occur.
Legend: B batch, H heads, G groups of heads, Q queries, K keys, D head dimension, E value dimension.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import emulating
from maps import Level, numbers, reference
from squeezoo.compress.attention import sparse_attention
from squeezoo.compress.attention_map import AttentionMapCompressor
from squeezoo.compress.masks import Pattern
from squeezoo.compress.runtime.nm_attention import NmAttention, nm_attention, nm_attention_operator
from squeezoo.compress.runtime.triton_support import interpreting
from torch import Tensor

DEVICE = "cpu" if interpreting() and not emulating() else "cuda"
VECTOR = json.loads((Path(__file__).parent / "vectors" / "attention_nm.json").read_text(encoding="utf-8"))
CASES = [name for name, value in VECTOR.items() if isinstance(value, dict)]
# The reference rounds 16-bit probabilities after the division, the kernel before it, and both the output: some units in
# the last place of values up to 2.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def inputs(
    batch: int = 1, heads: int = 2, groups: int = 2, queries: int = 7, keys: int = 37, width: int = 16,
    value_width: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def quarter(*shape: int) -> Tensor:
        return (torch.randint(-6, 7, shape, generator=generator) / 4).to(DEVICE, dtype)

    return (
        quarter(batch, heads, queries, width),
        quarter(batch, groups, keys, width),
        quarter(batch, groups, keys, value_width),
    )


def agrees(q: Tensor, k: Tensor, v: Tensor, pattern: str, causal: bool = False, **options: Any) -> None:
    """Kernel, ``sparse_attention`` and (bool masks, float32) the definition in float64 give the same."""
    found = nm_attention(q, k, v, pattern=Pattern.parse(pattern), causal=causal, kernel="triton", **options)
    mask = options.pop("mask", None)
    if causal:
        both = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        mask = both if mask is None else mask & both
    expected, _ = sparse_attention(q, k, v, pattern=Pattern.parse(pattern), mask=mask, **options)
    assert found.dtype == v.dtype
    assert found.shape == expected.shape
    assert float((found.float() - expected.float()).abs().max()) <= TOLERANCE[v.dtype]
    if v.dtype == torch.float32 and (mask is None or mask.dtype == torch.bool):
        mask_BHQK = None if mask is None else mask.cpu().reshape((1,) * (4 - mask.ndim) + mask.shape)
        exact, _, _ = reference(q.cpu(), k.cpu(), v.cpu(), Pattern.parse(pattern), mask_BHQK, **options)
        torch.testing.assert_close(found.cpu().double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_vector(case: str) -> None:
    """O of vectors/attention_nm.json (float64 autograd, closed form and online softmax agree)."""
    expected = VECTOR[case]
    causal = expected.get("causal", False)
    q, k, v = (numbers(VECTOR[name + ("c" if causal else "")]).float().to(DEVICE) for name in "QKV")
    mask = torch.tensor(expected["keymask"]).bool()[:, None, None, :].to(DEVICE) if "keymask" in expected else None
    pattern = Pattern(expected["N"], expected["M"])
    found = nm_attention(
        q, k, v, pattern=pattern, mask=mask, causal=causal, renormalize=expected.get("renorm", False), kernel="triton"
    )
    torch.testing.assert_close(found.cpu().double(), numbers(expected["O"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "pattern", ["1:2", "1:4", "2:4", "3:4", "2:8", "7:8", "2:16", "15:16", "3:64", "1:128", "250:256"]
)
def test_patterns(pattern: str) -> None:
    """Both ways of selecting, few and many kept; several tiles and a ragged tail for every M."""
    keys = 300 if int(pattern.split(":")[1]) > 64 else 131
    agrees(*inputs(heads=1, groups=1, queries=4, keys=keys), pattern)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "2:16"])
def test_sixteen_bits(pattern: str, dtype: torch.dtype) -> None:
    agrees(*inputs(dtype=dtype, keys=70), pattern)


@pytest.mark.parametrize("pattern", ["2:4", "3:8", "2:16", "13:16"])
def test_ties_keep_the_lower_keys(pattern: str) -> None:
    """Queries of 0 make all scores equal: by A.4 members 0..N-1 of each group are kept, each with P = 1/K."""
    n, m = (int(x) for x in pattern.split(":"))
    q, k, v = inputs(keys=4 * m - 3, queries=3)
    found = nm_attention(torch.zeros_like(q), k, v, pattern=Pattern(n, m), kernel="triton")
    keys = torch.arange(k.shape[2], device=DEVICE)
    expected = v[:, :, keys % m < n].sum(2, keepdim=True) / k.shape[2]
    torch.testing.assert_close(found, expected.expand_as(found), rtol=0, atol=1e-6)


@pytest.mark.parametrize("keys", [1, 3, 5, 64, 65])
def test_key_lengths_that_are_no_multiple(keys: int) -> None:
    agrees(*inputs(keys=keys, queries=1), "2:4")
    agrees(*inputs(keys=keys, queries=2, heads=1, groups=1), "2:16")


@pytest.mark.parametrize("pattern", ["2:4", "2:16"])
@pytest.mark.parametrize("kind", ["padding", "query", "full", "bias", "float padding", "half bias"])
def test_masks(kind: str, pattern: str) -> None:
    """Bool and additive, broadcast over any dimension; the second sample's last query has no valid key."""
    q, k, v = inputs(batch=2, queries=5, keys=23)
    generator = torch.Generator().manual_seed(3)
    full = torch.rand(2, 2, 5, 23, generator=generator) < 0.6
    full[1, :, 4] = False
    bias = torch.randint(-4, 5, (1, 2, 5, 23), generator=generator) / 4
    mask = {
        "padding": full[:, :1, :1],
        "query": full[0, 0],
        "full": full,
        "bias": bias.masked_fill(~full[:1], float("-inf")),
        "float padding": torch.zeros(2, 1, 1, 23).masked_fill(~full[:, :1, :1], torch.finfo(torch.float32).min),
        "half bias": bias.half().masked_fill(~full[:1], torch.finfo(torch.float16).min),
    }[kind]
    agrees(q, k, v, pattern, mask=mask.to(DEVICE))


@pytest.mark.parametrize("pattern", ["2:4", "2:16"])
def test_a_row_without_a_valid_key_is_zero(pattern: str) -> None:
    """C.2. Also where whole tiles before the first valid key are masked."""
    q, k, v = inputs(queries=3, keys=150, heads=1, groups=1)
    mask = torch.zeros(3, 150, dtype=torch.bool)
    mask[1, 147:] = True
    found = nm_attention(q, k, v, pattern=Pattern.parse(pattern), mask=mask.to(DEVICE), kernel="triton")
    assert torch.equal(found[:, :, [0, 2]], torch.zeros_like(found[:, :, [0, 2]]))
    agrees(q, k, v, pattern, mask=mask.to(DEVICE))
    smallest = torch.zeros(3, 150).masked_fill(~mask, torch.finfo(torch.float32).min)  # as transformers writes it
    agrees(q, k, v, pattern, mask=smallest.to(DEVICE))
    additive = nm_attention(q, k, v, pattern=Pattern.parse(pattern), mask=smallest.to(DEVICE), kernel="triton")
    assert torch.equal(additive, found)


@pytest.mark.parametrize("pattern", ["2:4", "2:16"])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (3, 40), (70, 66)])
def test_causal(queries: int, keys: int, pattern: str) -> None:
    """Against an explicit triangular mask: alone and beside a padding mask."""
    q, k, v = inputs(queries=queries, keys=keys, heads=1, groups=1)
    agrees(q, k, v, pattern, causal=True)
    padding = torch.ones(1, 1, 1, keys, dtype=torch.bool, device=DEVICE)
    padding[..., 2:7] = False
    agrees(q, k, v, pattern, causal=True, mask=padding)


@pytest.mark.parametrize("pattern", ["2:4", "2:16"])
@pytest.mark.parametrize("first_key", [1, 4, 7])
def test_groups_are_aligned_at_absolute_keys(first_key: int, pattern: str) -> None:
    agrees(*inputs(keys=21, queries=4), pattern, first_key=first_key)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (3, 1)])
def test_grouped_query_heads(heads: int, groups: int) -> None:
    agrees(*inputs(heads=heads, groups=groups, queries=4, keys=19), "2:4")


@pytest.mark.parametrize(("width", "value_width"), [(1, 5), (33, 20), (64, 64), (80, 96), (128, 16)])
def test_head_dimensions(width: int, value_width: int) -> None:
    agrees(*inputs(width=width, value_width=value_width, queries=3, keys=13, heads=1, groups=1), "2:4")


def test_any_strides_scale_and_renormalisation() -> None:
    """Heads behind tokens in memory, every second number of a wider tensor, keys transposed."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(queries=5, keys=22))
    wide = torch.stack((q, q + 1), dim=-1).flatten(-2)
    agrees(wide[..., ::2], k.transpose(2, 3).contiguous().transpose(2, 3), v, "2:4", scale=0.5, renormalize=True)
    agrees(q, k, v, "2:16", scale=0.125, renormalize=True)


def test_nothing_to_do() -> None:
    """No queries: an empty output. No keys: zeros."""
    q, k, v = inputs()
    assert nm_attention(q[:, :, :0], k, v, pattern=Pattern(2, 4), kernel="triton").shape == (1, 2, 0, 16)
    assert not nm_attention(q, k[:, :, :0], v[:, :, :0], pattern=Pattern(2, 4), kernel="triton").any()


def test_nan_stays_in_its_row() -> None:
    """Where the reference raises, the row of a NaN query is NaN and the others are untouched."""
    q, k, v = inputs(queries=4)
    expected = nm_attention(q, k, v, pattern=Pattern(2, 4), kernel="triton")
    q[0, 0, 2, 3] = float("nan")
    found = nm_attention(q, k, v, pattern=Pattern(2, 4), kernel="triton")
    assert found[0, 0, 2].isnan().all()
    assert torch.equal(found[0, 0, [0, 1, 3]], expected[0, 0, [0, 1, 3]])
    assert torch.equal(found[0, 1], expected[0, 1])


@pytest.mark.parametrize("seed", range(2))
def test_random_scores(seed: int) -> None:
    """Continuous values without ties: sums in another order move scores by 1e-6, too little to change the choice."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, size, 24, generator=generator).to(DEVICE) for size in (11, 50, 50))
    mask = (torch.rand(1, 1, 11, 50, generator=generator) < 0.8).to(DEVICE)
    for pattern in ("2:4", "5:16"):
        options: dict[str, Any] = dict(pattern=Pattern.parse(pattern), mask=mask)
        expected, _ = sparse_attention(q, k, v, **options)
        torch.testing.assert_close(nm_attention(q, k, v, kernel="triton", **options), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(emulating(), reason="it traces, as torch.compile does, for a real GPU")
def test_the_operator_keeps_torchs_rules() -> None:
    """``torch.library.opcheck``: schema, fake tensors (shape, dtype, strides), autograd registration, dispatch."""
    q, k, v = inputs()
    mask = torch.ones(1, 1, 1, 37, dtype=torch.bool, device=DEVICE)
    torch.library.opcheck(nm_attention_operator(), (q, k, v, mask, 2, 4, 0.25, False, False, 1))


@torch.no_grad()
def test_an_attached_map_runs_through_the_kernel() -> None:
    """Expected: what the compressor gave before, without probabilities; in training it computes as before."""
    q, k, v = inputs(batch=2, queries=5, keys=13)
    compressor = AttentionMapCompressor(Pattern(2, 4), q=Level("q")).to(DEVICE).eval()
    compressor.active = True
    mask = torch.ones(2, 1, 1, 13, dtype=torch.bool, device=DEVICE)
    mask[1, ..., 9:] = False
    expected, _ = compressor(q, k, v, mask, 0.3, 0.0, 3)
    compressor.kernel = NmAttention(Pattern(2, 4), renormalize=False)
    found, probs = compressor(q, k, v, mask, 0.3, 0.0, 3)
    assert probs is None
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert compressor.train()(q, k, v, mask, 0.3, 0.0, 3)[1] is not None
