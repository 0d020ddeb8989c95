"""Ordinary model folders, read and written: config.json + model.safetensors (+ tokenizer), transformers or timm."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .describe import describe, library_of, timm_model_args
from .errors import LIBRARY_ERRORS, DenseError, brief, nearest
from .gguf import gguf_file, read_gguf
from .kinds import TIMM_KINDS, load_plugins, model_class, set_labels_
from .linear import layout_of
from .processor import load_processor, pad_with_end_
from .quiet import quiet
from .torchvision_guard import ensure_torchvision_importable

CHECKPOINT = "squeezoo.json"  # compress's manifest: what a packed checkpoint has beside its config.json


@dataclass(frozen=True)
class Read:
    """What a model folder holds, and the names of parameters that it does not hold and that are new."""

    model: nn.Module
    processor: Any
    library: str
    new: tuple[str, ...] = ()


def read_folder(folder: Path, kind: str, num_labels: int | None, seed: int) -> Read:
    """The model and processor of a model folder; see `load_dense`.

    Raises:
        DenseError: a Squeezoo checkpoint, no config.json, a config of neither library, no safetensors weights, weights
            that do not fit.
    """
    ensure_torchvision_importable()
    if (gguf := gguf_file(folder)) is not None:
        return _reading(folder, seed, lambda: Read(*read_gguf(gguf, kind, num_labels), "transformers"))
    if (folder / CHECKPOINT).is_file():
        raise DenseError(
            f"{folder} is a Squeezoo checkpoint, and a dense model is needed here: write one first with "
            f"`squeezoo export {folder} --to dense -o DENSE` and hand in DENSE; its zeros stay"
        )
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise DenseError(f"{folder} is no model folder: expected config.json, found {_listing(folder)}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DenseError(f"{config_file} is not valid JSON: {error}") from None
    weights = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / name).is_file() for name in weights):
        raise DenseError(
            f"{folder} has no {' or '.join(weights)}, found {_listing(folder)}. Pickled weights (*.bin, *.pth) are "
            f"never loaded, because unpickling runs code: convert them once, with model.save_pretrained(folder) where "
            f"you trust them."
        )
    if not isinstance(config, dict) or not {"architecture", "model_type"} & config.keys():
        raise DenseError(f"{config_file} has neither `model_type` (transformers) nor `architecture` (timm)")
    if "architecture" in config:
        return _reading(folder, seed, lambda: _read_timm(folder, config, kind, num_labels))
    return _reading(folder, seed, lambda: _read_transformers(folder, config, kind, num_labels))


def save_dense(model: nn.Module, processor: Any, directory: str | os.PathLike[str]) -> None:
    """Write a folder that `load_dense` and the model's own library read back.

    ``transformers``: what ``save_pretrained`` writes, of the processor too. ``timm``: what ``save_for_hf`` writes (read
    it with ``timm.create_model("local-dir:<directory>", pretrained=True)``). The folder appears whole or not at all; an
    earlier model folder at the same place is replaced.

    Raises:
        DenseError: unknown library, parametrizations still attached, a timm model whose arguments are not known (see
            `describe`), or ``directory`` holds something else, such as a Squeezoo checkpoint.
    """
    library = library_of(model)
    attached = next((name for name, module in model.named_modules() if _is_attached(module)), None)
    if attached is not None:
        raise DenseError(
            f"the model is still attached ({attached}.parametrizations): fold it before it is saved as a dense model"
        )
    describe(model)  # a model that could not be rebuilt is refused here, before anything is written
    target = Path(directory).absolute()
    is_checkpoint = (target / CHECKPOINT).is_file()  # it has a config.json too
    is_model = target.is_dir() and (not any(target.iterdir()) or (target / "config.json").is_file())
    if target.exists() and (is_checkpoint or not is_model):
        what = "holds a Squeezoo checkpoint" if is_checkpoint else "exists and is no model folder"
        raise DenseError(f"{target} {what}: give a new or an empty directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        with quiet():
            _write(model, processor, fresh, library)
        old = Path(scratch) / "old"  # removed with the scratch folder
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(fresh, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise


def save_config(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the model's own ``config.json``, and nothing else, into an existing folder.

    Raises:
        DenseError: unknown library.
    """
    ensure_torchvision_importable()
    folder = Path(folder)
    library = library_of(model)
    with quiet():
        if library == "transformers":
            config = deepcopy(model.config)
            config.architectures = [type(model).__name__]  # type: ignore[union-attr]
            config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        else:
            from timm.models._hub import save_config_for_hf

            path: Any = folder / "config.json"  # declared as str, opened as a Path by timm before 1.0.31
            save_config_for_hf(model, path, model_args=timm_model_args(model))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers on the CPU start from ``seed`` inside and go on outside as if nothing had happened."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _is_attached(module: nn.Module) -> bool:
    """Matrices and tables only: Wav2vec2's positional convolution is parametrized by its own weight norm."""
    return is_parametrized(module, "weight") and (isinstance(module, nn.Embedding) or bool(layout_of(module)))


def _write(model: nn.Module, processor: Any, folder: Path, library: str) -> None:
    if library == "transformers":
        model.save_pretrained(folder)  # type: ignore[operator]
        if processor is not None:
            processor.save_pretrained(folder)
    else:
        from timm.models import save_for_hf

        save_for_hf(model, str(folder), model_args=timm_model_args(model), safe_serialization=True)


def _reading(folder: Path, seed: int, read: Callable[[], Read]) -> Read:
    """``read()`` in silence, new parameters drawn from ``seed``; whatever the libraries raise names the folder."""
    try:
        with seeded(seed), quiet():
            return read()
    except DenseError:
        raise
    except (*LIBRARY_ERRORS, ImportError, SafetensorError, OSError, KeyError) as error:
        raise DenseError(f"{folder} does not load: {brief(error)}") from error


def _read_timm(folder: Path, config: dict[str, Any], kind: str, num_labels: int | None) -> Read:
    import timm

    if kind not in TIMM_KINDS:
        raise DenseError(f"{folder} holds a timm model: kind is one of {', '.join(TIMM_KINDS)}, found {kind!r}")
    architecture = str(config["architecture"])
    if not timm.is_model(architecture):
        raise DenseError(
            f"{folder / 'config.json'}: timm {timm.__version__} has no architecture {architecture!r}. Nearest: "
            f"{nearest(architecture, timm.list_models())}"
        )
    args = dict(config.get("model_args") or {})
    if kind == "base":
        args["num_classes"] = 0
    elif num_labels is not None:
        args["num_classes"] = num_labels
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, **args)
    model.squeezoo_model_args = args
    return Read(model.eval(), None, "timm")


def _read_transformers(folder: Path, stored: dict[str, Any], kind: str, num_labels: int | None) -> Read:
    import transformers as hf

    if stored.get("model_type") not in hf.CONFIG_MAPPING:
        load_plugins()  # one of them may have registered it
    config = hf.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    cls = model_class(config, kind)
    new_head = set_labels_(config, kind, num_labels)
    model, info = cls.from_pretrained(
        folder,
        config=config,
        use_safetensors=True,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # and then refused below, by name: the library's own message is in its report
        output_loading_info=True,
    )
    _check_fit(folder, model, info, new_head)
    processor = load_processor(folder)
    pad_with_end_(model, processor)
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    return Read(model.eval(), processor, "transformers", tuple(sorted(new)))


def _check_fit(folder: Path, model: Any, info: Mapping[str, Any], new_head: bool) -> None:
    """Only head and pooler may be new, and no part of the backbone left over; transformers would merely report it."""
    own = model.base_model.named_parameters(recurse=False)  # not the children's: those of the pooler may be new
    backbone = {name for name, _ in (*model.base_model.named_children(), *own)} - {"pooler"}
    buffers = {name for name, _ in model.base_model.named_buffers()}  # older versions stored position ids

    def in_backbone(key: str) -> bool:
        key = key.removeprefix(f"{model.base_model_prefix}.")
        return (key.partition(".")[0] in backbone or key in backbone) and key not in buffers

    problems = [f"{key} is missing" for key in sorted(info["missing_keys"]) if in_backbone(key)]
    problems += [f"{key} has no place" for key in sorted(info["unexpected_keys"]) if in_backbone(key)]
    problems += [
        f"{key} is {tuple(stored)}, expected {tuple(wanted)}"
        for key, stored, wanted in sorted(info["mismatched_keys"])
        if in_backbone(key) or not new_head
    ]
    if problems:
        raise DenseError(
            f"the weights in {folder} do not fit its config.json as {type(model).__name__}: {problems[0]} "
            f"({len(problems)} tensors do not fit)"
        )


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "an empty folder"
