"""The two records of evaluation: a `Task` says what is asked, a `Score` what came out and under which conditions."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch

    Batch = dict[str, torch.Tensor]

Kind = Literal["text-classification", "image-classification"]
Row = Mapping[str, Any]
Feature = Mapping[str, Any]


def nearest(what: str, name: str, known: Iterable[str]) -> str:
    """Error text for an unknown ``name``: the known names and, where one is close, the nearest."""
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}: expected one of {', '.join(names)}{hint}"


@dataclass(frozen=True)
class Task:
    """One benchmark: where its rows come from, how they become model inputs, how predictions are scored.

    Args:
        name: unique, ``family/member`` where there is a family, e.g. ``glue/sst2``.
        version: raised whenever a change moves the numbers; scores of different versions are not comparable.
        source: citation of the data and of the metric.
        kind: what the model must be able to do.
        num_labels: width of the model's logits.
        splits: names of the labelled splits; the first is trained on, the last is reported.
        sizes: official number of rows of each split; a score over any other number is not complete.
        metric: the primary metric, one of the keys that ``score`` returns.
        higher_is_better: direction of the primary metric.
        rows: ``rows(split, data_dir)`` reads one split as dicts with at least ``label``; ``data_dir`` None means
            ``$SQUEEZOO_DATA``, then the Hub. Raises `DataError` for what is missing or broken.
        encode: ``encode(rows, processor, max_length)`` gives one feature dict per row (model inputs and ``labels``),
            unpadded text or one image each; a sequence that may compute its items on access.
        score: ``score(predictions, labels)``, a pure function of class ids [n] and class ids [n]; values are fractions.
        augment: ``augment(batch, generator)`` returns a randomly changed copy of a batch; for training only.
    """

    name: str
    version: int
    source: str
    kind: Kind
    num_labels: int
    splits: tuple[str, ...]
    sizes: tuple[int, ...]
    metric: str
    higher_is_better: bool
    rows: Callable[[str, str | Path | None], Sequence[Row]]
    encode: Callable[[Sequence[Row], Any, int], Sequence[Feature]]
    score: Callable[[Sequence[int], Sequence[int]], dict[str, float]]
    augment: Callable[[Batch, torch.Generator], Batch] | None = None

    def __post_init__(self) -> None:
        require_text(self, "name", "source", "metric")
        require_count(self, "version", "num_labels")
        if self.kind not in get_args(Kind):
            raise ValueError(f"task {self.name}: " + nearest("kind", str(self.kind), get_args(Kind)))
        if not isinstance(self.splits, tuple) or not self.splits or len(set(self.splits)) != len(self.splits):
            raise ValueError(f"task {self.name}: splits must be a tuple of different names, got {self.splits!r}")
        if len(self.sizes) != len(self.splits) or not all(size >= 1 for size in self.sizes):
            raise ValueError(f"task {self.name}: sizes must give a number of rows per split, got {self.sizes!r}")

    @property
    def report_split(self) -> str:
        """The split whose score is published: the last one."""
        return self.splits[-1]

    def size(self, split: str) -> int:
        """Official number of rows of ``split``. Raises ValueError with the known splits and the nearest one."""
        if split not in self.splits:
            raise ValueError(f"{self.name}: " + nearest("split", split, self.splits))
        return self.sizes[self.splits.index(split)]


@dataclass(frozen=True)
class Score:
    """One measured number with everything needed to compare it; it cannot be built with any of that missing.

    Args:
        task, task_version, split, metric: what was measured.
        value: finite; accuracies, F1 and correlations are fractions (0.913), not percentages.
        samples: number of rows scored.
        complete: False when not exactly the official split was scored; such a score is a sample and is never ranked.
        higher_is_better: direction of ``metric``.
        libraries: name to version of the software that produced the value.
        seed: training seed of the model, where there is one.
        settings: what else can move the value, e.g. ``max_length``.
    """

    task: str
    task_version: int
    split: str
    metric: str
    value: float
    samples: int
    complete: bool
    higher_is_better: bool
    libraries: Mapping[str, str]
    seed: int | None = None
    settings: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_text(self, "task", "split", "metric")
        require_count(self, "task_version", "samples")
        require_bool(self, "complete", "higher_is_better")
        require_libraries(self)
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)) or not math.isfinite(self.value):
            raise ValueError(f"Score {self.task} {self.metric}: value must be a finite number, got {self.value!r}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ValueError(f"Score {self.task} {self.metric}: seed must be an integer or None, got {self.seed!r}")
        object.__setattr__(self, "value", float(self.value))
        object.__setattr__(self, "settings", dict(self.settings))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Score:
        """Build a score from `to_dict`'s data. Raises ValueError naming unknown or missing keys."""
        return cls(**checked_fields(cls, data))


def checked_fields(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` as keyword arguments of the record ``cls``; ValueError names every unknown or missing key."""
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
    unknown = sorted(set(data) - set(known))
    missing = [name for name, required in known.items() if required and name not in data]
    if unknown or missing:
        raise ValueError(f"{cls.__name__}: missing keys {missing}, unknown keys {unknown}; expected {list(known)}")
    return dict(data)


def require_text(record: Any, *names: str) -> None:
    """The fields ``names`` of a record hold texts with something in them, or ValueError says which does not."""
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{type(record).__name__}: {name} must be a non-empty text, got {value!r}")


def require_count(record: Any, *names: str) -> None:
    """The fields ``names`` of a record hold integers of at least 1, or ValueError says which does not."""
    for name in names:
        value = getattr(record, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(record).__name__}: {name} must be an integer of at least 1, got {value!r}")


def require_bool(record: Any, *names: str) -> None:
    """The fields ``names`` of a record hold True or False, or ValueError says which does not."""
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, bool):
            raise ValueError(f"{type(record).__name__}: {name} must be True or False, got {value!r}")


def require_libraries(record: Any) -> None:
    """The field ``libraries`` of a record maps names to versions; it is replaced by a copy."""
    libraries = record.libraries
    if not isinstance(libraries, Mapping) or not libraries or not all(isinstance(v, str) for v in libraries.values()):
        raise ValueError(f"{type(record).__name__}: libraries must map names to versions, got {libraries!r}")
    object.__setattr__(record, "libraries", dict(libraries))
