"""Part ``loading`` of `squeezoo bench-engine`: a packed checkpoint against the dense folder it was made of.

Weights are random: what is read and prepared depends on shapes and formats alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .bench_engine import Say
from .bench_models import MODELS, samples_of
from .compress.engine import compress
from .compress.train_data import TrainData
from .eval.loading import DENSE_LOADER, measure_loading
from .models.dense import save_dense
from .timings import CHECKPOINT_LOADER

SIDES = ("dense float32", "packed 2:4 int8")


def loading_part(model: str, threads: int, say: Say = lambda _: None, repeats: int = 5) -> dict[str, Any]:
    """Seconds to load one of `MODELS` from both forms: with empty caches, and the median of ``repeats`` later loads.

    A load is a fresh process's call of the loader, with what that imports; its threads are ``threads``.
    """
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "dense", Path(folder) / "packed"
        dense = MODELS[model].dense()
        sample = samples_of(dense, MODELS[model].sizes[0], 1)[0]
        save_dense(dense, None, sources[0])
        compress(
            dense,
            MODELS[model].recipe,
            TrainData([sample], lambda features: dict(features[0])),
            sources[1],
        )
        del dense
        loaders: tuple[dict[str, Any], ...] = (
            {"loader": DENSE_LOADER, "options": {"kind": "auto"}},
            {"loader": CHECKPOINT_LOADER, "options": {"backend": "auto"}},
        )
        rows = {}
        for side, source, loader in zip(SIDES, sources, loaders, strict=True):
            found = measure_loading(source, threads=threads, repeats=repeats, **loader)
            size = sum(file.stat().st_size for file in source.iterdir())
            rows[side] = found.to_dict() | {"bytes": size}
            say(f"  {side}: {found.warm.median_ms / 1000:.2f} s, first ever {found.first_seconds:.2f} s")
    dense_ms, packed_ms = (rows[side]["warm"]["median_ms"] for side in SIDES)
    return {
        "model": model, "repeats": repeats, "rows": rows,
        "targets": {"a packed checkpoint loads no slower than the dense safetensors": packed_ms <= dense_ms},
    }  # fmt: skip


def loading_lines(part: Mapping[str, Any]) -> list[str]:
    """The part as Markdown."""
    lines = [f"| loading {part['model']} | MB | seconds | p10 to p90 | first, empty caches |", "|---|---|---|---|---|"]
    for side, row in part["rows"].items():
        median, low, high = (row["warm"][key] / 1000 for key in ("median_ms", "p10_ms", "p90_ms"))
        first = row["first_seconds"]
        lines.append(f"| {side} | {row['bytes'] / 1e6:.0f} | {median:.2f} | {low:.2f} to {high:.2f} | {first:.2f} |")
    return lines
