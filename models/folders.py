"""Ordinary model folders, read and written: config.json + model.safetensors (+ tokenizer), transformers or timm."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .describe import DenseError, library_of, timm_model_args
from .quiet import quiet
from .torchvision_guard import ensure_torchvision_importable

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)


def read_folder(folder: Path, kind: str, num_labels: int | None, seed: int) -> tuple[nn.Module, Any, str]:
    """(model, processor, library) of a model folder; see `load_dense`.

    Raises:
        DenseError: no config.json, a config of neither library, no safetensors weights, weights that do not fit.
    """
    ensure_torchvision_importable()
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise DenseError(f"{folder} is no model folder: expected config.json, found {_listing(folder)}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DenseError(f"{config_file} is not valid JSON: {error}") from None
    if not any(folder.glob("*.safetensors")):
        raise DenseError(
            f"{folder} has no *.safetensors weights, found {_listing(folder)}. Pickled weights (*.bin, *.pth) are "
            f"never loaded, because unpickling runs code: convert them once, with model.save_pretrained(folder) where "
            f"you trust them."
        )
    with seeded(seed):
        if isinstance(config, dict) and "architecture" in config:
            return _read_timm(folder, config, kind, num_labels), None, "timm"
        if isinstance(config, dict) and "model_type" in config:
            return (*_read_transformers(folder, kind, num_labels), "transformers")
    raise DenseError(f"{config_file} has neither `model_type` (transformers) nor `architecture` (timm)")


def save_dense(model: nn.Module, processor: Any, directory: str | os.PathLike[str]) -> None:
    """Write a folder that `load_dense` and the model's own library read back.

    ``transformers``: what ``save_pretrained`` writes, of the processor too. ``timm``: what ``save_for_hf`` writes (read
    it with ``timm.create_model("local-dir:<directory>", pretrained=True)``). The folder appears whole or not at all; an
    earlier model folder at the same place is replaced.

    Raises:
        DenseError: unknown library, parametrizations still attached, or ``directory`` holds something else.
    """
    library = library_of(model)
    attached = next((name for name, _ in model.named_parameters() if ".parametrizations." in name), None)
    if attached is not None:
        raise DenseError(f"the model is still attached ({attached}): fold it before it is saved as a dense model")
    target = Path(directory).absolute()
    if target.exists() and not (target.is_dir() and (not any(target.iterdir()) or (target / "config.json").is_file())):
        raise DenseError(f"{target} exists and is no model folder: give a new or an empty directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        fresh = Path(scratch) / "new"
        fresh.mkdir()
        with quiet():
            _write(model, processor, fresh, library)
        if target.exists():
            os.replace(target, Path(scratch) / "old")  # removed with the scratch folder
        os.replace(fresh, target)


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

            save_config_for_hf(model, str(folder / "config.json"), model_args=timm_model_args(model))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers on the CPU start from ``seed`` inside and go on outside as if nothing had happened."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _write(model: nn.Module, processor: Any, folder: Path, library: str) -> None:
    if library == "transformers":
        model.save_pretrained(folder)  # type: ignore[operator]
        if processor is not None:
            processor.save_pretrained(folder)
    else:
        from timm.models import save_for_hf

        save_for_hf(model, str(folder), model_args=timm_model_args(model), safe_serialization=True)


def _read_timm(folder: Path, config: dict[str, Any], kind: str, num_labels: int | None) -> nn.Module:
    import timm

    args = dict(config.get("model_args") or {})
    if kind == "base":
        args["num_classes"] = 0
    elif num_labels is not None:
        args["num_classes"] = num_labels
    try:
        with quiet():
            model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, **args)
    except RuntimeError as error:
        raise DenseError(f"the weights in {folder} do not fit its config.json: {error}") from error
    model.squeezoo_model_args = args
    return model.eval()


def _read_transformers(folder: Path, kind: str, num_labels: int | None) -> tuple[nn.Module, Any]:
    import transformers as hf

    with quiet():
        config = hf.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if kind == "base":
            auto: Any = hf.AutoModel
        elif type(config) in hf.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            auto = hf.AutoModelForSequenceClassification
        elif type(config) in hf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            auto = hf.AutoModelForImageClassification
        else:
            raise DenseError(f"transformers has no classification model for {config.model_type!r}: load kind='base'")
        new_head = num_labels is not None and num_labels != config.num_labels
        if new_head:
            config.num_labels = num_labels
        # Nothing is newly initialised in silence: transformers' own report is turned off, so the keys are checked here.
        try:
            model, info = auto.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                ignore_mismatched_sizes=new_head,
                output_loading_info=True,
            )
        except RuntimeError as error:
            raise DenseError(f"the weights in {folder} do not fit its config.json: {error}") from error
        processor: Any = None
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            processor = hf.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        elif (folder / "preprocessor_config.json").is_file():
            processor = hf.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    absent = [*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])]
    backbone = model.base_model_prefix + "." if model.base_model is not model else ""
    lost = sorted(key for key in absent if key.startswith(backbone) and "pooler" not in key)
    if lost:
        raise DenseError(
            f"the weights in {folder} do not fit its config.json: {len(lost)} tensors of {type(model).__name__} are "
            f"missing or of another shape, e.g. {lost[0]}"
        )
    return model.eval(), processor


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "an empty folder"
