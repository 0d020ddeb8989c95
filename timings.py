"""Time and memory of a checkpoint beside its dense self: which conditions, and each of them measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .eval.fit import reads
from .eval.loading import DENSE_LOADER, Loading, Memory, measure_loading, measure_memory
from .eval.speed import Speed, benchmark, make_batch

CHECKPOINT_LOADER = f"{DENSE_LOADER.partition('.')[0]}.compress.checkpoint:load"


@dataclass(frozen=True)
class Point:
    """What is timed: rows of a batch, and tokens of a text or seconds of sound; images have the size of the model."""

    batch: int
    sequence: int | None = None
    audio_seconds: float | None = None

    def __str__(self) -> str:
        length = f", {self.sequence} tokens" if self.sequence else ""
        return f"batch {self.batch}{length}" + (f", {self.audio_seconds:g} s of audio" if self.audio_seconds else "")


def points(
    model: nn.Module, batches: Sequence[int], lengths: Sequence[int], seconds: Sequence[float] = (10.0,)
) -> list[Point]:
    """Every batch with every length of what the model reads: tokens, seconds of sound, or the one size of images."""
    what = reads(model)
    if what == "images":
        return [Point(batch) for batch in batches]
    if what == "sound":
        return [Point(batch, audio_seconds=time) for batch in batches for time in seconds]
    return [Point(batch, length) for batch in batches for length in lengths]


def measure_speeds(
    dense: nn.Module,
    compressed: nn.Module,
    conditions: Sequence[Point],
    repeats: int,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
    device: str = "cpu",
) -> tuple[Speed, ...]:
    """Dense and compressed interleaved in one run at every point."""
    speeds = []
    for point in conditions:
        say(f"timing {point}")
        inputs = make_batch(dense, point.batch, point.sequence, audio_seconds=point.audio_seconds)
        speeds.append(benchmark(dense, compressed, inputs, repeats=repeats, progress=progress, device=device))
    return tuple(speeds)


def measure_loadings(
    folder: str | Path,
    dense_folder: str | Path | None,
    point: Point,
    backend: str,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> list[Loading | Memory]:
    """Loading time and memory of the checkpoint, and of its dense model's folder where there is one, in fresh
    processes."""
    found: list[Loading | Memory] = []
    sides: list[tuple[str | Path, dict[str, Any]]] = []
    if dense_folder is not None:
        sides.append((dense_folder, {"loader": DENSE_LOADER, "options": {"kind": "auto"}}))
    options = {"backend": backend} | ({} if device == "cpu" else {"device": device})
    sides.append((folder, {"loader": CHECKPOINT_LOADER, "options": options}))
    for source, loader in sides:
        say(f"loading {Path(source).name} in fresh processes")
        found.append(measure_loading(source, device=device, **loader))
        found.append(
            measure_memory(
                source, batch=point.batch, sequence=point.sequence, audio_seconds=point.audio_seconds, device=device,
                **loader,
            )
        )  # fmt: skip
    return found
