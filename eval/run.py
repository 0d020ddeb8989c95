"""Running a model over a task: logits in the order of the rows, and the scores they earn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..models.call import TARGETS
from ..models.dense import logits
from .environment import library_versions
from .fit import check_device, check_head, check_reads
from .labels import note_order_, task_order
from .runner import Runner, evaluating
from .task import Feature, Row, Score, Setting, Task

__all__ = ["evaluate", "evaluating", "predict", "sample_rows"]


def predict(
    model: nn.Module,
    features: Sequence[Feature],
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    *,
    processor: Any = None,
    progress: bool = False,
    description: str = "evaluate",
) -> torch.Tensor:
    """The model's logits, one row per feature, in the order of ``features``.

    Args:
        model: is moved to ``device``.
        features: from ``Task.encode``.
        processor: the tokenizer whose padding token fills short rows (0 without one).
        progress: show a bar with the time left, on the error stream and only when that is a terminal.

    Returns:
        float32 [n, num_labels] on the CPU.

    Raises:
        ValueError: no features, or outputs that are not finite.
    """
    runner = Runner(model, processor, device, batch_size, progress=progress, title=description)
    rows = runner.map(features, lambda model, batch: logits(model, batch).float().cpu(), drop=TARGETS)
    outputs = torch.stack(rows)
    broken = (~outputs.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"the model gives NaN or infinite logits for {len(broken)} rows, the first is row {broken[0]}")
    return outputs


def sample_rows(rows: Sequence[Row], limit: int | None) -> Sequence[Row]:
    """``limit`` rows drawn once and for all (files may be sorted by label), in their order; all when that few exist."""
    if limit is None or limit >= len(rows):
        return rows
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    # the legacy generator's stream is frozen by NumPy, so the sample stays the same over versions
    chosen = np.random.RandomState(0).permutation(len(rows))[:limit]
    return [rows[index] for index in sorted(chosen.tolist())]


def evaluate(
    model: nn.Module,
    task: Task | str,
    processor: Any,
    *,
    split: str | None = None,
    data_dir: str | Path | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    max_length: int | None = None,
    settings: Mapping[str, Setting] | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> tuple[Score, ...]:
    """Score a model, dense or compressed, on one split of a task.

    Rows of like length are batched together; the result depends neither on the batch size nor on the order of the rows
    (beyond the rounding of sums over differently padded rows).

    Args:
        model: of transformers or timm, with the head that the task needs; moved to ``device``.
        processor: its tokenizer, image or speech processor, or None; for images None means the size that the model
            declares.
        split: None takes the task's last one.
        limit: score only so many rows, always the same ones; the scores are then marked as not complete.
        max_length: longer texts are truncated to so many tokens, at least 1; None takes the task's own.
        settings: values for the names in ``task.settings``.
        seed: training seed of the model, recorded in the scores.

    A model whose config names its classes in another order than the task has its logits put into the task's order; the
    scores' settings then hold ``label_order``.

    Returns:
        One `Score` per metric, the task's primary metric first.

    Raises:
        ValueError: unknown task, split or setting, no tokenizer, no such device, or a model that does not fit the task,
            by its head or by the names of its classes.
        DataError: data missing or broken.
    """
    if isinstance(task, str):
        from . import get_task

        task = get_task(task)
    split = task.report_split if split is None else split
    size = task.size(split)
    conditions = task.resolved(settings)
    check_device(device)
    check_reads(model, task)
    check_head(model, task)
    task_order(model, task)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1 token, got {max_length}")
    length = 0
    if task.max_length is not None:
        length = task.max_length if max_length is None else max_length
        conditions = {"max_length": length, **conditions}
    found = task.rows(split, data_dir)
    rows = sample_rows(found, limit)
    conditions |= rows[0].get("settings", {}) if rows else {}
    runner = Runner(
        model, processor, device, batch_size, length, conditions, progress=progress, title=f"{task.name} {split}"
    )
    predictions = predict_classes(runner, rows, task) if task.predict is None else task.predict(runner, rows)
    values = task.score(predictions, [task.reference(row) for row in rows])
    return _scores(
        task,
        values,
        split=split,
        samples=len(rows),
        complete=len(rows) == (size or len(found)),
        libraries=library_versions(),
        seed=seed,
        settings=conditions,
    )


def predict_classes(runner: Runner, rows: Sequence[Row], task: Task) -> list[Any]:
    """One forward per row: the class of the largest logit, the logit itself for regression.

    Raises:
        ValueError: features and rows differ in number, or logits of another width than the task has labels.
    """
    image = task.reads == "images"
    features = task.encode(
        rows, runner.model if runner.processor is None and image else runner.processor, runner.max_length
    )
    if len(features) != len(rows):
        raise ValueError(f"{task.name}: encode gives {len(features)} features for {len(rows)} rows, expected as many")
    logits_NC = predict(
        runner.model, features, runner.batch_size, runner.device,
        processor=runner.processor, progress=runner.progress, description=runner.title,
    )  # fmt: skip
    if logits_NC.ndim != 2 or logits_NC.shape[1] != task.num_labels:
        raise ValueError(
            f"{task.name} needs logits [rows, {task.num_labels}], the model gives {list(logits_NC.shape)}: "
            f"load it with num_labels={task.num_labels} and fine-tune it on this task"
        )
    if task.kind == "text-regression":
        return logits_NC[:, 0].tolist()
    order = task_order(runner.model, task)
    if order is not None:
        logits_NC = logits_NC[:, list(order)]
        note_order_(runner.settings, runner.model, order)
    return logits_NC.argmax(-1).tolist()


def _scores(task: Task, values: Mapping[str, float], **common: Any) -> tuple[Score, ...]:
    if task.metric not in values:
        raise ValueError(f"{task.name}: its score function gives {sorted(values)}, not its metric {task.metric!r}")
    names = sorted(values, key=lambda name: name != task.metric)  # stable: the primary first, the others as they come
    record: Callable[..., Score] = Score
    return tuple(
        record(
            task=task.name,
            task_version=task.version,
            metric=name,
            value=values[name],
            higher_is_better=task.higher_is_better != (name in task.opposite),
            **common,
        )
        for name in names
    )
