"""Many engines timed in one run: by rounds, each engine once a round in a changing order, so that a slow moment of the
machine hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .fields import checked_fields, require_count, require_text
from .timing import Timing, no_garbage_collection, require_spread, spread_of

PAUSE_S = 0.03  # worker threads of OpenMP and TBB spin for the next call, and would disturb another engine's
MIN_ROUNDS, MAX_ROUNDS = 5, 30
Call = Callable[[], float]  # runs once, returns milliseconds


@dataclass(frozen=True)
class Measured:
    """One engine in one cell.

    Args:
        timing: milliseconds per batch over ``repeats`` rounds.
        speedup: median of the baseline over median of this engine. spread: 10th and 90th percentile over the rounds.
    """

    engine: str
    timing: Timing
    repeats: int
    speedup: float
    spread: tuple[float, float]

    def __post_init__(self) -> None:
        require_text(self, "engine")
        require_count(self, "repeats")
        require_spread(self, "spread")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measured:
        """Build from `to_dict`'s data. Raises ValueError naming unknown or missing keys."""
        values = checked_fields(cls, data)
        return cls(**{**values, "timing": Timing(**checked_fields(Timing, values["timing"]))})


def rounds_within(seconds: float, round_seconds: float) -> int:
    """How many rounds fit: between `MIN_ROUNDS`, which a median with a spread needs, and `MAX_ROUNDS`."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(round_seconds, 1e-9))))


def order_of(names: Sequence[str], number: int) -> list[str]:
    """Each engine comes at each place, and after each other one: rotated, and backwards every other round."""
    start = (number // 2) % len(names)
    order = [*names[start:], *names[:start]]
    return order if number % 2 == 0 else order[::-1]


def measure(
    calls: Mapping[str, Call],
    baseline: str,
    *,
    seconds: float = 20.0,
    warmup: int = 2,
    pause_s: float = PAUSE_S,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Measured]:
    """Time all engines by rounds.

    Args:
        calls: engine to what runs it once. baseline: the one that speed-ups refer to.
        seconds: the time for the timed rounds; the number of rounds follows from the warm-up.
        warmup: untimed calls of each engine before, at least one.
        tick: called after every round.

    Raises:
        KeyError: no such baseline.
    """
    names = [*calls]
    samples: dict[str, list[float]] = {name: [] for name in names}
    samples[baseline].clear()
    with no_garbage_collection():
        first = {name: min(calls[name]() for _ in range(max(1, warmup))) for name in names}
        total = rounds_within(seconds, sum(first.values()) / 1000 + pause_s * len(names))
        for number in range(total):
            for name in order_of(names, number):
                time.sleep(pause_s)
                samples[name].append(calls[name]())
            tick(number + 1, total)
    base = Timing.of(samples[baseline])
    found = {}
    for name in names:
        timing = Timing.of(samples[name])
        spread = spread_of(samples[baseline], samples[name])
        found[name] = Measured(name, timing, total, base.median_ms / timing.median_ms, spread)
    return found
