"""The two records of evaluation: a `Task` says what is asked, a `Score` what came out and under which conditions."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from .fields import checked_fields, require_bool, require_count, require_libraries, require_text
from .finetune_defaults import FinetuneDefaults

if TYPE_CHECKING:
    import torch

    from ..models.kinds import Kind as ModelKind
    from .runner import Runner

    Batch = dict[str, torch.Tensor]

__all__ = [
    "FinetuneDefaults", "Kind", "Score", "Task", "checked_fields", "nearest", "require_count", "require_libraries",
    "require_text",
]  # fmt: skip

Kind = Literal[
    "text-classification", "text-regression", "token-classification", "question-answering", "causal-lm", "masked-lm",
    "summarization", "dialogue", "image-classification", "speech-recognition",
]  # fmt: skip
Row = Mapping[str, Any]
Feature = Mapping[str, Any]
Setting = str | int | float
IGNORED = -100  # label of a token that has none

_SPLIT_WORDS = (("train",), ("valid", "val", "dev"), ("test", "eval"))  # what splits of the same purpose are called

# kind of task: what the model reads, and the heads that can do it, as ``load_dense(kind=...)`` says them
NEEDS: dict[str, tuple[str, tuple[ModelKind, ...]]] = {
    "text-classification": ("text", ("classification",)),
    "text-regression": ("text", ("classification",)),
    "token-classification": ("text", ("token",)),
    "question-answering": ("text", ("question-answering",)),
    "causal-lm": ("text", ("causal-lm",)),
    "masked-lm": ("text", ("masked-lm",)),
    "summarization": ("text", ("seq2seq-lm", "causal-lm")),
    "dialogue": ("text", ("causal-lm", "seq2seq-lm")),
    "image-classification": ("images", ("classification",)),
    "speech-recognition": ("sound", ("ctc",)),
}


def nearest(what: str, name: str, known: Iterable[str]) -> str:
    """Error text for an unknown ``name``: the known names and, where one is close, the nearest."""
    names = list(known)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}: expected one of {', '.join(names)}{hint}"


@dataclass(frozen=True)
class Task:
    """One benchmark: where its rows come from, how they become model inputs, how predictions are scored.

    The way of a score (`eval.run.evaluate`)::

        rows        = task.rows(split, data_dir)            --limit draws from these
        predictions = task.predict(runner, rows)            by default one forward per row, see ``predict``
        values      = task.score(predictions, [task.reference(row) for row in rows])

    and of training (`pipeline.training_data`)::

        features = (task.train_encode or task.encode)(rows, processor, max_length)
        batch    = task.augment(collate(features), generator)          or task.make_augment(processor) in its place

    Args:
        name: unique, ``family/member`` where there is a family, e.g. ``glue/sst2``. Protocols whose numbers cannot be
            compared are different tasks: ``wikitext2/token``, ``wikitext2/word``.
        version: raised whenever a change moves the numbers; scores of different versions are not comparable.
        source: citation of the data and of the metric.
        kind: what the model must be able to do.
        num_labels: width of the model's logits; None where the vocabulary decides.
        splits: names of the labelled splits; the first is trained on, the last is reported.
        sizes: official number of rows of each split; a score over any other number is not complete. 0 for data of the
            user's own, which is complete when all of it is scored; its rows' ``settings`` then tell the data.
        metric: the primary metric, one of the keys that ``score`` returns.
        higher_is_better: direction of the primary metric.
        rows: ``rows(split, data_dir)`` reads one split as dicts; ``data_dir`` None means ``$SQUEEZOO_DATA``, then the
            Hub. Raises `DataError` for what is missing or broken. What the files decide and moves the score (a variant
            of the text) stands in each row as ``settings``, a mapping, and is recorded.
        encode: ``encode(rows, processor, max_length)`` gives feature dicts: model inputs and targets, unpadded lists of
            tokens or one image each; a sequence that may compute its items on access. One per row, in order, for tasks
            without ``predict``. Keys that begin with ``_`` stay out of the batches: notes for ``predict``, such as
            ``_row`` and ``_offsets`` of a window. ``collate`` pads ``labels`` with -100.
        score: ``score(predictions, references)``, a pure function; fractions, not percentages.
        augment: ``augment(batch, generator)`` returns a randomly changed copy of a batch; for training only.
        predict: ``predict(runner, rows)`` gives what ``score`` takes first; None means one forward per row and the
            class of the largest logit (the logit itself for regression). Tasks of other shape (windows, generation,
            perplexity, CTC) encode here and call ``runner.map`` or ``runner.generate``, which batch by length, move to
            the device, restore the order and show the progress. See `eval.runner.Runner`. What ``predict`` writes into
            ``runner.settings`` is recorded in the scores.
        reference: what of a row ``score`` needs; its ``label`` by default.
        train_encode: features to train on where they differ from ``encode``'s (windows with answers, blocks of text).
        train_encode_by_head: the same where they depend on the model's head, by its kind (text of a decoder, pairs of
            an encoder-decoder).
        max_length: default of the truncation, in tokens; None where nothing is truncated, and then none is recorded.
        settings: what else moves the score, with its defaults; ``evaluate(settings=...)`` may change the values of
            these names and no others.
        opposite: metrics that point the other way than the primary one (TER beside BLEU).
        make_augment: ``make_augment(processor)`` gives the ``augment`` that needs the tokenizer (masking).
        unlabelled: official splits that have no public labels; asking for one says so.
        finetune: how the papers trained the dense baseline.
        label_names: name of each class, in the order of the logits; empty where there is none to know.
        label_aliases: further names that published models give a class.
    """

    name: str
    version: int
    source: str
    kind: Kind
    num_labels: int | None
    splits: tuple[str, ...]
    sizes: tuple[int, ...]
    metric: str
    higher_is_better: bool
    rows: Callable[[str, str | Path | None], Sequence[Row]]
    encode: Callable[[Sequence[Row], Any, int], Sequence[Feature]]
    score: Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
    augment: Callable[[Batch, torch.Generator], Batch] | None = None
    predict: Callable[[Runner, Sequence[Row]], Sequence[Any]] | None = None
    reference: Callable[[Row], Any] = itemgetter("label")
    train_encode: Callable[[Sequence[Row], Any, int], Sequence[Feature]] | None = None
    train_encode_by_head: Mapping[str, Callable[[Sequence[Row], Any, int], Sequence[Feature]]] = field(
        default_factory=dict
    )
    max_length: int | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)
    opposite: tuple[str, ...] = ()
    make_augment: Callable[[Any], Callable[[Batch, torch.Generator], Batch]] | None = None
    unlabelled: tuple[str, ...] = ()
    finetune: FinetuneDefaults | None = None
    label_names: tuple[str, ...] = ()
    label_aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_text(self, "name", "source", "metric")
        require_count(
            self, "version", *(name for name in ("num_labels", "max_length") if getattr(self, name) is not None)
        )
        if self.kind not in get_args(Kind):
            raise ValueError(f"task {self.name}: " + nearest("kind", str(self.kind), get_args(Kind)))
        if not isinstance(self.splits, tuple) or not self.splits or len(set(self.splits)) != len(self.splits):
            raise ValueError(f"task {self.name}: splits must be a tuple of different names, got {self.splits!r}")
        if len(self.sizes) != len(self.splits) or not all(size >= 0 for size in self.sizes):
            raise ValueError(f"task {self.name}: sizes must give a number of rows per split, got {self.sizes!r}")
        if self.label_names and len(self.label_names) != self.num_labels:
            raise ValueError(f"task {self.name}: label_names must be {self.num_labels} names, got {self.label_names!r}")
        if unknown := sorted(set(self.label_aliases) - set(self.label_names)):
            raise ValueError(f"task {self.name}: label_aliases has {', '.join(unknown)}, which label_names has not")

    @property
    def report_split(self) -> str:
        """The split whose score is published: the last one."""
        return self.splits[-1]

    @property
    def reads(self) -> str:
        """What the model is fed with: ``text``, ``images`` or ``sound``."""
        return NEEDS[self.kind][0]

    @property
    def model_kinds(self) -> tuple[ModelKind, ...]:
        """The heads that can do this task, as ``load_dense(kind=...)`` says them; the first is the usual one."""
        return NEEDS[self.kind][1]

    def size(self, split: str) -> int:
        """Official number of rows of ``split``, 0 where there is none.

        Raises:
            ValueError: unknown split, with the known ones and the nearest.
        """
        if split in self.unlabelled:
            raise ValueError(
                f"{self.name}: the official split {split!r} has no public labels, so nothing can be scored on it; "
                f"take one of {', '.join(self.splits)}"
            )
        if split not in self.splits:
            raise ValueError(
                f"{self.name}: unknown split {split!r}: expected one of {', '.join(self.splits)}; did you mean "
                f"{self._split_like(split)!r}?"
            )
        return self.sizes[self.splits.index(split)]

    def _split_like(self, name: str) -> str:
        """The split that an unknown name means: one of the same purpose, of similar letters, or the reported one."""
        asked = name.casefold()
        alike = [
            split
            for words in _SPLIT_WORDS
            if asked.startswith(words)
            for split in self.splits
            if split.startswith(words)
        ]
        close = difflib.get_close_matches(asked, alike or self.splits, n=1, cutoff=0.0 if alike else 0.75)
        return close[0] if close else self.report_split

    def resolved(self, chosen: Mapping[str, Setting] | None) -> dict[str, Setting]:
        """The task's settings with the user's values, which take the type of the default (text is parsed).

        Raises:
            ValueError: a name that the task does not have, or a value of another type.
        """
        settings = dict(self.settings)
        for name, value in (chosen or {}).items():
            if name not in settings:
                known = settings or ("none: it has no settings",)
                raise ValueError(f"{self.name}: " + nearest("setting", name, known))
            wanted = type(settings[name])
            try:
                settings[name] = wanted(value)
            except ValueError as error:
                raise ValueError(f"{self.name}: setting {name} is a {wanted.__name__}, found {value!r}") from error
        return settings


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
