"""The plots of one card, made from the card alone."""

from __future__ import annotations

from pathlib import Path

from ..eval.task import Score
from . import numbers
from .card import COMPRESSED, DENSE, Card
from .plots import EXPECTED, FOLDER, LATENCY, PLOTS, SIZE, Curve, Point, draw_expected, draw_scores, write_plot
from .search import Search
from .tables import condition


def card_plots(card: Card) -> dict[str, bytes]:
    """PNG files by name, those of `plots.PLOTS` that the card has the numbers for.

    The score is the first compressed one; latency is that of the first condition measured, not of the best one.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    found: dict[str, bytes] = {}
    score = next((row.score for row in card.scores if row.variant == COMPRESSED), None)
    dense = None if score is None else card.score(DENSE, score)
    if score is not None and dense is not None:
        data = card.data_of(score).name
        y_label, title = axis_name(score), f"{card.name}: {data} {score.split}"
        if card.speeds:
            speed = card.speeds[0]
            timings = {DENSE: speed.dense, COMPRESSED: speed.compressed}
            points = [
                Point(_name(card, variant), timings[variant].median_ms, axis_value(one),
                      (timings[variant].p10_ms, timings[variant].p90_ms), variant == DENSE, one.complete)
                for variant, one in ((DENSE, dense), (COMPRESSED, score))
            ]  # fmt: skip
            label = f"latency, ms per batch (median, 10th to 90th percentile)\n{condition(speed)}"
            found[LATENCY] = draw_scores(
                points, x_label=label, y_label=y_label, title=title, higher_is_better=score.higher_is_better
            )
        sizes = {DENSE: card.size.true_dense_bytes, COMPRESSED: card.size.true_bytes}
        points = [
            Point(_name(card, variant), sizes[variant] / 1e6, axis_value(one), None, variant == DENSE, one.complete)
            for variant, one in ((DENSE, dense), (COMPRESSED, score))
        ]
        found[SIZE] = draw_scores(
            points, x_label="all files on disk, MB", y_label=y_label, title=title,
            higher_is_better=score.higher_is_better,
        )  # fmt: skip
    if card.search is not None:
        search = card.search
        found[EXPECTED] = draw_expected(
            [curve_of(search, card.name)],
            y_label=expected_name(search),
            title=f"{card.name}: best {numbers.shown(search.metric, search.best_value)} of {len(search.values)} trials",
        )
    return found


def write_plots(card: Card, folder: str | Path) -> list[Path]:
    """Draw the plots of a card into ``folder/plots``; those that it has no numbers for (any more) are removed.

    Call it before `render.write_card`, which shows the plots that lie there.
    """
    made = card_plots(card)
    place = Path(folder) / FOLDER
    for name in PLOTS:
        if name not in made:
            (place / name).unlink(missing_ok=True)
    return [write_plot(png, place / name) for name, png in made.items()]


def curve_of(search: Search, name: str, series: int = 0) -> Curve:
    """The expected validation performance of a search, in the unit of `axis_name`."""
    mean, sd = search.expected
    scale = 100 if search.metric in numbers.PERCENT else 1
    minutes = None if search.mean_seconds is None else search.mean_seconds / 60
    return Curve(name, [scale * m for m in mean], [scale * s for s in sd], minutes, series)


def expected_name(search: Search) -> str:
    """``expected validation F1, %``."""
    return f"expected validation {_name_of(search.metric, search.higher_is_better)}"


def axis_name(score: Score) -> str:
    """``F1, %`` or ``perplexity (lower is better)``."""
    return _name_of(score.metric, score.higher_is_better)


def _name_of(metric: str, higher_is_better: bool) -> str:
    unit = ", %" if metric in numbers.PERCENT else ""
    return numbers.metric_name(metric) + unit + ("" if higher_is_better else " (lower is better)")


def axis_value(score: Score) -> float:
    return 100 * score.value if score.metric in numbers.PERCENT else score.value


def _name(card: Card, variant: str) -> str:
    return f"{DENSE}, {card.size.true_dense_dtype}" if variant == DENSE else card.recipe.name
