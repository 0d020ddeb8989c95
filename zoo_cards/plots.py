"""Plots of cards and comparisons as PNG: score against latency and size with the Pareto front, and trials.

Drawn by matplotlib's Agg (extra ``eval``) with its default settings whatever the user's are, so the same card gives the
same bytes with the same matplotlib. Colours: Okabe and Ito 2008, told apart by colour-blind people; markers differ too.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "plots"
LATENCY, SIZE, EXPECTED = "score_latency.png", "score_size.png", "expected_validation.png"
# every plot that a card can have, with what it shows
PLOTS = {
    LATENCY: "Score against latency; the dashed line is the Pareto front.",
    SIZE: "Score against the size of all files; the dashed line is the Pareto front.",
    EXPECTED: "Expected validation performance of the best of n trials, with one standard deviation.",
}
INK, GRID = "#1a1a1a", "#dddddd"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "^", "D", "v", "P", "X", "<", ">")
_DPI = 150


@dataclass(frozen=True)
class Point:
    """One variant in a plot.

    Args:
        x: what it costs; ``spread`` its 10th and 90th percentile. y: its score.
        dense: the model that the others are compared with. complete: False for a sample, which no front holds.
        series: colour and marker, the same for one variant in all plots.
    """

    name: str
    x: float
    y: float
    spread: tuple[float, float] | None = None
    dense: bool = False
    complete: bool = True
    series: int = 0


@dataclass(frozen=True)
class Curve:
    """Expected validation performance of one search: E_n and sd_n for n = 1 .. N; ``minutes`` of a mean trial;
    ``series`` as of a `Point`."""

    name: str
    mean: Sequence[float]
    sd: Sequence[float]
    minutes: float | None = None
    series: int = 0


def pareto_front(points: Sequence[Point], higher_is_better: bool = True) -> list[Point]:
    """The complete points that no other complete one beats in both, from cheap to dear; of equal ones the first."""
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted((p for p in points if p.complete), key=lambda p: (p.x, -sign * p.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def draw_scores(
    points: Sequence[Point], *, x_label: str, y_label: str, title: str, higher_is_better: bool = True
) -> bytes:
    """Score against cost as PNG, with the Pareto front where it has more than one point.

    Raises:
        ImportError: matplotlib is missing; the message names the extra. ValueError: no points.
    """
    if not points:
        raise ValueError("a plot needs at least one point")
    with _figure(title) as (figure, axes):
        front = pareto_front(points, higher_is_better)
        if len(front) > 1:
            xs, ys = [p.x for p in front], [p.y for p in front]
            line = {"color": "#777777", "linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 1}
            axes.plot(xs, ys, drawstyle="steps-post", label="Pareto front", **line)
        for point in points:
            colour, marker = (INK, "s") if point.dense else _look(point.series)
            if point.spread is not None:
                bars = [[max(0.0, point.x - point.spread[0])], [max(0.0, point.spread[1] - point.x)]]
                axes.errorbar([point.x], [point.y], xerr=bars, fmt="none", ecolor=colour, capsize=3, elinewidth=1.2)
            fill, edge, width = (colour, "white", 0.8) if point.complete else ("white", colour, 1.5)
            axes.plot(
                [point.x], [point.y], marker=marker, markersize=8, markerfacecolor=fill, markeredgecolor=edge,
                markeredgewidth=width, linestyle="none", zorder=3,
                label=point.name + ("" if point.complete else " (sample)"),
            )  # fmt: skip
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        _limits(axes, points)
        better = f"better: {'up' if higher_is_better else 'down'} and left"
        axes.text(0.99, 0.02 if higher_is_better else 0.98, better, transform=axes.transAxes, ha="right",
                  va="bottom" if higher_is_better else "top", fontsize=8, color="#555555")  # fmt: skip
        _legend(figure, len(points) + (len(front) > 1))
        return _png(figure)


def draw_expected(curves: Sequence[Curve], *, y_label: str, title: str) -> bytes:
    """E_n with one standard deviation against the number of trials as PNG; one curve gets an axis of training time.

    Raises:
        ImportError: matplotlib is missing; the message names the extra. ValueError: no curves.
    """
    if not curves:
        raise ValueError("a plot of expected validation performance needs at least one search")
    with _figure(title) as (figure, axes):
        from matplotlib.ticker import MaxNLocator

        for curve in curves:
            colour, marker = _look(curve.series)
            trials = list(range(1, len(curve.mean) + 1))
            axes.plot(trials, curve.mean, color=colour, marker=marker, markersize=5, linewidth=1.6, label=curve.name)
            low, high = [m - s for m, s in zip(curve.mean, curve.sd)], [m + s for m, s in zip(curve.mean, curve.sd)]
            axes.fill_between(trials, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("trials n")
        axes.set_ylabel(y_label)
        minutes = curves[0].minutes if len(curves) == 1 else None
        if minutes:
            top = axes.secondary_xaxis("top", functions=(lambda n: n * minutes, lambda t: t / minutes))
            top.set_xlabel("training time, minutes (n x mean of a trial)")
        if len(curves) > 1:
            _legend(figure, len(curves))
        return _png(figure)


def write_plot(png: bytes, path: str | Path) -> Path:
    """Write a PNG file: the old one or the whole new one, whenever the writer dies."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(png)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def plot_names(folder: str | Path) -> list[str]:
    """Which of `PLOTS` lie in ``folder/plots``."""
    return [name for name in PLOTS if (Path(folder) / FOLDER / name).is_file()]


@contextmanager
def _figure(title: str) -> Iterator[tuple[Any, Any]]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'squeezoo[eval]'") from error
    style: Any = {
        **{name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")},
        "font.size": 10, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "axes.grid": True,
        "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.spines.top": False,
        "axes.spines.right": False, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titlepad": 10,
        "xtick.color": INK, "ytick.color": INK,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 4.4), dpi=_DPI, layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        yield figure, axes


def _look(series: int) -> tuple[str, str]:
    """6 colours and 8 markers: 24 different pairs."""
    return _COLOURS[series % len(_COLOURS)], _MARKERS[series % len(_MARKERS)]


def _limits(axes: Any, points: Sequence[Point]) -> None:
    """Costs from 0, as a length says how much; scores with room around them, wider for two than for none between."""
    highest = max(max(p.x, p.spread[1] if p.spread else p.x) for p in points)
    axes.set_xlim(0, 1.08 * highest)
    low, high = min(p.y for p in points), max(p.y for p in points)
    room = 0.18 * (high - low) or 0.02 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _legend(figure: Any, entries: int) -> None:
    figure.set_figheight(4.2 + 0.2 * -(-entries // 3))
    figure.legend(loc="outside lower center", ncols=min(entries, 3), frameon=False, fontsize=9, handletextpad=0.4)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()
