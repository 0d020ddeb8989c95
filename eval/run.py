"""Running a model over a task: logits in the order of the rows, and the scores they earn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..models.dense import logits
from .data import batches, collator
from .environment import library_versions
from .fit import check_reads
from .progress import progress_bar
from .task import Feature, Row, Score, Task


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


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
    if not len(features):
        raise ValueError("nothing to predict: there are no features")
    model.to(device)
    join = collator(processor)
    outputs: torch.Tensor | None = None
    with progress_bar(progress) as bar, evaluating(model):
        line = bar.add_task(description, total=len(features))
        for indices, chosen in batches(features, batch_size):
            batch = {name: tensor.to(device) for name, tensor in join(chosen).items() if name != "labels"}
            result = logits(model, batch).float().cpu()
            if outputs is None:
                outputs = result.new_empty((len(features), *result.shape[1:]))
            outputs[indices] = result
            bar.advance(line, len(indices))
    assert outputs is not None
    broken = (~outputs.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"the model gives NaN or infinite logits for {len(broken)} rows, the first is row {broken[0]}")
    return outputs.clone()  # made under inference mode; a clone outside it is an ordinary tensor


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
    max_length: int = 128,
    seed: int | None = None,
    progress: bool = True,
) -> tuple[Score, ...]:
    """Score a model, dense or compressed, on one split of a task.

    Rows of like length are batched together; the result depends neither on the batch size nor on the order of the rows
    (beyond the rounding of sums over differently padded rows).

    Args:
        model: a transformers or timm classifier; moved to ``device``.
        processor: its tokenizer, image processor or None; for images None means the size that the model declares.
        split: None takes the task's last one.
        limit: score only so many rows, always the same ones; the scores are then marked as not complete.
        max_length: longer texts are truncated to so many tokens.
        seed: training seed of the model, recorded in the scores.

    Returns:
        One `Score` per metric, the task's primary metric first.

    Raises:
        ValueError: unknown task or split, no tokenizer, or a model whose logits do not fit the task.
        DataError: data missing or broken.
    """
    if isinstance(task, str):
        from . import get_task

        task = get_task(task)
    split = task.report_split if split is None else split
    size = task.size(split)
    check_reads(model, task)
    rows = task.rows(split, data_dir)
    chosen = sample_rows(rows, limit)
    text = task.kind == "text-classification"
    features = task.encode(chosen, model if processor is None and not text else processor, max_length)
    logits_NC = predict(
        model, features, batch_size, device, processor=processor, progress=progress, description=f"{task.name} {split}"
    )
    if logits_NC.ndim != 2 or logits_NC.shape[1] != task.num_labels:
        raise ValueError(
            f"{task.name} needs logits [rows, {task.num_labels}], the model gives {list(logits_NC.shape)}: "
            f"load it with num_labels={task.num_labels} and fine-tune it on this task"
        )
    predictions = logits_NC.argmax(-1).tolist()
    values = task.score(predictions, [int(row["label"]) for row in chosen])
    return _scores(
        task,
        values,
        split=split,
        samples=len(chosen),
        complete=len(chosen) == size,
        libraries=library_versions(),
        seed=seed,
        settings={"max_length": max_length} if text else {},
    )


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
            higher_is_better=task.higher_is_better,
            **common,
        )
        for name in names
    )
