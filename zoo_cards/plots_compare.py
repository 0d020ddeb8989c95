"""The plots of a comparison: its first column against latency and size, and the trials behind its variants."""

from __future__ import annotations

from ..eval.task import Score
from .compare import Comparison, Variant
from .plots import EXPECTED, LATENCY, SIZE, Point, draw_expected, draw_scores
from .plots_card import axis_name, axis_value, curve_of, expected_name


def comparison_plots(comparison: Comparison) -> dict[str, bytes]:
    """PNG by the names of `plots.PLOTS`: of the first column, and of the condition of speed that most variants have.

    A variant has the same colour and marker in all of them.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
    """
    found: dict[str, bytes] = {}
    series = {row.name: index for index, row in enumerate(comparison.variants)}
    scored: list[tuple[Variant, Score]] = []
    if comparison.columns:
        column = comparison.columns[0]
        scored = [(row, score) for row in comparison.rows if (score := comparison.score(row, column)) is not None]

    def point(row: Variant, score: Score, x: float, spread: tuple[float, float] | None = None) -> Point:
        dense = row.dense is None
        return Point(row.name, x, axis_value(score), spread, dense, score.complete, series.get(row.name, 0))

    def draw(points: list[Point], x_label: str) -> bytes:
        return draw_scores(
            points, x_label=x_label, y_label=axis_name(column), higher_is_better=column.higher_is_better,
            title=f"{comparison.base}: {column.task} {column.split}",
        )  # fmt: skip

    words = max(comparison.timed, key=lambda w: sum(w in row.speeds for row in comparison.variants), default="")
    timed = []
    for row, score in scored:
        for speed in row.speeds.get(words, ())[:1]:
            time = speed.dense if row.dense is None else speed.compressed
            timed.append(point(row, score, time.median_ms, (time.p10_ms, time.p90_ms)))
    if timed:
        found[LATENCY] = draw(timed, f"latency, ms per batch (median, 10th to 90th percentile)\n{words}")
    if scored:
        found[SIZE] = draw([point(row, score, _bytes(row) / 1e6) for row, score in scored], "all files on disk, MB")
    return found | _trials(comparison, series)


def _trials(comparison: Comparison, series: dict[str, int]) -> dict[str, bytes]:
    """The curves of all searches in one picture, where they chose by the same metric on the same data."""
    searches = [(row, row.card.search) for row in comparison.variants if row.card.search is not None]
    if len({(search.task, search.metric, search.split) for _, search in searches}) != 1:
        return {}
    first = searches[0][1]
    curves = [curve_of(search, row.name, series[row.name]) for row, search in searches]
    title = f"{comparison.base}: {first.task} {first.split}"
    return {EXPECTED: draw_expected(curves, y_label=expected_name(first), title=title)}


def _bytes(row: Variant) -> int:
    return row.card.size.true_dense_bytes if row.dense is None else row.card.size.true_bytes
