"""What a dense folder was trained from and how: a file beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..models.dense import Dense
from .fingerprint import run_fingerprint
from .recipe import Recipe
from .train_data import TrainData
from .work import Work

PROVENANCE = "squeezoo_training.json"


def write_provenance(dense: Dense, recipe: Recipe, work: Work, folder: Path) -> None:
    """``dense``: what the training began with. ``work``: its finished stages."""
    provenance = {
        "base": {"name": dense.name, "revision": dense.revision},
        "recipe": recipe.model_dump(mode="json"),
        "training": work.records,
        "run": work.fingerprint,
    }
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


def read_provenance(folder: str | Path) -> dict[str, Any] | None:
    """What ``train_dense`` says about its folder: ``base``, ``recipe``, ``training``, ``run`` (a hash of all that went
    in); None for other folders."""
    path = Path(folder) / PROVENANCE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def is_trained(dense: Dense, recipe: Recipe, data: TrainData, folder: str | Path) -> bool:
    """Whether ``folder`` holds what ``train_dense`` makes of exactly this model, recipe and data."""
    provenance = read_provenance(folder)
    return provenance is not None and provenance.get("run") == run_fingerprint((dense.model, dense.model), recipe, data)
