"""What a file of scores says beside them: which model, on what it ran, and what was left out."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .compress.atomic import sha256
from .compress.backends import Backend, resolve_backend
from .compress.checkpoint import MANIFEST, Manifest, load_manifest
from .compress.provenance import read_provenance
from .compress.runtime.candidates import units_of
from .eval.environment import device_name, library_versions
from .eval.several import Outcome
from .models.dense import find_folder
from .models.errors import DenseError
from .pipeline import Loaded, code_version, load_any
from .zoo_cards.hub import list_models, resolve

_ROWS = tuple(4**power for power in range(11))  # numbers of rows of a GEMM at which its kernel is asked for
_WEIGHTS = ("*.safetensors", "*.gguf")


def checkpoint_folder(source: str) -> Path | None:
    """The folder of a compressed checkpoint or of a zoo name; None for all else, as `pipeline.load_any` has it."""
    return resolve(source) if source in list_models() or (Path(source) / MANIFEST).is_file() else None


def load_to_score(source: str, backend: Backend, device: str) -> Loaded:
    """The model that a command was given.

    Raises:
        ValueError: a backend for a dense model. CheckpointError, ZooError, DenseError: see `load_any`.
    """
    loaded = load_any(source, backend, device)
    if backend not in ("auto", "dense") and checkpoint_folder(source) is None:
        raise ValueError(
            f"--backend {backend} is for compressed checkpoints, {_name(source)} is a dense model, which PyTorch runs: "
            "leave it out"
        )
    return loaded


def seed_of(source: str) -> int | None:
    """The seed that a checkpoint or a fine-tuned dense folder was trained with; None where its files do not say."""
    folder = checkpoint_folder(source)
    if folder is not None:
        return load_manifest(folder).recipe.seed
    provenance = read_provenance(source) if Path(source).is_dir() else None
    return None if provenance is None else int(provenance["recipe"]["seed"])


def describe_run(source: str, model: nn.Module, backend: Backend, device: str) -> dict[str, Any]:
    """The conditions of all scores of a run, as JSON data without any path of this machine.

    ``model``: its folder's name, the revision of a Hub repository or package, SHA-256 of each weight file (random
    weights have none), and of a checkpoint the recipe.
    ``backend``: of a checkpoint, what was asked for, what ran, the classes of the modules that stand for its GEMMs, and
    the kernels that those choose, whatever the number of rows.
    """
    folder = checkpoint_folder(source)
    digests, revision = _weights(source, folder)
    about: dict[str, Any] = {"name": _name(source), "revision": revision, "sha256": digests}
    ran = None
    if folder is not None:
        manifest = load_manifest(folder)
        about["recipe"] = manifest.recipe.name
        ran = _backend(manifest, model, backend, device)
    return {
        "model": about,
        "device": device_name(device),
        "backend": ran,
        "seed": seed_of(source),
        "threads": torch.get_num_threads(),
        "squeezoo_commit": code_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "libraries": library_versions(),
    }


def record_of(run: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """The file of a run: `describe_run`'s, the skipped tasks with their reasons, the scores."""
    skipped = [{"task": one.task, "reason": without_folders(one.reason)} for one in outcome.skipped]
    return {**run, "skipped": skipped, "scores": [score.to_dict() for score in outcome.scores]}


def without_folders(text: str) -> str:
    """``text`` with absolute paths cut to their last name: a published file holds none of this machine's folders."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s'\":,;()/]+/)*([^\s'\":,;()/]+)", r"\1", text)


def _name(source: str) -> str:
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def _weights(source: str, folder: Path | None) -> tuple[dict[str, str], str | None]:
    """SHA-256 of each weight file, and the revision of what was downloaded or installed."""
    if folder is not None:
        files = load_manifest(folder).files
        return {name: str(file["sha256"]) for name, file in files.items() if _is_weights(name)}, None
    path = Path(source).expanduser()
    if path.is_file():
        return {path.name: sha256(path)}, None
    if source.partition("/")[0] in ("timm", "transformers") and "." not in source and not path.is_dir():
        return {}, None  # random weights
    try:
        found, revision = find_folder(source)
    except DenseError:
        return {}, None
    weights = sorted({file for pattern in _WEIGHTS for file in found.glob(pattern)})
    return {file.name: sha256(file) for file in weights}, revision


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith("golden")


def _backend(manifest: Manifest, model: nn.Module, backend: Backend, device: str) -> dict[str, Any]:
    modules = dict(model.named_modules())
    gemms = Counter(type(modules[gemm.name]).__name__ for gemm in manifest.plan.gemms if gemm.name in modules)
    kernels: Counter[str] = Counter()
    for named in units_of(model):
        chosen = dict.fromkeys(named.unit.choose(rows) for rows in _ROWS)
        kernels[" or ".join(chosen)] += len(named.names)
    return {
        "asked": backend,
        "ran": resolve_backend(backend, device, manifest.plan, manifest.recipe.name),
        "gemms": dict(gemms),
        "kernels": dict(kernels),
    }
