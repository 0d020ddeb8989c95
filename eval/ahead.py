"""Features decoded by a few threads before the model asks for them, never more than a few batches of them in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, overload

from .task import Feature

MAX_WORKERS = 8


class Ahead(Sequence[Feature]):
    """``features`` with the next ones of ``order`` under way; a context manager that stops the threads.

    Items are the same whoever computes them, so only the speed depends on the order in which they are asked for. What
    an item raises is raised where it is asked for. Image and sound libraries decode outside Python's lock.

    Args:
        features: computes its items on access.
        window: most items that are decoded and not yet taken.
        order: in which they will be asked for; None is their own.
        workers: threads; None is one per processor core, at most 8.
    """

    def __init__(
        self, features: Sequence[Feature], window: int, order: Sequence[int] | None = None, workers: int | None = None
    ) -> None:
        self.features, self.window = features, max(1, window)
        self._order = range(len(features)) if order is None else order
        self._next = 0
        self._waiting: dict[int, Future[Feature]] = {}
        self._pool = ThreadPoolExecutor(workers or min(MAX_WORKERS, os.cpu_count() or 1))

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __len__(self) -> int:
        return len(self.features)

    def lengths(self) -> list[int]:
        """Those that the features tell themselves."""
        found: list[int] = self.features.lengths()  # type: ignore[attr-defined]
        return found

    @overload
    def __getitem__(self, index: int) -> Feature: ...
    @overload
    def __getitem__(self, index: slice) -> list[Feature]: ...
    def __getitem__(self, index: int | slice) -> Feature | list[Feature]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        taken = self._waiting.pop(index, None)
        while len(self._waiting) < self.window and self._next < len(self._order):
            following = self._order[self._next]
            self._next += 1
            if following != index:
                self._waiting[following] = self._pool.submit(self.features.__getitem__, following)
        return self.features[index] if taken is None else taken.result()
