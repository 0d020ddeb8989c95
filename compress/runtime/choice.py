"""What the selection of kernels speaks about: units, workloads and choices. It knows no kernel.

A unit is whatever is chosen as one: a GEMM, an FFN's pair of GEMMs, a whole block. Legend: T rows (tokens of the whole
batch).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

EVER = sys.maxsize  # the last segment's rows
MARGIN = 0.03  # another kernel than the built-in rule's must be faster by this share: less is noise


@dataclass(frozen=True)
class Workload:
    """What decides how fast a unit's kernels are; equal workloads are measured once per device.

    Args:
        kind: ``linear``, ``ffn``, ``block``. sizes: of a linear (O, I); of an FFN (hidden, inner); of a block (width,
            inner, heads). flags: what else matters, such as the activation, ``dynamic``, ``bias``, ``bfloat16``.
    """

    kind: str
    sizes: tuple[int, ...]
    flags: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its name in the table: ``linear 768x3072 bias gelu``."""
        return " ".join((self.kind, "x".join(map(str, self.sizes)), *self.flags))


class Unit(Protocol):
    """See the module's text."""

    choose: Callable[[int], str]

    def kernels(self) -> tuple[str, ...]:
        """Names of those that can run it here, the preferred one first."""
        ...

    def workload(self) -> Workload: ...

    def example(self, rows: int) -> tuple[Tensor, ...]:
        """Random inputs of so many rows, as they come at run time."""
        ...

    def run(self, kernel: str, *inputs: Tensor) -> object:
        """One call by this kernel, with everything that a real call costs."""
        ...

    def prepare_(self, kernels: Collection[str]) -> None:
        """Keep what these kernels need, drop what others left."""
        ...


@dataclass(frozen=True)
class Choice:
    """The kernel for every number of rows: segments (last number of rows, kernel), ascending, the last up to `EVER`."""

    segments: tuple[tuple[int, str], ...]

    def __post_init__(self) -> None:
        bounds = [last for last, _ in self.segments]
        if not bounds or bounds[-1] != EVER or sorted(set(bounds)) != bounds:
            raise ValueError(f"expected ascending segments, the last up to {EVER}, found {self.segments}")

    def __call__(self, rows: int) -> str:
        for last, kernel in self.segments:  # one to four of them; a loop, because torch.compile can trace it
            if rows <= last:
                return kernel
        return self.segments[-1][1]

    @property
    def kernels(self) -> tuple[str, ...]:
        """Those in use, each once, in the order of the rows."""
        return tuple(dict.fromkeys(kernel for _, kernel in self.segments))

    @property
    def break_even(self) -> tuple[int, ...]:
        """The numbers of rows after which another kernel runs."""
        return tuple(last for last, _ in self.segments[:-1])

    @classmethod
    def of(cls, winners: Mapping[int, str]) -> Choice:
        """From the winner at each measured number of rows; between two of them the nearer one in proportion counts.

        Raises:
            ValueError: there are none.
        """
        if not winners:
            raise ValueError("expected the winner for at least one number of rows")
        measured = sorted(winners)
        segments: list[tuple[int, str]] = []
        for rows, after in zip(measured, [*measured[1:], None], strict=True):
            last = EVER if after is None else max(rows, math.isqrt(rows * after))
            if segments and segments[-1][1] == winners[rows]:
                segments.pop()
            segments.append((last, winners[rows]))
        return cls(tuple(segments))


def winner(seconds: Mapping[str, float], preferred: str | None) -> str:
    """The fastest kernel; the preferred one where it is slower by `MARGIN` at most; the first among equals.

    Args:
        seconds: of one call, by kernel. preferred: what the built-in rule says.
    """
    best = min(seconds, key=lambda kernel: seconds[kernel])
    if preferred is not None and preferred in seconds and seconds[preferred] <= seconds[best] * (1 + MARGIN):
        return preferred
    return best
