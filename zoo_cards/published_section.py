"""The section of a card that holds published numbers: beside the measured ones, in columns of their own."""

from __future__ import annotations

from collections.abc import Sequence

from . import numbers
from .card import COMPRESSED, DENSE, Card, conditions
from .published_costs import costs_for
from .published_models import is_same_model
from .published_scores import PublishedScore, published_for
from .published_tables import Note
from .tables import Grid

HEADER = [
    "data", "metric", "published for", "published split", "published in", "measured dense", "measured compressed",
    "published dense", "published compressed",
]  # fmt: skip
COST_HEADER = ["cost", "published for", "published in", "published dense", "published compressed"]


def published(card: Card) -> str:
    """Numbers of papers for this model or its family, method and task; empty without any."""
    rows, notes, other = [], dict[Note, None](), False
    for score in {conditions(r.score): r.score for r in card.scores if r.variant == COMPRESSED}.values():
        dense = card.score(DENSE, score)
        for found in published_for(card.base, card.recipe.name, score):
            other = other or not is_same_model(found.model, card.base)
            notes.update(dict.fromkeys(found.notes))
            data = card.data_of(score).name
            sample = "" if score.complete else " (sample)"
            rows.append([
                f"{data} {score.split}{sample}", numbers.metric_name(score.metric),
                f"{found.model}, {found.method}", found.split,
                found.source + _marks(found.notes),
                "-" if dense is None else _in_its_unit(dense.value, found), _in_its_unit(score.value, found),
                found.dense, found.compressed,
            ])  # fmt: skip
    costs = []
    for cost in costs_for(card.base, card.recipe.name, (data.task for data in card.data)):
        other = other or not is_same_model(cost.model, card.base)
        notes.update(dict.fromkeys(cost.notes))
        source = cost.source + _marks(cost.notes)
        costs.append([cost.what, f"{cost.model}, {cost.method}", source, cost.dense, cost.compressed])
    parts = []
    if rows or costs:
        foreign = " They are **of another model of the same family**: compare directions only." if other else ""
        parts.append(
            "Columns *published* are as printed by their authors, **not measured here**; measured columns are in the "
            f"paper's unit.{foreign}"
        )
    parts += [Grid(HEADER, rows, left=5).markdown()] if rows else []
    parts += [Grid(COST_HEADER, costs, left=3).markdown()] if costs else []
    parts += ["\n".join(f"- [{note.number}] {note.text}" for note in notes)] if notes else []
    if card.published:
        parts.append(_stored(card))
    return "\n\n".join(parts)


def _marks(notes: Sequence[Note]) -> str:
    return "".join(f" [{number}]" for number in dict.fromkeys(note.number for note in notes))


def _in_its_unit(value: float, found: PublishedScore) -> str:
    return f"{found.scale * value:.2f}" if found.scale != 1 else f"{value:.4g}"


def _stored(card: Card) -> str:
    """The numbers that results.json itself holds."""

    def show(number: float | None) -> str:
        return "-" if number is None else f"{number:g}"

    rows = [[p.source, p.metric, show(p.dense), show(p.compressed), p.note] for p in card.published]
    grid = Grid(["source", "metric", "published dense", "published compressed", "note"], rows, left=5)
    return f"As printed by their authors: **published, not measured here**.\n\n{grid.markdown()}"
