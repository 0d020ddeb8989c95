"""How calls are timed: medians with spread, two sides in turn, CUDA events on GPUs; the size that a record names."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .fields import require_count

MIN_REPEATS = 20
Clock = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per batch over the repeats: median, 10th and 90th percentile, fastest."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float

    def __post_init__(self) -> None:
        ordered = (self.min_ms, self.p10_ms, self.median_ms, self.p90_ms)
        if not all(is_positive(value) for value in ordered) or list(ordered) != sorted(ordered):
            raise ValueError(f"Timing needs 0 < min <= p10 <= median <= p90 in milliseconds, got {ordered}")

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Timing:
        """Summary of single measurements (percentiles by linear interpolation)."""
        p10, median, p90 = (float(value) for value in np.percentile(np.asarray(samples_ms, dtype=float), (10, 50, 90)))
        return cls(median_ms=median, p10_ms=p10, p90_ms=p90, min_ms=float(min(samples_ms)))


def is_positive(value: Any) -> bool:
    """A finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def require_repeats(record: Any) -> None:
    """``repeats`` of a record is enough for a median, or ValueError says so."""
    if record.repeats < MIN_REPEATS:
        name = type(record).__name__
        raise ValueError(f"{name} needs a median of at least {MIN_REPEATS} repeats, got {record.repeats}")


def require_spread(record: Any, *names: str) -> None:
    """The fields ``names`` are (p10, p90) of positive ratios; they become tuples."""
    for name in names:
        spread = tuple(getattr(record, name))
        if len(spread) != 2 or not all(is_positive(value) for value in spread) or spread[0] > spread[1]:
            raise ValueError(
                f"{type(record).__name__}: {name} must be (p10, p90) of positive ratios, got {getattr(record, name)!r}"
            )
        object.__setattr__(record, name, spread)


def require_size(record: Any) -> None:
    """A record names exactly one of ``sequence`` (tokens), ``image_size`` (height, width) and ``audio_seconds``."""
    name = type(record).__name__
    given = (record.sequence, record.image_size, record.audio_seconds)
    if sum(value is not None for value in given) != 1:
        raise ValueError(
            f"{name} needs either sequence or image_size or audio_seconds, got {given[0]!r}, {given[1]!r}, {given[2]!r}"
        )
    if record.sequence is not None:
        require_count(record, "sequence")
    elif record.image_size is not None:
        size = tuple(record.image_size)
        if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
            raise ValueError(f"{name}: image_size must be (height, width), got {record.image_size!r}")
        object.__setattr__(record, "image_size", size)
    elif not is_positive(record.audio_seconds):
        raise ValueError(f"{name}: audio_seconds must be positive, got {record.audio_seconds!r}")


def spread_of(dense_ms: Sequence[float], compressed_ms: Sequence[float]) -> tuple[float, float]:
    """10th and 90th percentile of dense / compressed over the pairs measured next to each other."""
    p10, p90 = np.percentile(np.asarray(dense_ms) / np.asarray(compressed_ms), (10, 90))
    return float(p10), float(p90)


def turns(repeats: int) -> Iterator[tuple[int, int]]:
    """The order of the two sides in each repeat: it changes, so that neither is always the second."""
    for repeat in range(repeats):
        yield (0, 1) if repeat % 2 == 0 else (1, 0)


def clock_for(device: torch.device) -> Clock:
    """What times one call in milliseconds: CUDA events after synchronising on GPUs, the wall clock elsewhere."""
    return _cuda_ms if device.type == "cuda" else _wall_ms


def _wall_ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def _cuda_ms(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collected before, left alone inside."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
