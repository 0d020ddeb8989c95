"""`Card`: everything known about one published variant. ``results.json`` is its JSON form and the only truth.

The model card, the index and every table are rendered from it. A card that contradicts itself cannot be built.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..eval.results import atomic_write_json
from ..eval.speed import Speed
from ..eval.task import Score
from .parts import (
    RESULTS,
    Base,
    Breakdown,
    Data,
    PlanSummary,
    Published,
    RecipeNote,
    ScoreRow,
    Size,
    Stage,
    StorageForm,
    Training,
)
from .resources import Resources
from .search import Search
from .strict import plain, record_from

__all__ = [
    "COMPRESSED", "DENSE", "RESULTS", "Base", "Breakdown", "Card", "Data", "PlanSummary", "Published", "RecipeNote",
    "Resources", "ScoreRow", "Search", "Size", "Stage", "StorageForm", "Training", "conditions",
]  # fmt: skip

FORMAT = 2
# results.json of format 1 is the same without these; they are then empty
SINCE_2: dict[str, Any] = {"storage": [], "search": None, "resources": plain(Resources())}
DENSE = "dense"
COMPRESSED = "compressed"


@dataclass(frozen=True)
class Card:
    """One published variant. Order matters: the first complete compressed score is the primary one.

    Args:
        name: ``<model>.<task>.<recipe>``.
        weights: ``included`` when the checkpoint lies beside results.json, ``reproducible`` when ``commands`` make it.
        speeds: dense and compressed measured in one run. commands: shell lines that reproduce the card.
        date: ISO day of the measurements. squeezoo: version of the package. code: its git commit, if known.
        storage: how the matrices lie in the weight file. search: the trials that the compressed score was chosen from.
        resources: loading, memory, energy and the rest; what is empty there was not measured.

    Raises:
        ValueError: the parts contradict each other; the message says which and what is expected.
    """

    name: str
    base: Base
    recipe: RecipeNote
    plan: PlanSummary
    size: Size
    scores: tuple[ScoreRow, ...]
    speeds: tuple[Speed, ...]
    data: tuple[Data, ...]
    training: Training | None
    commands: tuple[str, ...]
    limits: tuple[str, ...]
    published: tuple[Published, ...]
    weights: Literal["included", "reproducible"]
    date: str
    squeezoo: str
    code: str | None
    storage: tuple[StorageForm, ...] = ()
    search: Search | None = None
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        _check_identity(self)
        _check_size(self)
        _check_scores(self)
        _check_storage(self)

    def score(self, variant: str, like: Score) -> Score | None:
        """The score of ``variant`` measured under the same conditions as ``like``, or None."""
        return next(
            (r.score for r in self.scores if r.variant == variant and conditions(r.score) == conditions(like)), None
        )

    def data_of(self, score: Score) -> Data:
        """The data behind a score of this card."""
        return next(data for data in self.data if data.task == score.task)

    @property
    def primary_pair(self) -> tuple[Score, Score] | None:
        """Dense and compressed score that tables and the index show: the first complete ones, None without any."""
        compressed = next((r.score for r in self.scores if r.variant == COMPRESSED and r.score.complete), None)
        dense = None if compressed is None else self.score(DENSE, compressed)
        return None if compressed is None or dense is None else (dense, compressed)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        data = {one.name: plain(getattr(self, one.name)) for one in fields(self)}
        return {"format": FORMAT, **json.loads(json.dumps(data, allow_nan=False))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "card") -> Card:
        """Inverse of `to_dict`. Raises ValueError with the place of an unknown, missing or wrong entry."""
        found = data.get("format") if isinstance(data, Mapping) else None
        if found not in (1, FORMAT):
            raise ValueError(f"{where}: expected format 1 or {FORMAT}, found {found!r}; this squeezoo reads no other")
        newer = [key for key in SINCE_2 if key in data]
        if found == 1 and newer:
            raise ValueError(f"{where}: unknown key {newer[0]!r} in format 1; it came with format {FORMAT}")
        content = {key: value for key, value in data.items() if key != "format"}
        try:
            return record_from(cls, content if found == FORMAT else {**content, **SINCE_2})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def save(self, folder: str | Path) -> Path:
        """Write ``folder/results.json``: whole or not at all."""
        path = Path(folder) / RESULTS
        atomic_write_json(path, self.to_dict())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Card:
        """Read ``folder/results.json``. Raises FileNotFoundError, or ValueError naming the file and the fault."""
        path = Path(folder) / RESULTS
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not readable as JSON: {error}") from error
        return cls.from_dict(data, where=str(path))


def conditions(score: Score) -> tuple[Any, ...]:
    """What must be equal before two scores may stand side by side."""
    settings = tuple(sorted(score.settings.items()))
    return score.task, score.task_version, score.split, score.metric, score.samples, score.complete, settings


def _check_identity(card: Card) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*\.[a-z0-9_-]+\.[a-z0-9-]+", card.name):
        raise ValueError(f"card name must be <model>.<task>.<recipe> in lower case, got {card.name!r}")
    if not card.name.endswith(f".{card.recipe.name}"):
        raise ValueError(f"card {card.name}: the name must end in the recipe's name, {card.recipe.name!r}")
    if card.weights not in ("included", "reproducible"):
        raise ValueError(f"card {card.name}: weights must be 'included' or 'reproducible', got {card.weights!r}")
    if not card.data:
        raise ValueError(f"card {card.name}: data is empty; name at least the data that it was trained on")
    if not card.commands:
        raise ValueError(f"card {card.name}: commands are missing; without them nobody can check the numbers")
    try:
        datetime.date.fromisoformat(card.date)
    except ValueError:
        raise ValueError(f"card {card.name}: date must be YYYY-MM-DD, got {card.date!r}") from None


def _check_size(card: Card) -> None:
    size = card.size
    total = sum(asdict(size.breakdown).values())
    if total != size.true_bytes:
        raise ValueError(f"card {card.name}: the breakdown sums to {total:,} bytes, true_bytes is {size.true_bytes:,}")
    if not 0 <= size.nonzeros <= size.parameters:
        raise ValueError(f"card {card.name}: {size.nonzeros:,} non-zeros of {size.parameters:,} parameters")
    for one in fields(size):
        value = getattr(size, one.name)
        if isinstance(value, int) and value <= 0:
            raise ValueError(f"card {card.name}: size.{one.name} must be positive, got {value}")


def _check_storage(card: Card) -> None:
    for form in card.storage:
        what = f"card {card.name}: storage {form.form} {form.number}"
        if min(form.count, form.weights, form.bytes) < 1 or form.scale_bytes < 0:
            raise ValueError(f"{what} needs positive counts, got {form}")
    stored, size = sum(form.bytes for form in card.storage), card.size.breakdown
    tables = sum(form.bytes for form in card.storage if form.form == "table")
    if card.storage and stored - tables != size.values + size.indices:
        raise ValueError(
            f"card {card.name}: storage sums to {stored - tables:,} bytes of matrices, the breakdown says "
            f"{size.values + size.indices:,} of values and indices"
        )
    if card.search is not None and card.search.task not in {data.task for data in card.data}:
        raise ValueError(f"card {card.name}: the search chose by {card.search.task}, which `data` does not describe")
    if card.search is not None and card.search.recipe not in (None, card.recipe.name):
        raise ValueError(
            f"card {card.name}: the search is of recipe {card.search.recipe}, this card of {card.recipe.name}"
        )


def _check_scores(card: Card) -> None:
    seen = set()
    tasks = {data.task for data in card.data}
    for row in card.scores:
        what = f"card {card.name}: {row.variant} {row.score.metric} on {row.score.task} {row.score.split}"
        key = (row.variant, conditions(row.score))
        if key in seen:
            raise ValueError(f"{what} stands twice; give the other run a variant name of its own")
        seen.add(key)
        if row.score.task not in tasks:
            raise ValueError(f"{what}: no entry of `data` describes this task; described: {sorted(tasks)}")
        if row.variant != DENSE and card.score(DENSE, row.score) is None:
            raise ValueError(
                f"{what} ({row.score.samples} samples, version {row.score.task_version}) has no dense score under the "
                "same conditions (task, version, split, metric, samples, settings) to be compared with"
            )
