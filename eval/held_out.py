"""A validation part for choosing settings, apart from the rows whose score is reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from .run import evaluate
from .task import Row, Task

HELD_OUT = "held-out"


@dataclass(frozen=True)
class Validation:
    """A task with a split to choose on.

    Args:
        task: trains on ``task.splits[0]``. split: to choose on. note: where that comes from, for reports.
    """

    task: Task
    split: str
    note: str


def with_validation(task: Task, share: float = 0.1, seed: int = 0) -> Validation:
    """The task's own validation split, or a fixed part of its training rows where it has none.

    With three splits or more the second one is the validation. With two (GLUE's dev is what is reported) ``share`` of
    the training rows, drawn by ``seed``, is held out and no longer trained on. Rows are drawn one by one, so a held-out
    row may stand beside a training row of the same document.

    Raises:
        ValueError: a task without a training split, or a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise ValueError(f"the held-out share is between 0 and 1, found {share!r}")
    if len(task.splits) < 2:
        raise ValueError(f"{task.name} has only the split {task.splits[0]!r}: nothing is left to train and choose on")
    if len(task.splits) > 2:
        return Validation(task, task.splits[1], f"the task's own split {task.splits[1]!r}")
    train, reported = task.splits

    def rows(split: str, data_dir: str | Path | None) -> Sequence[Row]:
        if split not in (train, HELD_OUT):
            return task.rows(split, data_dir)
        found = task.rows(train, data_dir)
        held = _drawn(len(found), share, seed)
        return [found[i] for i in range(len(found)) if (i in held) == (split == HELD_OUT)]

    size = task.size(train)
    held = len(_drawn(size, share, seed))
    changed = replace(
        task, splits=(train, HELD_OUT, reported), sizes=(size - held, held, task.size(reported)), rows=rows
    )
    note = f"{held:,} of {size:,} rows of {train!r} held out ({share:.0%}, seed {seed}) and not trained on"
    return Validation(changed, HELD_OUT, note)


def scorer(
    validation: Validation,
    processor: Any,
    *,
    data_dir: str | Path | None = None,
    max_length: int | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> Callable[[nn.Module], dict[str, Any]]:
    """A function from a model to its metrics on the validation part, with the part's name as ``split`` and its rows as
    ``samples``; for a look at a model while it trains on ``validation.task``. Arguments: see `run.evaluate`."""

    def scores(model: nn.Module) -> dict[str, Any]:
        found = evaluate(
            model, validation.task, processor,
            split=validation.split, data_dir=data_dir, max_length=max_length, device=device, progress=progress,
        )  # fmt: skip
        values: dict[str, Any] = {score.metric: score.value for score in found}
        return values | {"split": validation.split, "samples": found[0].samples}

    return scores


def _drawn(rows: int, share: float, seed: int) -> set[int]:
    # NumPy's legacy generator has a frozen stream, so the part stays the same over versions
    return set(np.random.RandomState(seed).permutation(rows)[: max(1, round(share * rows))].tolist())
