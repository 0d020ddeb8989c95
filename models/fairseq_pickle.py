"""Read a fairseq ``.pt`` file without unpickling code.

``torch.load(weights_only=True)`` builds tensors, numbers, strings and containers only. A fairseq file also names a few
classes: ``argparse.Namespace`` (the arguments of training), fairseq's ``Dictionary`` (the symbols of a CTC model),
OmegaConf containers, NumPy scalars (scores). Here each of these names stands for an empty class of ours that keeps the
data it is given and runs nothing, so none of those libraries is needed either. Every other name is refused.
"""

from __future__ import annotations

import pickle
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import DenseError, brief


class Inert:
    """What an allowed class or function name becomes: it takes any arguments, keeps its state, and does nothing."""

    stands_for = ""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


_OMEGACONF_NODES = ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "BytesNode", "PathNode")
_ALLOWED = (
    "argparse.Namespace",
    "fairseq.data.dictionary.Dictionary",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    *(f"omegaconf.nodes.{node}" for node in _OMEGACONF_NODES),
    # What OmegaConf notes about types, and what NumPy scalars are made of.
    *(f"typing.{name}" for name in ("Any", "Dict", "List", "Optional", "Tuple", "Union")),
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    "_operator.getitem",
    "collections.defaultdict",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)
_STAND_INS = {name: type("Inert_" + name.replace(".", "_"), (Inert,), {"stands_for": name}) for name in _ALLOWED}


def read_pickle(path: Path) -> Any:
    """The contents of a file written by ``torch.save``, tensors on the CPU, allowed classes as `Inert` objects.

    Raises:
        DenseError: no such file, no file of ``torch.save``, damaged, or it names a class that is not allowed here.
    """
    allowed: list[Any] = [(stand_in, name) for name, stand_in in _STAND_INS.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DenseError(f"no file {path}: expected a checkpoint written by fairseq") from None
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise DenseError(f"{path} is damaged or was not written by torch.save: {brief(error)}") from error


def _refused(path: Path, error: pickle.UnpicklingError) -> DenseError:
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named is None:
        return DenseError(f"{path} is damaged or was not written by torch.save: {brief(error)}")
    return DenseError(
        f"{path} needs the class {named[1]}, which is not loaded, because unpickling classes runs code. What is read: "
        f"tensors and plain data, argparse.Namespace, omegaconf containers, fairseq's Dictionary. Where you trust the "
        f"file, load it once in fairseq's own environment and write it again with plain contents: "
        f'torch.save({{"args": None, "cfg": OmegaConf.to_container(cfg, enum_to_str=True), "model": '
        f"model.state_dict()}}, path)"
    )


def plain(value: Any) -> Any:
    """``value`` with every namespace, OmegaConf container and record as dict, list or plain value."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, Namespace):
        return plain(vars(value))
    if not isinstance(value, Inert):
        return value
    content = vars(value).get("_content", vars(value).get("_val"))
    if value.stands_for.startswith("omegaconf."):
        return plain(content)
    return {key: plain(item) for key, item in vars(value).items() if key != "arguments"}
