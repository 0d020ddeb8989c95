"""A fairseq checkpoint as plain data, read from and written to fairseq's ``.pt`` file. fairseq itself is not needed.

The file is a dict: ``model`` holds the tensors, ``args`` (an ``argparse.Namespace``) or ``cfg`` (nested dicts, since
fairseq 0.10) the architecture, ``task_state`` the symbols of a CTC model, and the rest is the state of training.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import DenseError
from .fairseq_pickle import plain, read_pickle

FairseqKind = Literal["bart", "wav2vec2", "wav2vec_ctc"]
# fairseq stores these as an object of its class Dictionary; a list under a key of ours needs no class.
_SYMBOLS = "squeezoo_symbols"


@dataclass(frozen=True)
class FairseqCheckpoint:
    """A model of fairseq.

    Args:
        kind: ``bart`` (`BARTModel`), ``wav2vec2`` (`Wav2Vec2Model`) or ``wav2vec_ctc`` (`Wav2VecCtc`).
        args: arguments of the architecture, by fairseq's names. Those of ``wav2vec_ctc`` hold the ones of the
            Wav2Vec2 inside it as ``args["w2v_args"]["model"]``, and of its task as ``args["w2v_args"]["task"]``.
        task: arguments of the task, ``{}`` where the file has none.
        state: tensors by fairseq's names, on the CPU, of the dtypes in the file.
        symbols: the output symbols of ``wav2vec_ctc`` in order, None where the file does not say.
    """

    kind: FairseqKind
    args: dict[str, Any]
    task: dict[str, Any]
    state: dict[str, Tensor] = field(repr=False)
    symbols: tuple[str, ...] | None = None


def load_fairseq_checkpoint(path: str | os.PathLike[str]) -> FairseqCheckpoint:
    """Read a checkpoint of BART or Wav2Vec2 that fairseq wrote. No code in the file is run.

    Raises:
        DenseError: no such file, damaged, not from fairseq, a class in it that is not read (named), or another
            architecture.
    """
    path = Path(path)
    found = read_pickle(path)
    if not isinstance(found, Mapping) or not isinstance(found.get("model"), Mapping):
        keys = ", ".join(map(str, list(found)[:6])) if isinstance(found, Mapping) else type(found).__name__
        raise DenseError(
            f"{path} is no fairseq checkpoint: expected a dict with `model` and `args` or `cfg`, has {keys}"
        )
    state = dict(found["model"])
    odd = [f"{name} is a {type(value).__name__}" for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise DenseError(f"{path}: expected tensors by name in `model`, but {odd[0]}")
    args, task = _arguments(path, plain(found.get("args")), plain(found.get("cfg")))
    kind = _kind(path, args)
    if kind != "bart":
        args, task = _as_config(args, task, kind)
    symbols = _symbols(found.get(_SYMBOLS), plain(found.get("task_state")))
    return FairseqCheckpoint(kind, args, task, state, symbols)


def save_fairseq_checkpoint(checkpoint: FairseqCheckpoint, path: str | os.PathLike[str]) -> None:
    """Write a ``.pt`` file that fairseq's ``load_model_ensemble_and_task`` and `load_fairseq_checkpoint` read.

    fairseq builds the task first, so pass it the folder with the dictionary: ``arg_overrides={"data": folder}``. Its
    BART wants an ``argparse.Namespace``, which ``torch.load`` refuses by default since torch 2.6; before fairseq loads
    any such file: ``torch.serialization.add_safe_globals([argparse.Namespace])``. Wav2Vec2 files hold dicts and tensors
    only. The file appears whole or not at all.
    """
    path = Path(path)
    flat = checkpoint.kind == "bart"
    history = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
    contents: dict[str, Any] = {
        "args": Namespace(**{**checkpoint.task, **checkpoint.args}) if flat else None,
        "cfg": None if flat else {"_name": None, "task": checkpoint.task, "model": checkpoint.args},
        "model": {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.state.items()},
        "optimizer_history": [history],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
        "task_state": {},
    }
    if checkpoint.symbols is not None:
        contents[_SYMBOLS] = list(checkpoint.symbols)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        torch.save(contents, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _arguments(path: Path, args: Any, cfg: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(architecture, task) arguments, from the flat ``args`` of old files or the nested ``cfg`` of newer ones."""
    if isinstance(args, dict):
        return args, args
    if isinstance(cfg, dict) and isinstance(cfg.get("model"), dict):
        task = cfg.get("task")
        return cfg["model"], task if isinstance(task, dict) else {}
    raise DenseError(f"{path}: neither `args` nor `cfg.model` says what architecture the tensors in `model` belong to")


def _kind(path: Path, args: Mapping[str, Any]) -> FairseqKind:
    name = str(args.get("_name") or args.get("arch"))
    kinds: dict[str, FairseqKind] = {
        "bart": "bart", "bart_base": "bart", "bart_large": "bart", "wav2vec2": "wav2vec2", "wav2vec_ctc": "wav2vec_ctc",
    }  # fmt: skip
    if name in kinds:
        return kinds[name]
    raise DenseError(
        f"{path} holds the fairseq architecture {name!r}. Read are {', '.join(kinds)}. Other fairseq models can be "
        f"compressed live: build them with fairseq and attach to the module."
    )


def _as_config(args: dict[str, Any], task: dict[str, Any], kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(architecture, task) arguments of Wav2Vec2 as newer fairseq writes them, also from the flat ones of old files."""
    inner = args.get("w2v_args")
    if isinstance(inner, dict) and not isinstance(inner.get("model"), dict):
        inner = {"model": _named(inner, "wav2vec2"), "task": _named(inner, "audio_pretraining")}
    flat = "_name" not in args
    args = _named(args, kind) if flat else args
    if isinstance(inner, dict):
        args = {**args, "w2v_args": inner}
    if flat or "_name" not in task:
        task = _named(task, "audio_pretraining" if kind == "wav2vec2" else "audio_finetuning")
        task.pop("w2v_args", None)
    return args, task


def _named(flat: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Flat arguments as a config node. ``arch`` and ``task`` name parts of the flat list; unset arguments say None."""
    return {"_name": name} | {k: v for k, v in flat.items() if k not in ("arch", "task", "_name") and v is not None}


def _symbols(symbols: Any, task_state: Any) -> tuple[str, ...] | None:
    """Output symbols, from our own key or else from the ``Dictionary`` in fairseq's task state."""
    dictionary = task_state.get("target_dictionary") if isinstance(task_state, dict) else None
    if symbols is None and isinstance(dictionary, dict):
        symbols = dictionary.get("symbols")
    return tuple(map(str, symbols)) if isinstance(symbols, list) else None
