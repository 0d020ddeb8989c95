"""Whether a model and a task belong together, asked before anything is read, trained or written."""

from __future__ import annotations

import torch
from torch import nn

from ..models.dense import logits
from ..models.example import example_batch
from .image import declared_shape
from .task import Task


def check_reads(model: nn.Module, task: Task) -> None:
    """Raises ValueError for a text model with an image task, or the reverse."""
    reads = "text" if declared_shape(model) is None else "images"
    needs = "text" if task.kind == "text-classification" else "images"
    if reads != needs:
        raise ValueError(
            f"{task.name} is a task on {needs}, but {type(model).__name__} reads {reads}: choose another task or model"
        )


@torch.no_grad()
def check_labels(model: nn.Module, task: Task) -> None:
    """Raises ValueError when the model's logits have another width than the task has labels; tried on an example."""
    found = logits(model, example_batch(model)).shape[-1]
    if found != task.num_labels:
        raise ValueError(
            f"{task.name} has {task.num_labels} labels, {type(model).__name__} has a head for {found}: fine-tune it on "
            f"this task first (squeezoo finetune MODEL --task {task.name})"
        )
