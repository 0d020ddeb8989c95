"""Whether a model and a task belong together, asked before anything is read, trained or written."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..models.dense import library_of, logits
from ..models.example import example_batch
from .task import Task

ALIASES = {"squad": "squad1"}  # as papers call it
_INPUTS = {"pixel_values": "images", "input_values": "sound"}


def reads(model: nn.Module) -> str:
    """What the model is fed with: ``text``, ``images`` or ``sound``."""
    if library_of(model) == "timm":
        return "images"
    return _INPUTS.get(str(model.main_input_name), "text")


def head_kind(model: nn.Module) -> str:
    """The head on the model, as ``load_dense(kind=...)`` says it; from what its class can do, not from its config."""
    if library_of(model) == "timm":
        return "classification"
    base: Any = getattr(model, "_orig_mod", model)  # of torch.compile
    name = type(base).__name__
    if base.can_generate():
        return "seq2seq-lm" if base.config.is_encoder_decoder else "causal-lm"
    if "start_positions" in inspect.signature(base.forward).parameters:
        return "question-answering"
    if "Classification" in name or "Classifier" in name:
        return "token" if "Token" in name else "classification"
    if reads(base) == "sound":
        return "ctc" if "CTC" in name else "base"
    return "masked-lm" if base.get_output_embeddings() is not None else "base"


def check_reads(model: nn.Module, task: Task) -> None:
    """Raises ValueError for a text model with an image task, and the like."""
    found = reads(model)
    if found != task.reads:
        raise ValueError(
            f"{task.name} is a task on {task.reads}, but {type(model).__name__} reads {found}: choose another task or "
            "model"
        )


def check_head(model: nn.Module, task: Task) -> None:
    """Raises ValueError for a model without the head that the task needs, such as a classifier with a language task."""
    found = head_kind(model)
    if found in task.model_kinds:
        return
    if found == "masked-lm" and task.kind == "causal-lm":
        raise ValueError(
            f"{task.name} needs the probability of each token given those before it; {type(model).__name__} reads in "
            "both directions and has no perplexity. Take a causal language model, or a task of the kind masked-lm"
        )
    wanted = " or ".join(map(repr, task.model_kinds))
    raise ValueError(
        f"{task.name} needs a model of kind {wanted}, {type(model).__name__} is of kind {found!r}: load it as "
        f"kind={task.model_kinds[0]!r} and fine-tune it on this task"
    )


@torch.no_grad()
def check_labels(model: nn.Module, task: Task) -> None:
    """Raises ValueError when the model's head does not fit the task: its kind, or (tried on an example) its width."""
    check_head(model, task)
    if task.num_labels is None:
        return
    found = logits(model, example_batch(model)).shape[-1]
    if found != task.num_labels:
        raise ValueError(
            f"{task.name} has {task.num_labels} labels, {type(model).__name__} has a head for {found}: fine-tune it on "
            f"this task first (squeezoo finetune MODEL --task {task.name})"
        )


def tasks_for(model: nn.Module, names: str) -> tuple[Task, ...]:
    """The tasks that a list of names means, for this model.

    Args:
        names: separated by commas: tasks (``glue/sst2``), or families (``glue``), which mean those of their members
            that this model's head fits; ``squad`` means ``squad1``.

    Raises:
        ValueError: an unknown name, or a family without a member for this model.
    """
    from . import TASKS, get_task

    found: dict[str, Task] = {}
    for name in (ALIASES.get(part.strip(), part.strip()) for part in names.split(",")):
        members = [task for task in TASKS.values() if task.name.startswith(name + "/")]
        if name in TASKS or not members:
            found[name] = get_task(name)
            continue
        fitting = [task for task in members if _fits(model, task)]
        if not fitting:
            raise ValueError(
                f"no task of the family {name!r} fits {type(model).__name__}, which is of kind {head_kind(model)!r}: "
                f"the family has {', '.join(task.name for task in members)}"
            )
        found |= {task.name: task for task in fitting}
    return tuple(found.values())


def _fits(model: nn.Module, task: Task) -> bool:
    try:
        check_reads(model, task)
        check_labels(model, task)
    except ValueError:
        return False
    return True
