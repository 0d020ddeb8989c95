"""What a model's outputs over a data set depend on, as one short hash: stored outputs are never taken for others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.dense import describe


def fingerprint(
    model: nn.Module,
    features: Sequence[Mapping[str, Any]],
    collate: Callable[[list[Mapping[str, Any]]], Mapping[str, Tensor]],
    what: str = "",
) -> str:
    """24 hexadecimal digits that change with the model's configuration or weights, with any sample or their order, with
    how samples are made into batches (the first and the last are looked at), and with ``what``."""
    digest = hashlib.sha256(what.encode())
    digest.update(json.dumps(describe(model), sort_keys=True).encode())
    _update(digest, dict(sorted(model.state_dict().items())))
    for feature in features:
        _update(digest, feature)
    if len(features):
        _update(digest, collate([features[0]]))
        _update(digest, collate([features[len(features) - 1]]))
    return digest.hexdigest()[:24]


def _update(digest: Any, value: Any) -> None:
    """Feed a value into a digest by its content."""
    digest.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for name in value:
            digest.update(str(name).encode())
            _update(digest, value[name])
    elif hasattr(value, "tobytes"):  # numpy arrays, PIL images
        digest.update(repr(getattr(value, "shape", getattr(value, "size", None))).encode())
        digest.update(value.tobytes())
    else:
        digest.update(repr(value).encode())
