"""Features decoded by a few threads before the model asks for them, never more than a few batches of them in memory.

A model on the CPU computes with a team of threads that wait for each other many times in every layer: what decodes
beside it holds one of them up, and with it all. So where the model has all processor cores, decoding has them between
its batches; where it leaves some free, as on a GPU, it goes on beside the model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from .lazy_rows import LazyRows
from .task import Feature

if TYPE_CHECKING:
    import torch

    from .joined import Places

MAX_WORKERS = 8


class Ahead(LazyRows[Feature]):
    """``features`` with the next ones of ``order`` under way; a context manager that stops the threads.

    Items are the same whoever computes them, so only the speed depends on the order in which they are asked for. What
    an item raises is raised where it is asked for. Image and sound libraries decode outside Python's lock.

    Args:
        features: computes its items on access; reserves ``places`` (`joined.Places`) for a batch where it has them.
        batch_size: items that are asked for together.
        order: in which they will be asked for; None is their own.
        workers: threads; None is one per processor core, at most 8.
        beside: decode while the caller does other things, two batches at most; else a whole batch when its first item
            is asked for, and nothing in the meantime.
    """

    def __init__(
        self,
        features: Sequence[Feature],
        batch_size: int,
        order: Sequence[int] | None = None,
        workers: int | None = None,
        beside: bool = True,
    ) -> None:
        self.features, self.batch_size, self.beside = features, max(1, batch_size), beside
        self._order = range(len(features)) if order is None else order
        self._next = 0
        self._waiting: dict[int, Future[Feature]] = {}
        self._pool = ThreadPoolExecutor(workers or min(MAX_WORKERS, cores()))

    @classmethod
    def of(
        cls,
        features: Sequence[Feature],
        batch_size: int,
        device: str | torch.device,
        order: Sequence[int] | None = None,
    ) -> Ahead:
        """With the cores that a model on ``device`` leaves free, or between its batches where it leaves none."""
        import torch

        free = cores() - (torch.get_num_threads() if torch.device(device).type == "cpu" else 0)
        return cls(features, batch_size, order, min(MAX_WORKERS, free) if free > 0 else None, beside=free > 0)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return len(self.features)

    def lengths(self) -> list[int]:
        """Those that the features tell themselves; 1 for images, so that nothing is decoded for it."""
        told = getattr(self.features, "lengths", None)
        return [1] * len(self) if told is None else told()

    def make(self, index: int) -> Feature:
        """The item, when it is there."""
        taken = self._waiting.pop(index, None)
        if self.beside:
            self._start(2 * self.batch_size, but=index)
        elif taken is None and not self._waiting:
            self._start(self.batch_size)
            wait(self._waiting.values())
            taken = self._waiting.pop(index, None)
        return self.features[index] if taken is None else taken.result()

    def _start(self, most: int, but: int = -1) -> None:
        """Hand items to the threads until ``most`` are there or under way; ``but`` is the caller's own."""
        places: Places | None = getattr(self.features, "places", None)
        while len(self._waiting) < most and self._next < len(self._order):
            if places is not None and self._next % self.batch_size == 0:
                places.reserve(self._order[self._next : self._next + self.batch_size])
            following = self._order[self._next]
            self._next += 1
            if following != but:
                self._waiting[following] = self._pool.submit(self.features.__getitem__, following)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
