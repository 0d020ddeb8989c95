"""The cases of nm_attention_cases.py on a GPU, with long keys, every size of head and group, and CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated import emulating
from nm_attention_cases import *  # noqa: F403
from nm_attention_cases import DEVICE, agrees, inputs
from squeezoo.bench_gpu import captured
from squeezoo.compress.masks import Pattern
from squeezoo.compress.runtime.nm_attention import nm_attention

pytestmark = pytest.mark.gpu


def test_they_run_on_the_device() -> None:
    assert DEVICE == "cuda", "TRITON_INTERPRET is set: Triton interprets its kernels on the CPU in this process"


@pytest.mark.parametrize(
    ("queries", "keys", "pattern", "dtype"),
    [
        (385, 385, "2:4", torch.bfloat16),
        (1, 4096, "2:4", torch.float16),
        (130, 4099, "2:4", torch.bfloat16),
        (130, 4099, "2:16", torch.bfloat16),
    ],
)
def test_long_keys(queries: int, keys: int, pattern: str, dtype: torch.dtype) -> None:
    """BERT's heads; full, with a padding mask, and causal. Expected: ``sparse_attention`` on the device."""
    if emulating() and keys > 1000:
        pytest.skip("Triton's interpreter takes many minutes")
    q, k, v = inputs(batch=2, heads=12, groups=12, queries=queries, keys=keys, width=64, value_width=64, dtype=dtype)
    padding = torch.ones(2, 1, 1, keys, dtype=torch.bool, device=DEVICE)
    padding[1, ..., keys // 2 :] = False
    agrees(q, k, v, pattern)
    agrees(q, k, v, pattern, mask=padding)
    agrees(q, k, v, pattern, causal=True)


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [("4:8", torch.float32), ("2:4", torch.bfloat16), ("4:8", torch.bfloat16), ("2:16", torch.bfloat16),
     ("9:256", torch.bfloat16)],
)  # fmt: skip
def test_the_widest_heads(pattern: str, dtype: torch.dtype) -> None:
    """Tiles fit the shared memory of the device, or the reference computes (the last)."""
    agrees(*inputs(queries=5, keys=140, width=256, value_width=256, dtype=dtype), pattern)


@pytest.mark.parametrize("pattern", ["2:4", "2:16"])
def test_equal_bits_run_to_run(pattern: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (1, 2, 133, 64) if emulating() else (4, 12, 385, 64)
    q, k, v = (torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16) for _ in range(3))
    expected = nm_attention(q, k, v, pattern=Pattern.parse(pattern), kernel="triton")
    for _ in range(5):
        assert torch.equal(nm_attention(q, k, v, pattern=Pattern.parse(pattern), kernel="triton"), expected)


@torch.inference_mode()
def test_in_a_cuda_graph() -> None:
    """Replayed with new queries, keys and masks. Expected: the bits of a plain call."""
    q, k, v = inputs(batch=2, queries=33, keys=70, dtype=torch.bfloat16)
    mask = torch.ones(2, 1, 1, 70, dtype=torch.bool, device=DEVICE)
    replay, output = captured(lambda: nm_attention(q, k, v, pattern=Pattern(2, 4), mask=mask, kernel="triton"))
    for seed in (1, 2):
        for old, new in zip((q, k, v), inputs(batch=2, queries=33, keys=70, dtype=torch.bfloat16, seed=seed)):
            old.copy_(new)
        mask[0, ..., 40 + seed :] = False
        replay()
        assert torch.equal(output, nm_attention(q, k, v, pattern=Pattern(2, 4), mask=mask, kernel="triton"))


@pytest.mark.skipif(emulating(), reason="torch.compile writes code for a real GPU")
def test_compiled() -> None:
    """One operator inside a compiled function, which adds the mask and scales the result."""
    q, k, v = inputs(batch=2, queries=33, keys=70)
    mask = torch.ones(2, 1, 1, 70, dtype=torch.bool, device=DEVICE)
    mask[1, ..., 50:] = False

    def function() -> torch.Tensor:
        return nm_attention(q, k, v, pattern=Pattern(2, 4), mask=mask, kernel="triton") * 2

    with torch.no_grad():
        expected = function()
        torch.testing.assert_close(torch.compile(function)(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pattern", ["2:4", "2:16"])
@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_nan_in_a_score_stays_nan(kernel: Any, pattern: str) -> None:
    """A GPU is not waited for to refuse it: the output of that query is NaN, all others stay. 70 keys: the
    last group is cut."""
    q, k, v = inputs(batch=2, queries=33, keys=70)
    expected = nm_attention(q, k, v, pattern=Pattern.parse(pattern), kernel=kernel)
    q[1, 1, 5, 0] = float("nan")
    found = nm_attention(q, k, v, pattern=Pattern.parse(pattern), kernel=kernel)
    assert found[1, 1, 5].isnan().all()
    found[1, 1, 5] = expected[1, 1, 5]
    assert torch.equal(found, expected)
