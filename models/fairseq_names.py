"""Tensors renamed between two libraries, strictly: every name has its place, or the model is refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from .errors import DenseError

ACTIVATIONS = {"gelu": "gelu", "gelu_accurate": "gelu_pytorch_tanh", "relu": "relu", "swish": "silu", "tanh": "tanh"}


def linear(theirs: str, ours: str) -> dict[str, str]:
    """Weight and bias of one module: {fairseq's name: transformers' name}."""
    return {f"{theirs}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}


def renamed(
    state: Mapping[str, Tensor], names: Mapping[str, str], ignored: Iterable[str], what: str
) -> dict[str, Tensor]:
    """``state`` with each name replaced by ``names``; names that match a pattern of ``ignored`` are left out.

    Raises:
        DenseError: a name is missing from the state, or one in it has no place.
    """
    missing = [name for name in names if name not in state]
    over = [name for name in state if name not in names and not any(re.fullmatch(p, name) for p in ignored)]
    if missing or over:
        parts = [f"{missing[0]} is missing ({len(missing)} are)"] if missing else []
        parts += [f"{over[0]} has no place ({len(over)} have none)"] if over else []
        raise DenseError(f"{what} cannot be converted exactly: {'; '.join(parts)}. Nothing was converted.")
    return {new: state[name] for name, new in names.items()}


def count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks ``<prefix>.0``, ``<prefix>.1``, ... in a state dict."""
    found = {int(m[1]) for name in state if (m := re.match(re.escape(prefix) + r"\.(\d+)\.", name))}
    return max(found) + 1 if found else 0


def needed(args: Mapping[str, Any], name: str) -> Any:
    """An argument of fairseq without which the architecture is not known."""
    if args.get(name) is None:
        raise DenseError(f"the fairseq arguments lack {name!r}: its value is in the command or the config of training")
    return args[name]


def activation(args: Mapping[str, Any], default: str) -> str:
    """transformers' name of fairseq's ``activation_fn``."""
    name = str(args.get("activation_fn") or default)
    if name not in ACTIVATIONS:
        raise DenseError(
            f"activation_fn {name!r} of fairseq has no equal in transformers; known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def fairseq_activation(name: str) -> str:
    """fairseq's name of a transformers activation."""
    theirs = {ours: theirs for theirs, ours in ACTIVATIONS.items()} | {"gelu_new": "gelu_accurate"}
    if name not in theirs:
        raise DenseError(f"activation {name!r} has no equal in fairseq; known: {', '.join(theirs)}")
    return theirs[name]


def refuse_unless(conditions: Mapping[str, bool], what: str) -> None:
    """Raise for the first condition that does not hold; its key says what was expected.

    Raises:
        DenseError: naming it.
    """
    for expected, holds in conditions.items():
        if not holds:
            raise DenseError(f"{what}: expected {expected}")
