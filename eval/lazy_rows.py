"""Sequences whose items are made when they are asked for, so that a data set takes the memory of its files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

Item = TypeVar("Item", covariant=True)


class LazyRows(Sequence[Item]):
    """A sequence that says how long it is and how one item is made; a slice of it is the list of those items."""

    @abstractmethod
    def make(self, index: int) -> Item:
        """The item at ``index``, which is 0 to the length less 1."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self.make(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.make(index % len(self))
