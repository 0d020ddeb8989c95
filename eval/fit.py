"""Whether a model, a task and a device belong together, asked before anything is read, trained or written."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.dense import library_of, logits
from ..models.example import example_batch
from .labels import task_order
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
    """Raises ValueError when the model's head does not fit the task: its kind, (tried on an example) its width, or the
    names of its classes."""
    check_head(model, task)
    if task.num_labels is None:
        return
    found = logits(model, example_batch(model)).shape[-1]
    if found != task.num_labels:
        raise ValueError(
            f"{task.name} has {task.num_labels} labels, {type(model).__name__} has a head for {found}: fine-tune it on "
            f"this task first (squeezoo finetune MODEL --task {task.name})"
        )
    task_order(model, task)


def check_device(device: str | torch.device) -> None:
    """Raises ValueError for a device that this PyTorch or this machine does not have."""
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {str(device)!r}: expected cpu, cuda or cuda:NUMBER") from None
    if wanted.type == "cpu":
        return
    if wanted.type == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        raise ValueError(
            f"no device {str(device)!r}: this PyTorch ({torch.__version__}) is built without CUDA; use cpu"
        )
    count = torch.get_device_module(wanted).device_count() if wanted.type in ("cuda", "xpu", "mps") else 0
    if count <= (wanted.index or 0):
        raise ValueError(f"no device {str(device)!r}: PyTorch sees {count} of this type here; use cpu")


@dataclass(frozen=True)
class Requested:
    """A task that was asked for.

    Args:
        by: the name that the user wrote. explicit: it is the task's own, not that of a family or of several versions.
    """

    task: Task
    by: str
    explicit: bool


def requested_tasks(names: str) -> tuple[Requested, ...]:
    """The tasks that a list of names means, each once.

    Args:
        names: separated by commas: tasks (``glue/sst2``) or families (``glue``, all its members); ``squad`` means
            ``squad1``.

    Raises:
        ValueError: an unknown or empty name.
    """
    from . import TASKS, get_task

    found: dict[str, Requested] = {}
    for name in (part.strip() for part in names.split(",")):
        if not name:
            raise ValueError(
                f"an empty name in the list of tasks {names!r}: write task,task without a comma at its end"
            )
        members = [task for task in TASKS.values() if task.name.startswith(name + "/")]
        if name in TASKS:
            found[name] = Requested(TASKS[name], name, explicit=True)
        elif name in ALIASES:
            found.setdefault(ALIASES[name], Requested(get_task(ALIASES[name]), name, explicit=False))
        elif members:
            for task in members:
                found.setdefault(task.name, Requested(task, name, explicit=False))
        else:
            get_task(name)
    return tuple(found.values())


def misfit(model: nn.Module, task: Task) -> str | None:
    """Why the model cannot do the task; None when it can."""
    try:
        check_reads(model, task)
        check_labels(model, task)
    except ValueError as error:
        return str(error)
    return None


def tasks_for(model: nn.Module, names: str) -> tuple[Task, ...]:
    """The tasks that a list of names means, for this model: of families those members that its head fits.

    Raises:
        ValueError: an unknown or empty name, or a family without a member for this model.
    """
    requested = requested_tasks(names)
    chosen = [one for one in requested if one.explicit or one.by in ALIASES or misfit(model, one.task) is None]
    for name in dict.fromkeys(one.by for one in requested):
        if not any(one.by == name for one in chosen):
            raise no_member(model, [one.task for one in requested if one.by == name], name)
    return tuple(one.task for one in chosen)


def no_member(model: nn.Module, members: Sequence[Task], family: str) -> ValueError:
    """The error for a family of which the model can do none."""
    return ValueError(
        f"no task of the family {family!r} fits {type(model).__name__}, which is of kind {head_kind(model)!r}: "
        f"the family has {', '.join(task.name for task in members)}"
    )
