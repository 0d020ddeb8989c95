"""Variants of one model side by side: `compare` reads their cards and says what may stand in one column.

Only scores of the same task, version, split, metric, samples and settings share a column; a sample is shown and never
ranked; each variant is held against its own dense model. The result is plain data, `compare_render` shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..eval.speed import Speed
from ..eval.task import Score
from .card import COMPRESSED, DENSE, RESULTS, Card, conditions
from .hub import CARDS, ZOO, info
from .strict import plain
from .tables import condition

Key = tuple[Any, ...]


class CompareError(ValueError):
    """Cards that do not belong into one table, or that are not there."""


@dataclass(frozen=True)
class Variant:
    """One row.

    Args:
        name: in the table. card: that it comes from (of a dense row: that of its cards which knows most).
        dense: name of the dense row it is held against; None for a dense row itself.
        scores: by `card.conditions`. speeds: by condition in words; of a dense row: those of all its cards.
        rank: among the variants by the primary column, 1 is best; None for dense rows, samples and missing scores.
    """

    name: str
    card: Card
    dense: str | None
    scores: Mapping[Key, Score]
    speeds: Mapping[str, tuple[Speed, ...]]
    rank: int | None = None

    @property
    def kind(self) -> str:
        """Which variant of its card it is."""
        return COMPRESSED if self.dense is not None else DENSE


@dataclass(frozen=True)
class Comparison:
    """A table of variants.

    Args:
        rows: dense rows first, then the variants from the best to the worst, then those without a rank.
        columns: one score of each column, the primary column first. timed: conditions of speed, in words.
        mixed: columns of different conditions were allowed; ``notes`` then say so.
    """

    base: str
    rows: tuple[Variant, ...]
    columns: tuple[Score, ...]
    timed: tuple[str, ...]
    mixed: bool
    notes: tuple[str, ...] = field(default=())

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The rows that are not dense."""
        return tuple(row for row in self.rows if row.dense is not None)

    def dense_of(self, row: Variant) -> Variant:
        """The dense row of a variant; a dense row's own."""
        return next(other for other in self.rows if other.name == (row.dense or row.name))

    def score(self, row: Variant, column: Score) -> Score | None:
        return row.scores.get(conditions(column))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data: the ``columns`` in their order (``rank`` goes by the first), and per row its ``values`` in
        them with the ``differences`` to its dense row, None where there is none; whole scores and speeds follow."""
        rows = []
        for row in self.rows:
            size, dense = row.card.size, self.dense_of(row)
            pairs = [(self.score(row, column), self.score(dense, column)) for column in self.columns]
            rows.append({
                "name": row.name, "card": row.card.name, "dense": row.dense, "rank": row.rank,
                "values": [own.value if own else None for own, _ in pairs],
                "differences": [own.value - to.value if row.dense and own and to else None for own, to in pairs],
                "bytes": size.true_bytes if row.dense else size.true_dense_bytes,
                "paper_bytes": size.paper_bytes if row.dense else size.paper_dense_fp16_bytes,
                "nonzeros": size.nonzeros if row.dense else size.parameters,
                "scores": [plain(score) for score in row.scores.values()],
                "speeds": [plain(speed) for speeds in row.speeds.values() for speed in speeds] if row.dense else [],
            })  # fmt: skip
        shown = ("task", "task_version", "split", "metric", "samples", "complete", "higher_is_better", "settings")
        columns = [{name: value for name, value in plain(c).items() if name in shown} for c in self.columns]
        head = {"base": self.base, "mixed": self.mixed, "notes": list(self.notes)}
        return {**head, "columns": columns, "timed": list(self.timed), "rows": rows}


def compare(sources: Sequence[str | Path], *, mixed: bool = False) -> Comparison:
    """Put the cards of several variants of one model side by side. Reads ``results.json`` of each, measures nothing.

    Args:
        sources: folders with a results.json, or names of the zoo (weights are not needed).
        mixed: allow other base models, tasks, splits, samples and settings: each in columns of its own, and marked.

    Raises:
        CompareError: no card there; the same one twice; or different models or conditions without ``mixed``.
        ValueError: a results.json that is not valid. ZooError: an unknown name.
    """
    cards = [_load(source) for source in sources]
    if not cards:
        raise CompareError("give at least one folder with a results.json, or a name of the zoo")
    notes = _check_bases(cards, mixed)
    columns = _columns(cards)
    notes += _check_columns(cards, columns, mixed)
    names = _names(cards, sources)
    dense, of = _dense_rows(cards, names)
    primary = conditions(columns[0]) if columns else None
    variants = []
    for card, name, own in zip(cards, names, of, strict=True):
        variants.append(Variant(name, card, own, _scores(card, COMPRESSED), _speeds([card])))
    ranks = _ranks([row.scores.get(primary) if primary else None for row in variants])
    ranked = [Variant(r.name, r.card, r.dense, r.scores, r.speeds, rank) for r, rank in zip(variants, ranks)]
    ranked.sort(key=lambda row: (row.rank is None, row.rank or 0))
    if any(not score.complete for row in ranked for score in row.scores.values()):
        notes.append("Rows of a column marked (sample) scored only a part of the split; they are not ranked.")
    if len(dense) > 1:
        notes.append("The variants come from different dense models; each difference is to its own.")
    timed = tuple(dict.fromkeys(condition(speed) for card in cards for speed in card.speeds))
    base = " and ".join(dict.fromkeys(_base(card) for card in cards))
    return Comparison(base, (*dense, *ranked), tuple(columns), timed, mixed, tuple(notes))


def _load(source: str | Path) -> Card:
    folder = Path(source)
    if not folder.is_dir():
        folder = ZOO / CARDS / info(str(source))["name"]
    if not (folder / RESULTS).is_file():
        raise CompareError(
            f"{source} has no {RESULTS}: measure it first with `squeezoo card {source} --dense DENSE --task TASK`"
        )
    return Card.load(folder)


def _base(card: Card) -> str:
    return card.base.hub_id or card.base.name


def _check_bases(cards: Sequence[Card], mixed: bool) -> list[str]:
    bases = list(dict.fromkeys(_base(card) for card in cards))
    if len(bases) < 2:
        return []
    if not mixed:
        raise CompareError(
            f"variants of one model are compared, found {' and '.join(bases)}: compare them apart, or say that you "
            "mean it (mixed)"
        )
    return [f"**Marked: different base models** ({', '.join(bases)})."]


def _columns(cards: Sequence[Card]) -> list[Score]:
    """One score of each condition; those that most cards have and that are complete come first."""
    found: dict[Key, list[Score]] = {}
    for card in cards:
        for key, score in _scores(card, COMPRESSED).items():
            found.setdefault(key, []).append(score)
    order = sorted(found.values(), key=lambda scores: (not scores[0].complete, -len(scores)))
    return [scores[0] for scores in order]


def _check_columns(cards: Sequence[Card], columns: Sequence[Score], mixed: bool) -> list[str]:
    """Refuse what cannot stand side by side, or mark it."""
    problems = []
    for index, one in enumerate(columns):
        for other in columns[index + 1 :]:
            if (one.task, one.metric) == (other.task, other.metric):
                problems.append(f"{one.metric} on {one.task}: {_difference(one, other)}")
    shared = [column for column in columns if all(conditions(column) in _scores(card, COMPRESSED) for card in cards)]
    if columns and not shared and not problems:
        tasks = "; ".join(f"{card.name}: {', '.join(sorted({r.score.task for r in card.scores}))}" for card in cards)
        problems.append(f"no score is common to all of them ({tasks})")
    if problems and not mixed:
        raise CompareError(
            f"these scores cannot stand side by side: {'; '.join(problems)}. Measure all of them in the same way, or "
            "say that you mean it (mixed)"
        )
    return [f"**Marked: columns were measured in different ways** ({'; '.join(problems)})."] if problems else []


def _difference(one: Score, other: Score) -> str:
    """``samples 408 and 100``: the fields in which the conditions of two scores differ."""
    fields = ("task_version", "split", "samples", "complete")
    parts = [f"{f} {getattr(one, f)} and {getattr(other, f)}" for f in fields if getattr(one, f) != getattr(other, f)]
    for name in sorted({*one.settings, *other.settings}):
        values = one.settings.get(name), other.settings.get(name)
        parts += [f"{name} {values[0]} and {values[1]}"] if values[0] != values[1] else []
    return ", ".join(parts)


def _names(cards: Sequence[Card], sources: Sequence[str | Path]) -> list[str]:
    """The shortest names that tell the rows apart: recipes, else cards, else folders."""
    folders = [Path(source).name for source in sources]
    for names in (
        [card.recipe.name for card in cards],
        [card.name for card in cards],
        folders,
        list(map(str, sources)),
    ):
        if len({*names, DENSE}) == len(names) + 1:
            return names
    raise CompareError(f"the same card stands twice among {', '.join(map(str, sources))}")


def _dense_rows(cards: Sequence[Card], names: Sequence[str]) -> tuple[list[Variant], list[str]]:
    """The dense rows, and the name of each card's own: cards share one when their dense scores and sizes agree."""
    groups: list[list[int]] = []
    for index, card in enumerate(cards):
        for group in groups:
            if all(_same_dense(cards[other], card) for other in group):
                group.append(index)
                break
        else:
            groups.append([index])
    rows, of = [], [""] * len(cards)
    for group in groups:
        name = DENSE if len(groups) == 1 else f"{DENSE} of {', '.join(names[index] for index in group)}"
        scores: dict[Key, Score] = {}
        for index in group:
            scores |= _scores(cards[index], DENSE)
            of[index] = name
        most = max((cards[index] for index in group), key=_known)
        rows.append(Variant(name, most, None, scores, _speeds([cards[index] for index in group])))
    return rows, of


def _known(card: Card) -> int:
    """How many kinds of costs a card has."""
    found = card.resources
    return sum(map(bool, (found.loading, found.memory, found.energy, found.decode)))


def _same_dense(one: Card, other: Card) -> bool:
    first, second = _scores(one, DENSE), _scores(other, DENSE)
    shared = first.keys() & second.keys()
    if not shared and (first or second):
        return False  # fine-tuned on other tasks, or not known to be the same
    same = one.size.true_dense_bytes == other.size.true_dense_bytes
    return _base(one) == _base(other) and same and all(first[key].value == second[key].value for key in shared)


def _scores(card: Card, variant: str) -> dict[Key, Score]:
    return {conditions(row.score): row.score for row in card.scores if row.variant == variant}


def _speeds(cards: Sequence[Card]) -> dict[str, tuple[Speed, ...]]:
    found: dict[str, tuple[Speed, ...]] = {}
    for card in cards:
        for speed in card.speeds:
            found[condition(speed)] = (*found.get(condition(speed), ()), speed)
    return found


def _ranks(scores: Sequence[Score | None]) -> list[int | None]:
    """1 for the best complete score, equal ones share it; None for samples, missing ones, and one that is alone."""
    values = [
        None if score is None or not score.complete else score.value * (1 if score.higher_is_better else -1)
        for score in scores
    ]
    if sum(value is not None for value in values) < 2:
        return [None] * len(values)
    return [None if v is None else 1 + sum(w is not None and w > v for w in values) for v in values]
