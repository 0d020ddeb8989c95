"""The bitmap form of an unstructured sparse matrix: one bit per weight says which are kept, the kept ones follow.

Legend: O out_features, I in_features, B bytes of one row of bits, K kept values of the whole matrix, row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import pack_bits, packed_bytes, unpack_bits


@torch.no_grad()
def compress_bitmap(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Non-zero values and where they stood: [O, I] -> values [K] in row order, bitmap uint8 [O, ceil(I / 8)].

    Raises:
        ValueError: ``w_OI`` is not a matrix.
    """
    if w_OI.ndim != 2:
        raise ValueError(f"expected a matrix [out_features, in_features], found shape {tuple(w_OI.shape)}")
    kept_OI = w_OI != 0
    return w_OI[kept_OI], pack_bits(kept_OI.to(torch.uint8), 1)


@torch.no_grad()
def expand_bitmap(values_K: Tensor, bitmap_OB: Tensor, in_features: int) -> Tensor:
    """Exact inverse of :func:`compress_bitmap`.

    Raises:
        ValueError: rows of another length than ``in_features`` bits need, or another number of values than of set bits.
    """
    kept_OI = unpack_bits(bitmap_OB, 1, in_features).bool()
    kept = int(kept_OI.sum())
    if values_K.shape != (kept,):
        raise ValueError(f"expected the {kept} values that the bitmap marks, found {tuple(values_K.shape)}")
    w_OI = values_K.new_zeros(kept_OI.shape)
    w_OI[kept_OI] = values_K
    return w_OI


def bitmap_bytes(w_OI: Tensor, value_bits: int) -> int:
    """Bytes of the bitmap form of ``w_OI``: bits and kept values."""
    out_features, in_features = w_OI.shape
    return out_features * packed_bytes(in_features, 1) + packed_bytes(int(w_OI.count_nonzero()), value_bits)


def dense_bytes(w_OI: Tensor, value_bits: int) -> int:
    """Bytes of the same matrix with its zeros stored, each row on whole bytes."""
    out_features, in_features = w_OI.shape
    return out_features * packed_bytes(in_features, value_bits)
