"""Rows of a batch that are written side by side in one block of memory, so that joining them takes no copy.

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

_PLACE = "place_in_block"


class Places:
    """Memory for rows to be, of which every row is handed out once.

    Args:
        shape: of a row, float32; None where it is not known: then there are no places.
    """

    def __init__(self, shape: Sequence[int] | None) -> None:
        self.shape = shape
        self._free: dict[int, torch.Tensor] = {}

    def reserve(self, indices: Sequence[int]) -> None:
        """A new block for these rows, in this order."""
        if self.shape is None:
            return
        # NumPy asks the system for large pages, which the first writing pays for far less often
        block = torch.from_numpy(np.empty((len(indices), *self.shape), dtype=np.float32))
        for number, index in enumerate(indices):
            row = block[number]
            setattr(row, _PLACE, (block, number))
            self._free[index] = row

    def take(self, index: int) -> torch.Tensor | None:
        """The place of this row, which is nobody else's; None where none is reserved or it is taken already."""
        return self._free.pop(index, None)


def stacked(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """``torch.stack(rows)`` [B, ...]; for rows that lie side by side in a block of `Places`, that part of the block."""
    block, first = _place(rows[0])
    places = [_place(row) for row in rows]
    if block is None or any(place[0] is not block for place in places):
        return torch.stack(list(rows))
    if [number for _, number in places] != list(range(first, first + len(rows))):
        return torch.stack(list(rows))
    return block[first : first + len(rows)]


def _place(row: torch.Tensor) -> tuple[torch.Tensor | None, int]:
    found: tuple[torch.Tensor | None, int] = getattr(row, _PLACE, (None, 0))
    return found
