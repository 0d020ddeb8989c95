"""Weights in the layouts that CUDA kernels read, built at load from the neutral form and never stored.

neutral (values and indices on disk) -> dense [O, I] -> padded -> cuSPARSELt's compressed form, or column-major for
``_int_mm``. Padding is zeros; results of padded rows are cut off. Legend: T rows, I in_features, O out_features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cuda_support import CudaBackend

# Multiples of (out_features, in_features, rows), and the fewest rows: torch.sparse's table for cuSPARSELt, Blas.cpp's
# checks of _int_mm (more than 16 rows).
_MULTIPLES: dict[CudaBackend, tuple[int, int, int, int]] = {
    "sparse_int8": (32, 32, 16, 16),
    "sparse_fp8": (32, 32, 16, 16),
    "sparse_half": (16, 16, 8, 8),
    "dense_int8": (8, 8, 1, 32),
    "dense_half": (1, 1, 1, 1),
}


@dataclass(frozen=True, eq=False)
class Layout:
    """One weight on its device. ``weight``: compressed for sparse backends (opaque; on a CPU, where the operators are
    only defined for tests, the padded dense matrix), else padded dense [O, I]. Sizes without padding."""

    backend: CudaBackend
    weight: Tensor
    out_features: int
    in_features: int

    @property
    def padded_out(self) -> int:
        return _up(self.out_features, _MULTIPLES[self.backend][0])

    @property
    def padded_in(self) -> int:
        return _up(self.in_features, _MULTIPLES[self.backend][1])


def built(backend: CudaBackend, weight_OI: Tensor, device: torch.device | str) -> Layout:
    """The layout of ``weight_OI`` (int8, float8 or 16 bit, as the backend wants it) on ``device``."""
    out_features, in_features = weight_OI.shape
    padded_OI = padded(weight_OI, *_MULTIPLES[backend][:2]).to(device).contiguous()
    if backend.startswith("sparse") and padded_OI.is_cuda:
        return Layout(backend, torch._cslt_compress(padded_OI), out_features, in_features)
    return Layout(backend, padded_OI, out_features, in_features)


def padded(w_OI: Tensor, rows: int, columns: int) -> Tensor:
    """``w_OI`` with zeros below and to the right, up to multiples of ``rows`` and ``columns``; itself if it fits."""
    below, right = -w_OI.shape[0] % rows, -w_OI.shape[1] % columns
    if not below and not right:
        return w_OI
    if w_OI.dtype.itemsize == 1:  # float8 has no kernel for constant_pad
        return F.pad(w_OI.view(torch.int8), (0, right, 0, below)).view(w_OI.dtype)
    return F.pad(w_OI, (0, right, 0, below))


def padded_input(x_TI: Tensor, backend: CudaBackend) -> Tensor:
    """``x_TI`` as the kernel takes it: contiguous, zeros in padded columns and rows."""
    _, columns, _, _ = _MULTIPLES[backend]
    rows = padded_rows(x_TI.shape[0], backend)
    if rows == x_TI.shape[0]:
        return padded(x_TI, 1, columns).contiguous()
    return padded(x_TI, rows if x_TI.shape[0] else 1, columns).contiguous()


def padded_rows(rows: int, backend: CudaBackend) -> int:
    """How many rows the kernel runs for ``rows``."""
    _, _, multiple, least = _MULTIPLES[backend]
    return max(least, _up(rows, multiple))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
