"""The native GEMM without the zeros of N:M weights: the same integers as with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezoo.compress.masks import Pattern, check_nm, nm_mask
from squeezoo.compress.runtime import native
from squeezoo.compress.runtime.levels import Levels
from squeezoo.compress.runtime.native import matrix
from torch import Tensor

AVAILABLE, WHY_NOT = native.available()
needs_native = pytest.mark.skipif(not AVAILABLE, reason=WHY_NOT)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def weights(outputs: int, inputs: int, pattern: str | None, seed: int) -> Tensor:
    """int8 [O, I] with the extremes -128 and 127, masked to the pattern."""
    q_OI = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    q_OI[:, ::3] = torch.where(q_OI[:, ::3] > 0, 127, -128).to(torch.int8)
    return q_OI if pattern is None else q_OI * nm_mask(q_OI.float(), Pattern.parse(pattern))


def two_of_four(q_OI: Tensor) -> bool:
    return check_nm(q_OI.float(), Pattern(2, 4))


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 40), windows=st.integers(1, 9), outputs=st.integers(1, 140), zero_point=st.integers(0, 255),
    pattern=st.sampled_from(["2:4", "1:4", "2:8", "4:8", "1:2", "4:16", "2:16", "1:8"]), threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_sums_are_exact(
    rows: int, windows: int, outputs: int, zero_point: int, pattern: str, threads: int, seed: int
) -> None:
    """Expected: int64 arithmetic, every bit (144 * 255 * 128 = 4.7e6 is a float32)."""
    torch.set_num_threads(threads)
    q_OI = weights(outputs, 16 * windows, pattern, seed)
    level_TI = torch.randint(
        0, 256, (rows, 16 * windows), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed + 1)
    )
    gemm = native.NativeGemm(q_OI, torch.ones(outputs), None, sparse=True)
    assert gemm.span in (8, 16)
    assert gemm.compact == (pattern in ("2:4", "1:4", "1:2", "1:8") or two_of_four(q_OI))
    found_TO = gemm(level_TI, Levels(1.0, zero_point, 0, 255))
    assert torch.equal(found_TO.long(), (level_TI.long() - zero_point) @ q_OI.long().t())


@needs_native
@pytest.mark.parametrize(
    ("pattern", "span"),
    [("2:4", 8), ("4:8", 8), ("1:2", 8), ("1:4", 16), ("2:8", 16), ("4:16", 16), ("1:8", 16), ("3:4", 4), (None, 4)],
)
def test_the_span_is_the_widest_that_the_weights_allow(pattern: str | None, span: int) -> None:
    """At most 4 weights in so many inputs: 2:4 has 4 in 8, 1:4 has 4 in 16, 3:4 has too many."""
    assert native.NativeGemm(weights(70, 96, pattern, 0), torch.ones(70), None, sparse=True).span == span


@needs_native
def test_one_weight_too_many_and_ragged_inputs_stay_dense() -> None:
    q_OI = weights(33, 64, "2:4", 0)
    q_OI[17, 40:48] = torch.tensor([1, 1, 0, 0, 1, 1, 1, 0])
    assert native.NativeGemm(q_OI, torch.ones(33), None, sparse=True).span == 4
    assert native.NativeGemm(weights(33, 40, "2:4", 0), torch.ones(33), None, sparse=True).span == 4


@needs_native
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("rows", [1, 4, 29, 700])
def test_equal_to_the_dense_layout_to_the_bit(rows: int, activation: str | None) -> None:
    """Scales, bias, residual, activation and emitted levels come after the sums, which are equal."""
    q_OI, seeded = weights(130, 64, "2:4", 3), torch.Generator().manual_seed(5)
    scale_O, bias_O = torch.rand(130, generator=seeded) * 1e-3, torch.randn(130, generator=seeded)
    level_TI = torch.randint(0, 256, (rows, 64), dtype=torch.uint8, generator=seeded)
    residual_TO = torch.randn(rows, 130, generator=seeded)
    levels, emitted = Levels(0.5, 128, 1, 255), Levels(0.25, 20, 0, 255)
    for out, residual in ((None, residual_TO), (emitted, None)):
        sparse, dense = (
            native.NativeGemm(q_OI, scale_O, bias_O, activation, sparse=how)(level_TI, levels, out, residual)  # type: ignore[arg-type]
            for how in (True, False)
        )
        assert torch.equal(sparse, dense)


@needs_native
@pytest.mark.parametrize("faster", [True, False])
def test_what_is_faster_here_is_what_runs(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "sparse_is_faster", lambda: faster)
    q_OI = weights(64, 64, "2:4", 0)
    assert native.NativeGemm(q_OI, torch.ones(64), None).span == (8 if faster else 4)


@needs_native
def test_the_measurement_gives_an_answer() -> None:
    assert matrix.sparse_is_faster() in (True, False)
