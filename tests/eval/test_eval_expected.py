"""Expected validation performance against its authors' code, by counting all draws, and its limits."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezoo.eval.expected import expected_validation_performance

VECTOR = json.loads(
    (Path(__file__).parents[1] / "vectors" / "expected_validation_performance.json").read_text(encoding="utf-8")
)
FINITE = st.floats(-100, 100, allow_nan=False)


@pytest.mark.parametrize("which", ["1", "2"])
def test_equals_the_authors_code(which: str) -> None:
    """vectors/expected_validation_performance.json (dodgejesse/show_your_work); 2 has equal values."""
    mean, sd = expected_validation_performance(VECTOR[f"values{which}"])
    assert mean == pytest.approx(VECTOR[f"mean{which}"], rel=1e-6)
    assert sd == pytest.approx(VECTOR[f"std{which}"], rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=4), st.booleans())
def test_equals_the_mean_over_all_draws(values: list[float], higher: bool) -> None:
    """By definition: every sequence of n draws with replacement, counted one by one."""
    mean, sd = expected_validation_performance(values, higher)
    for n in range(1, len(values) + 1):
        best = [(max if higher else min)(draw) for draw in itertools.product(values, repeat=n)]
        assert mean[n - 1] == pytest.approx(statistics.fmean(best), abs=1e-6)
        assert sd[n - 1] == pytest.approx(statistics.pstdev(best), abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=30))
def test_lower_is_better_is_the_mirror_image(values: list[float]) -> None:
    """ALGORITHMS E.5: negate, apply, negate; the order of the trials does not matter; it never gets worse with n."""
    mean, sd = expected_validation_performance(values, higher_is_better=False)
    mirror, same = expected_validation_performance([-v for v in reversed(values)])
    assert mean == pytest.approx([-m for m in mirror], abs=1e-9)
    assert sd == pytest.approx(same, abs=1e-9)
    assert len(mean) == len(values)  # never extrapolated
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(mean))


@pytest.mark.parametrize("values", [[], [0.5, float("nan")], [float("inf")]])
def test_refuses_what_has_no_best(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite validation values"):
        expected_validation_performance(values)
