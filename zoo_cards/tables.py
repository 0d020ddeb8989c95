"""Tables of cards: built once as a `Grid` of text, shown as Markdown (model card, README) or by rich (terminal)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..eval.speed import Speed, Timing
from ..eval.task import Score
from . import numbers
from .card import COMPRESSED, DENSE, Card, conditions

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Grid:
    """A table as text; the first ``left`` columns hold words, those after them numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def markdown(self) -> str:
        rules = ["---" if column < self.left else "---:" for column in range(len(self.header))]
        cells = [
            [cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (self.header, rules, *self.rows)
        ]
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)

    def rich(self, title: str | None = None) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title)
        for column, name in enumerate(self.header):
            table.add_column(name, justify="left" if column < self.left else "right")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))  # Text: square brackets are no markup
        return table


def results_grid(card: Card) -> Grid:
    """One row per task, split and metric; one column per variant, dense first and compressed last."""
    others = list(dict.fromkeys(r.variant for r in card.scores if r.variant not in (DENSE, COMPRESSED)))
    rows = []
    for score in {conditions(r.score): r.score for r in card.scores}.values():
        values = {r.variant: r.score for r in card.scores if conditions(r.score) == conditions(score)}
        rows.append([
            card.data_of(score).name,
            score.split,
            f"{score.samples:,}" if score.complete else f"{score.samples:,} (sample)",
            numbers.metric_name(score.metric) + ("" if score.higher_is_better else " (lower is better)"),
            *(numbers.value(values[name]) if name in values else "-" for name in (DENSE, *others, COMPRESSED)),
            numbers.difference(values[COMPRESSED], values[DENSE]) if COMPRESSED in values and score.complete else "-",
        ])  # fmt: skip
    return Grid(["data", "split", "rows", "metric", DENSE, *others, COMPRESSED, "difference"], rows, left=2)


def size_grid(card: Card) -> Grid:
    """Paper size and true size, each dense against compressed."""
    size = card.size

    def row(label: str, dense: int, compressed: int) -> list[str]:
        shown = [f"{numbers.size(count)} ({count:,} B)" for count in (dense, compressed)]
        return [label, *shown, f"{compressed / dense:.4g}", f"{dense / compressed:.2f}x"]

    rows = [
        row("paper size (dense in FP16)", size.paper_dense_fp16_bytes, size.paper_bytes),
        row(f"files on disk (dense in {size.true_dense_dtype})", size.true_dense_bytes, size.true_bytes),
    ]
    return Grid(["", DENSE, COMPRESSED, "ratio", "smaller"], rows)


def speed_grid(card: Card) -> Grid:
    """One row per measured condition. What is the same for all rows is no column, but said by `measured_with`."""

    header = ["batch", "input", "dense, ms", "compressed, ms", "speed-up"]
    rows = [
        [
            f"{speed.batch}", input_shape(speed), timing(speed.dense), timing(speed.compressed),
            f"{numbers.speed_up(speed.speedup)} ({numbers.spread(speed.speedup_spread)})",
        ]
        for speed in card.speeds
    ]  # fmt: skip
    if len({_setting(speed) for speed in card.speeds}) < 2:
        return Grid(header, rows, left=2)
    rows = [[*_setting(speed), *row] for speed, row in zip(card.speeds, rows)]
    return Grid(["device", "dense in", "compressed by", *header], rows, left=5)


def timing(time: Timing) -> str:
    """Median milliseconds with the 10th to 90th percentile: ``7.69 (7.53 to 7.91)``."""
    low, high = numbers.milliseconds(time.p10_ms), numbers.milliseconds(time.p90_ms)
    return f"{numbers.milliseconds(time.median_ms)} ({low} to {high})"


def measured_with(speeds: Sequence[Speed]) -> str:
    """``On AMD EPYC (2 threads): dense in float32, compressed by Int8Linear.``; nothing where the rows differ in it."""
    settings = {_setting(speed) for speed in speeds}
    if len(settings) != 1:
        return ""
    device, dtype, backend = settings.pop()
    return f"On {device}: dense in {dtype}, compressed by {backend}."


def _setting(speed: Speed) -> tuple[str, str, str]:
    return speed.device, speed.dtype, speed.backend


def render_table(cards: Iterable[Card]) -> str:
    """Markdown for a README, one row per card, by name: primary score, sizes, best speed-up with its condition."""
    rows = []
    for card in sorted(cards, key=lambda card: card.name):
        pair, best, size = card.primary_pair, fastest(card), card.size
        measured_on, values = "not measured", ["-", "-", "-"]
        if pair is not None:
            dense, score = pair
            measured_on = f"{card.data_of(score).name} {score.split}, {numbers.metric_name(score.metric)}"
            values = [numbers.value(dense), numbers.value(score), numbers.difference(score, dense)]
        lost = sum(speed.speedup < 1 for speed in card.speeds)
        slower = f"; slower in {lost} of {len(card.speeds)} conditions" if lost else ""
        rows.append([
            f"`{card.name}`" + ("" if card.weights == "included" else " (card only)"), measured_on, *values,
            f"{size.paper_bytes / size.paper_dense_fp16_bytes:.4g}",
            f"{numbers.size(size.true_dense_bytes)} to {numbers.size(size.true_bytes)}",
            "not measured" if best is None else f"{numbers.speed_up(best.speedup)} ({condition(best)}){slower}",
        ])  # fmt: skip
    header = ["model", "measured on", DENSE, COMPRESSED, "difference", "paper size of FP16", "files", "best speed-up"]
    return Grid(header, rows, left=2).markdown()


@dataclass(frozen=True)
class Measured:
    """One line of a comparison; None for what was not measured. ``time``: in the same condition for all lines."""

    name: str
    score: Score | None
    bytes: int | None
    time: Timing | None


def render_comparison(dense: Measured, rows: Sequence[Measured], title: str | None = None) -> Table:
    """Variants against ``dense``, for the terminal.

    Raises:
        ValueError: a score was measured under other conditions than the dense one.
    """
    metric = "score" if dense.score is None else f"{dense.score.task} {numbers.metric_name(dense.score.metric)}"
    if dense.score is not None and not dense.score.complete:
        metric += f" (sample of {dense.score.samples:,})"
    cells = []
    for row in (dense, *rows):
        gap = ratio = speed = "-"
        if row is not dense and row.score is not None and dense.score is not None:
            if conditions(row.score) != conditions(dense.score):
                raise ValueError(
                    f"{row.name} was scored under {conditions(row.score)}, {dense.name} under "
                    f"{conditions(dense.score)}: measure both in the same way to compare them"
                )
            gap = numbers.difference(row.score, dense.score)
        if row is not dense and row.bytes is not None and dense.bytes is not None:
            ratio = f"{row.bytes / dense.bytes:.3g}"
        if row is not dense and row.time is not None and dense.time is not None:
            speed = numbers.speed_up(dense.time.median_ms / row.time.median_ms)
        cells.append([
            row.name,
            "-" if row.score is None else numbers.value(row.score), gap,
            "-" if row.bytes is None else numbers.size(row.bytes), ratio,
            "-" if row.time is None else f"{numbers.milliseconds(row.time.median_ms)} ms", speed,
        ])  # fmt: skip
    return Grid(["variant", metric, "difference", "files", "of dense", "time", "speed-up"], cells).rich(title)


def render_terminal(card: Card) -> list[Table]:
    """The three tables of a card: results, size, speed; empty ones are left out."""
    grids = {"results": results_grid(card), "size": size_grid(card), "speed": speed_grid(card)}
    tables = {title: grid.rich(f"{card.name}: {title}") for title, grid in grids.items() if grid.rows}
    if "speed" in tables:
        tables["speed"].caption = measured_with(card.speeds)
    return list(tables.values())


def headline(speeds: Sequence[Speed]) -> str:
    """One sentence about speed: "never slower" only when that was so in every condition measured."""
    if not speeds:
        return "Speed was not measured."
    slower = sum(speed.speedup < 1 for speed in speeds)
    count = f"the {len(speeds)} conditions" if len(speeds) > 1 else "the one condition"
    if slower:
        return f"**Slower than dense in {slower} of {count} measured here.**"
    return f"Never slower than dense in {count} measured here."


def condition(speed: Speed) -> str:
    """``batch 8, sequence 128, against float32, AMD EPYC 9554 (2 threads)``."""
    return f"batch {speed.batch}, {input_shape(speed)}, against {speed.dtype}, {speed.device}"


def input_shape(speed: Speed) -> str:
    """``sequence 128``, ``8 x 8 pixels`` or ``10 s of audio``."""
    if speed.image_size is not None:
        return "{} x {} pixels".format(*speed.image_size)
    return f"sequence {speed.sequence}" if speed.audio_seconds is None else f"{speed.audio_seconds:g} s of audio"


def fastest(card: Card) -> Speed | None:
    """The measured condition with the largest speed-up."""
    return max(card.speeds, key=lambda speed: speed.speedup, default=None)
