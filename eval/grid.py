"""A benchmark's cells (model, batch, size) in one file per environment: written after every cell, so that an
interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .fields import checked_fields, require_count, require_text
from .results import atomic_write_json
from .rounds import Measured

FORMAT = 1


@dataclass(frozen=True)
class Cell:
    """What was measured for one model, batch and size, all in one interleaved run.

    Args:
        stamp: of the code, libraries and settings that it was measured with; another one makes the cell stale.
        engines: by name. failed: engines that could not run it, and why.
        errors: largest difference of an engine's logits from the dense model's, relative to the largest of those.
        skipped: why nothing was measured, else None.
    """

    model: str
    batch: int
    size: str
    stamp: str
    engines: Mapping[str, Measured] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    skipped: str | None = None

    def __post_init__(self) -> None:
        require_text(self, "model", "size", "stamp")
        require_count(self, "batch")

    @property
    def key(self) -> str:
        return f"{self.model}/{self.batch}/{self.size}"

    def ratio(self, engine: str, other: str) -> float | None:
        """How many times faster ``engine`` is than ``other``; None where one of them was not measured."""
        if engine not in self.engines or other not in self.engines:
            return None
        return self.engines[other].timing.median_ms / self.engines[engine].timing.median_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {**vars(self), "engines": {name: one.to_dict() for name, one in self.engines.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cell:
        """Build from `to_dict`'s data. Raises ValueError naming unknown or missing keys."""
        values = checked_fields(cls, data)
        engines = {name: Measured.from_dict(one) for name, one in values.get("engines", {}).items()}
        return cls(**{**values, "engines": engines})


class Grid:
    """The cells of one environment and the file that they live in.

    Raises:
        ValueError: the file is not one of this format; move it away.
    """

    def __init__(self, path: Path, environment: Mapping[str, Any]) -> None:
        self.path, self.environment = path, dict(environment)
        self.cells: dict[str, Cell] = {}
        if path.is_file():
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
                if data["format"] != FORMAT:
                    raise ValueError(f"format {data['format']}, expected {FORMAT}")
                self.cells = {cell.key: cell for cell in map(Cell.from_dict, data["cells"])}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is no result file of this version ({error}): move it away") from error

    def has(self, key: str, stamp: str) -> bool:
        """Whether this cell was measured with this very stamp."""
        return key in self.cells and self.cells[key].stamp == stamp

    def add_(self, cell: Cell) -> None:
        """Take a cell, in the place of an older one, and write the file."""
        self.cells[cell.key] = cell
        cells = [self.cells[key].to_dict() for key in sorted(self.cells)]
        atomic_write_json(self.path, {"format": FORMAT, "environment": self.environment, "cells": cells})


def environment_slug(environment: Mapping[str, Any], device: str) -> str:
    """Name of a result file: kind of device, its name, threads, PyTorch; letters, digits, dots and dashes."""
    torch_version = environment["libraries"]["torch"].partition("+")[0]
    if device == "cuda":
        parts = ["gpu", environment["gpus"][0]["name"]]
    else:
        parts = ["cpu", environment["cpu"]["name"], f"{environment['cpu']['threads']}t"]
    return re.sub(r"[^a-z0-9.]+", "-", " ".join([*parts, f"torch{torch_version}"]).lower()).strip("-")


def cells_table(cells: list[Cell], baseline: str, ours: str, peers: tuple[str, ...]) -> Any:
    """A `rich` table: the baseline's milliseconds, every engine's speed-up over it, and ours over the best peer."""
    from rich.table import Table

    names = [name for name in dict.fromkeys(n for cell in cells for n in cell.engines) if name not in (baseline, ours)]
    table = Table("model", "batch", "size", f"{baseline} ms", *names, ours, "p10-p90", "ours / best peer")
    for column in table.columns[3:]:
        column.justify = "right"
    for cell in cells:
        if cell.skipped is not None:
            table.add_row(cell.model, str(cell.batch), cell.size, cell.skipped)
            continue
        own = cell.engines.get(ours)
        best = max((cell.engines[peer].speedup for peer in peers if peer in cell.engines), default=None)
        table.add_row(
            cell.model, str(cell.batch), cell.size, f"{cell.engines[baseline].timing.median_ms:.1f}",
            *(f"{cell.engines[name].speedup:.2f}x" if name in cell.engines else "failed" for name in names),
            "failed" if own is None else f"{own.speedup:.2f}x",
            "" if own is None else f"{own.spread[0]:.2f}-{own.spread[1]:.2f}",
            "" if best is None or own is None else f"{own.speedup / best:.2f}",
        )  # fmt: skip
    return table
