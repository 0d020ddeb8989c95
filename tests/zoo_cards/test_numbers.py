"""Numbers as people read them; expected texts were written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from squeezoo import catalog, zoo_cards
from squeezoo.eval.task import Score
from squeezoo.zoo_cards import numbers


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (2.307, "2.30x"),
        (1.0, "1.00x"),
        (0.9999, "0.99x, slower"),
        (0.5, "0.50x, slower"),
        (2.3, "2.30x"),
        (1.1, "1.10x"),
    ],
)
def test_speed_up_rounds_down(ratio: float, text: str) -> None:
    """Source: cutting after two decimals; 2.3 and 1.1 are not exact in binary and must not lose a hundredth."""
    assert numbers.speed_up(ratio) == text


def test_the_list_and_the_cards_say_the_same_speed_up() -> None:
    """`squeezoo list` against each published card's README: one function rounds both."""
    records, table = catalog.zoo("*")
    shown = list(next(column for column in table.columns if column.header == "speed-up").cells)
    assert len(records) == len(shown) > 0
    for record, cell in zip(records, shown, strict=True):
        page = (Path(zoo_cards.__file__).parent / "cards" / record["name"] / "README.md").read_text(encoding="utf-8")
        assert f"Best speed-up over dense {cell} (" in page
        assert cell == numbers.speed_up(record["speed_up"])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (812, "812 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (6_635_520, "6.64 MB"),
        (999_600, "1 MB"),
        (1_200_000_000, "1.2 GB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    """Source: decimal units, three significant digits."""
    assert numbers.size(count) == text


@pytest.mark.parametrize(("ms", "text"), [(0.1234, "0.123"), (9.996, "10.00"), (12.34, "12.3"), (1234.5, "1,234")])
def test_milliseconds(ms: float, text: str) -> None:
    """Source: three significant digits (a fourth may appear when rounding crosses a power of ten)."""
    assert numbers.milliseconds(ms) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0.4 s"), (45, "45 s"), (720, "12 min"), (12_240, "3.4 h")])
def test_durations(seconds: float, text: str) -> None:
    """Source: 12 x 60 = 720; 3.4 x 3600 = 12,240."""
    assert numbers.duration(seconds) == text


def test_scores_and_differences(new_score: Callable[..., Score]) -> None:
    """Source: shares as percentages and points, correlations and perplexities in their own unit."""
    assert numbers.value(new_score(0.91743)) == "91.74 %"
    assert numbers.difference(new_score(0.914), new_score(0.9174)) == "-0.34 points"
    assert numbers.value(new_score(0.5211, metric="matthews")) == "0.5211"
    assert numbers.difference(new_score(18.5, metric="perplexity"), new_score(18.25, metric="perplexity")) == "+0.25"
    assert numbers.metric_name("exact_match") == "exact match"
