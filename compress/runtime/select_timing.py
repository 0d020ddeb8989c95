"""How the selection measures: all kernels of a unit by rounds in turn, medians, slow ones dropped early.

A model's weights are larger than a CPU's cache, so between two calls of one layer the others push its weights out.
Measuring in a tight loop would hide that, and flatter kernels that read more bytes; so on such models the cache is
swept before every timed call.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 15
DROP_AFTER, DROP_FACTOR = 2, 1.6  # rounds after which a kernel slower than the best by this factor is not timed again
_SAMPLE_S = 100e-6  # shorter calls are repeated within one sample
_ENOUGH_S = 0.15  # for one kernel at one number of rows; `MIN_ROUNDS` come first
_SWEEP_BYTES, _SWEEP_S = 64 << 20, 0.006  # how much is read, and about how long that takes
_BUSY_CALL, _BUSY_RESULT = 3.0, 1.5  # how far above the fastest call others are on a machine that does other things

Clock = Callable[[Callable[[], object], int], float]  # a call, how often -> seconds of one


@dataclass(frozen=True)
class Sample:
    """Seconds of one call: median, fastest, 10th and 90th percentile of ``rounds``."""

    median: float
    fastest: float
    p10: float
    p90: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Sample:
        ordered = sorted(seconds)
        at = [ordered[round(share * (len(ordered) - 1))] for share in (0.5, 0.1, 0.9)]
        return cls(at[0], ordered[0], at[1], at[2], len(ordered))

    def to_list(self) -> list[float]:
        """For JSON; `from_list` reads it back."""
        return [self.median, self.fastest, self.p10, self.p90, self.rounds]

    @classmethod
    def from_list(cls, values: Sequence[float]) -> Sample:
        """Raises ValueError: not five numbers, or not in order."""
        median, fastest, p10, p90, rounds = values
        if not 0 < fastest <= p10 <= median <= p90 or rounds < 1:
            raise ValueError(f"expected 0 < fastest <= p10 <= median <= p90, found {list(values)}")
        return cls(float(median), float(fastest), float(p10), float(p90), int(rounds))


def compare(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    cold: bool = False,
) -> dict[str, Sample]:
    """Time all calls by rounds.

    Args:
        calls: by kernel. cold: sweep the CPU's cache before each.

    Returns:
        Samples by kernel; those that fail are left out.
    """
    clock = _cuda_seconds if device.type == "cuda" else _swept_seconds() if cold else _wall_seconds
    swept = _SWEEP_S if cold else 0.0
    estimates: dict[str, float] = {}
    with torch.inference_mode(), _no_garbage_collection():
        for kernel, call in calls.items():
            try:
                call()
                estimates[kernel] = clock(call, 1)
            except (RuntimeError, TypeError, ValueError):
                continue  # it cannot run this one after all
        times = {kernel: max(1, min(50, int(_SAMPLE_S / max(t, 1e-7)))) for kernel, t in estimates.items()}
        samples: dict[str, list[float]] = {kernel: [] for kernel in estimates}
        for number in range(MAX_ROUNDS):
            left = _still_timed(samples, number)
            order = left if number % 2 == 0 else left[::-1]
            for kernel in order:
                samples[kernel].append(clock(calls[kernel], 1 if cold else times[kernel]))
            spent = max((sum(samples[kernel]) for kernel in left), default=0.0)
            if number + 1 >= MIN_ROUNDS and spent + swept * (number + 1) * len(left) > _ENOUGH_S:
                break
    return {kernel: Sample.of(found) for kernel, found in samples.items() if found}


def steady(samples: Mapping[str, Sample]) -> bool:
    """Whether the fastest kernel's calls agree, so that nothing else disturbed them."""
    best = min(samples.values(), key=lambda sample: sample.fastest)
    return best.median <= _BUSY_RESULT * best.fastest


def is_busy(device: torch.device) -> bool:
    """Whether other processes take the CPU now, so that measuring would be in vain: by some 10 ms of small GEMMs, of
    which on an idle machine all take about as long. A GPU is not asked."""
    if device.type != "cpu":
        return False
    a, b = torch.ones(256, 256), torch.ones(256, 256)
    with torch.inference_mode():
        found = sorted(_wall_seconds(lambda: a @ b, 1) for _ in range(40))
    return found[-4] > _BUSY_CALL * found[2]


def _still_timed(samples: Mapping[str, list[float]], number: int) -> list[str]:
    if number < DROP_AFTER:
        return [*samples]
    best = min(min(found) for found in samples.values()) if samples else 0.0
    return [kernel for kernel, found in samples.items() if min(found) <= DROP_FACTOR * best]


def _wall_seconds(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def _swept_seconds() -> Clock:
    waste = torch.ones(_SWEEP_BYTES // 4)

    def seconds(call: Callable[[], object], times: int) -> float:
        waste.sum()
        return _wall_seconds(call, times)

    return seconds


def _cuda_seconds(call: Callable[[], object], times: int) -> float:
    """Many calls in a row between two events: as in a model, where the next kernel is launched while one runs."""
    times = max(times, 20)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / times


class _no_garbage_collection:  # noqa: N801
    def __enter__(self) -> None:
        self.enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: Any) -> None:
        if self.enabled:
            gc.enable()
