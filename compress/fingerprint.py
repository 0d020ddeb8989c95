"""Short hashes of what a run or a model's outputs depend on, by content: nothing stored is ever taken for another's."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.dense import describe
from .recipe import Recipe
from .train_data import TrainData


def fingerprint(
    model: nn.Module,
    features: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Mapping[str, Any]]], Mapping[str, Tensor]],
    what: str = "",
) -> str:
    """24 hexadecimal digits that change with the model's configuration or weights, with any sample or their order, with
    how samples are made into batches (the first and the last are looked at), and with ``what``."""
    digest = hashlib.sha256(what.encode())
    _update_model(digest, model)
    for feature in features:
        _update(digest, feature)
    if len(features):
        _update(digest, collate([features[0]]))
        _update(digest, collate([features[len(features) - 1]]))
    return digest.hexdigest()[:24]


def run_fingerprint(models: Sequence[nn.Module], recipe: Recipe, data: TrainData | None) -> str:
    """64 hexadecimal digits that change with the recipe, the models (which one has which part in the run follows from
    their order; one that stands twice is read once) or the data; a run resumes only what it began."""
    digest = hashlib.sha256(recipe.model_dump_json().encode())
    places: dict[int, int] = {}
    for model in models:
        seen = id(model) in places
        digest.update(f"model {places.setdefault(id(model), len(places))}".encode())
        if not seen:
            _update_model(digest, model)
    if data is not None:
        update_data(digest, data)
    return digest.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """sha256 of the names and values of a model's tensors."""
    digest = hashlib.sha256()
    _update(digest, dict(sorted(model.state_dict().items())))
    return digest.hexdigest()


def update_data(digest: Any, data: TrainData) -> None:
    """Feed all rows of a training set into a digest.

    Samples that are decoded on access are known by ``data.source``: stored bytes by their content, files by name, size
    and time of change, tables of ``datasets`` by the fingerprint that it keeps. Of the samples themselves the first and
    the last are looked at then, for how they are decoded.
    """
    features = data.features
    digest.update(str(len(features)).encode())
    if data.source is None:
        for feature in features:
            _update(digest, feature)
        return
    kept = getattr(getattr(data.source, "table", None), "_fingerprint", None)
    if isinstance(kept, str):
        digest.update(kept.encode())
    else:
        for row in data.source:
            _update(digest, row)
    _update(digest, features[0])
    _update(digest, features[len(features) - 1])


def _update_model(digest: Any, model: nn.Module) -> None:
    digest.update(json.dumps(describe(model), sort_keys=True).encode())
    _update(digest, dict(sorted(model.state_dict().items())))


def _update(digest: Any, value: Any) -> None:
    """Feed a value into a digest by its content."""
    if isinstance(value, Tensor):
        digest.update(f"Tensor{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        digest.update(f"Mapping{len(value)}".encode())
        for name in value:
            digest.update(f"{name}:".encode())
            _update(digest, value[name])
    elif isinstance(value, list | tuple):
        digest.update(f"list{len(value)}".encode())
        try:
            digest.update(array("q", value).tobytes())  # token ids, nearly always
        except (TypeError, OverflowError):
            for item in value:
                _update(digest, item)
    elif isinstance(value, Path):
        told = value.stat()
        digest.update(f"Path{value.name} {told.st_size} {told.st_mtime_ns}".encode())
    elif isinstance(value, bytes):
        digest.update(f"bytes{len(value)}".encode())
        digest.update(value)
    elif hasattr(value, "tobytes"):  # numpy arrays, PIL images
        shape = getattr(value, "shape", getattr(value, "size", None))
        digest.update(f"{type(value).__name__}{shape}{getattr(value, 'dtype', '')}".encode())
        digest.update(value.tobytes())
    else:
        digest.update(f"{type(value).__name__}{value!r};".encode())
