"""The classes by name: a published model may have its head in another order than the task's files.

N rows, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .task import Setting, Task

Aliases = Mapping[str, tuple[str, ...]]
SETTING = "label_order"  # of a score: the classes in the order of the model's logits, where that is not the task's


def model_labels(model: nn.Module) -> tuple[str, ...]:
    """The class names in the model's config, in the order of its logits; none where it only numbers them (``LABEL_0``,
    transformers' default) and for models without such a config (timm)."""
    named: Any = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = tuple(str(name) for _, name in sorted(named.items(), key=lambda item: int(item[0])))
    return () if all(re.fullmatch(r"label_\d+|\d+", name.casefold()) for name in names) else names


def column_order(model: nn.Module, names: Sequence[str], aliases: Aliases | None = None) -> tuple[int, ...] | None:
    """Of each class of the task the column of the model's logits; None where that is the same, or the model has no
    names (its head is then taken to be in the task's order) or another number of them.

    Args:
        names: of the task's classes. aliases: further names of a class. Upper and lower case, ``-``, ``_`` and spaces
            do not matter.

    Raises:
        ValueError: the model names its classes, but not as the task does.
    """
    found = model_labels(model)
    if not names or len(found) != len(names):
        return None
    known = [{_plain(name), *map(_plain, (aliases or {}).get(name, ()))} for name in names]
    columns = [[column for column, name in enumerate(found) if _plain(name) in spellings] for spellings in known]
    if not all(len(column) == 1 for column in columns):
        raise ValueError(
            f"the model's classes do not match the task's: expected {', '.join(names)} in any order, found "
            f"{', '.join(found)} (id2label in its config.json). If it was trained on this task, write the task's names "
            "into id2label and label2id, in the order of its logits; if not, fine-tune it on the task first"
        )
    order = tuple(column for (column,) in columns)
    return None if order == tuple(range(len(order))) else order


def task_order(model: nn.Module, task: Task) -> tuple[int, ...] | None:
    """`column_order` for a task; its errors name the task."""
    try:
        return column_order(model, task.label_names, task.label_aliases)
    except ValueError as error:
        raise ValueError(f"{task.name}: {error}") from None


def note_order_(settings: dict[str, Setting], model: nn.Module, order: tuple[int, ...] | None) -> None:
    """Record in a score's settings that the model's columns were put into another order."""
    if order is not None:
        settings[SETTING] = ", ".join(model_labels(model))


def name_labels_(model: nn.Module, task: Task, *, new: Collection[str] = (), retrain: bool = False) -> None:
    """Write the task's class names into the model's config, and bring a head that has them in another order into the
    task's, so that it can be trained on the task's labels.

    Args:
        new: the parameters that were just drawn at random; where the head is among them, the names in the config are
            those of an earlier one.
        retrain: the head is about to be trained on this task, whatever its classes were. Without it, a head with other
            names than the task's is left alone, and `task_order` refuses it.

    Raises:
        ValueError: the head is no single linear layer, so that its rows cannot be put into order.
    """
    config: Any = getattr(model, "config", None)
    if not task.label_names or config is None or len(getattr(config, "id2label", None) or ()) != task.num_labels:
        return
    backbone = f"{getattr(model, 'base_model_prefix', '')}."
    if all(name.startswith(backbone) for name in new):
        try:
            order = task_order(model, task)
        except ValueError:
            if not retrain:
                return
            order = None
        if order is not None:
            reorder_head_(model, order)
    config.id2label = dict(enumerate(task.label_names))
    config.label2id = {name: index for index, name in enumerate(task.label_names)}


@torch.no_grad()
def reorder_head_(model: nn.Module, order: Sequence[int]) -> None:
    """Put the rows of the head so that its logits are ``logits_NC[:, order]``.

    Raises:
        ValueError: not exactly one linear layer of that width outside the backbone.
    """
    backbone = getattr(model, "base_model_prefix", "") + "."
    heads = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == len(order) and not name.startswith(backbone)
    ]
    if len(heads) != 1:
        raise ValueError(
            f"the classes of {type(model).__name__} are in another order than the task's, and its head cannot be put "
            f"into order: expected one linear layer with {len(order)} outputs, found {len(heads)}"
        )
    for parameter in heads[0].parameters():
        parameter.copy_(parameter[list(order)].clone())


def _plain(name: str) -> str:
    return re.sub(r"[-_\s]+", "_", name.strip().casefold())
