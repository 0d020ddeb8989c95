"""One int8 weight matrix for the native kernels, in the layouts that its calls need.

Legend: T rows (tokens of the whole batch), I in_features, O out_features.
"""

from __future__ import annotations

import time
from ctypes import addressof
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..levels import Levels
from .library import CGemm, c_levels, load

_ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
MAX_INPUTS = 65_536  # 255 * 127 * 65,536 is the largest sum that an int32 holds
DENSE_SPAN, COMPACT_SPAN = 4, 2
COMPACT_ROWS = 4  # with more, spreading the indices costs more than reading less saves


def supported(out_features: int, in_features: int) -> bool:
    """Whether there is a native kernel for a matrix of this shape."""
    return 0 < in_features <= MAX_INPUTS and out_features > 0


class NativeGemm:
    """One weight matrix, laid out when a call first needs it: at most 1 byte per weight, and once more for few rows.

    Args:
        weight_q_OI: int8 [O, I]. scale_O: float32 [O], dense. bias_O: float32 [O], dense, or None.
        activation: applied to the result.
        sparse: leave out zeros where the weights allow it (2:4, 4:8, 1:4, 2:8, 4:16 along I, and I a multiple of 16);
            None: where this is faster on this CPU. The result is the same to the bit.

    ``span``: how many inputs share one multiplication of 4 weights; 4 is dense. ``compact``: inputs of up to
    `COMPACT_ROWS` rows read 2:4 weights with indices of 2 bits, 5/8 of the dense bytes.
    """

    def __init__(
        self,
        weight_q_OI: Tensor,
        scale_O: Tensor,
        bias_O: Tensor | None,
        activation: Literal["gelu", "gelu_tanh", "relu"] | None = None,
        sparse: bool | None = None,
    ) -> None:
        self._library = load()
        self.out_features, self.in_features = weight_q_OI.shape
        self._weight_q_OI = weight_q_OI.contiguous()
        self._sum_O = weight_q_OI.sum(1, dtype=torch.int32)
        self._vectors = (scale_O, bias_O, _ACTIVATIONS[activation])
        where = (self._weight_q_OI.data_ptr(), self.out_features, self.in_features)
        self.compact = sparse is not False and bool(self._library.sq_two_of_four(*where))
        self.span = DENSE_SPAN if sparse is False else self._library.sq_span(*where)
        if sparse is None and self.span != DENSE_SPAN and not sparse_is_faster():
            self.span = DENSE_SPAN
        self._layouts: dict[int, tuple[Tensor, CGemm, int]] = {}

    @property
    def record(self) -> CGemm:
        """The matrix as C sees it, for many rows. It points into this object."""
        return self._layout(self.span)[1]

    def __call__(
        self,
        level_TI: Tensor,
        levels: Levels,
        emitted: Levels | None = None,
        residual_TO: Tensor | None = None,
    ) -> Tensor:
        """uint8 [T, I], dense → float32 [T, O], or uint8 [T, O] as the levels ``emitted``. ``residual_TO`` is added
        before the activation."""
        rows = level_TI.shape[0]
        _, _, at = self._layout(COMPACT_SPAN if self.compact and rows <= COMPACT_ROWS else self.span)
        if self.in_features % 4:  # the kernel reads four at a time
            level_TI = F.pad(level_TI, (0, -self.in_features % 4))
        kind = torch.float32 if emitted is None else torch.uint8
        record = None if emitted is None else c_levels(emitted)
        out_TO = torch.empty((rows, self.out_features), dtype=kind)
        self._library.sq_gemm(
            at, level_TI.data_ptr(), rows, level_TI.shape[1], levels.scale, levels.zero_point,
            None if residual_TO is None else residual_TO.data_ptr(),
            None if record is None else addressof(record), out_TO.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out_TO

    def _layout(self, span: int) -> tuple[Tensor, CGemm, int]:
        """Packed weights, the record that points to them, and its address."""
        found = self._layouts.get(span)
        if found is None:
            shape = (self.out_features, self.in_features)
            panels = _aligned_bytes(self._library.sq_packed_size(*shape, span))
            self._library.sq_pack(
                self._weight_q_OI.data_ptr(), *shape, span, panels.data_ptr(), torch.get_num_threads()
            )
            scale_O, bias_O, activation = self._vectors
            record = CGemm(
                panels.data_ptr(), self._sum_O.data_ptr(), scale_O.data_ptr(),
                None if bias_O is None else bias_O.data_ptr(), *shape, activation, span,
            )  # fmt: skip
            found = self._layouts[span] = (panels, record, addressof(record))
        return found


@cache
def sparse_is_faster() -> bool:
    """Whether 2:4 weights multiply faster without their zeros on this CPU: they do if it shuffles beside multiplying.
    Measured once per process in some milliseconds, on one thread and in short calls, so that other processes matter
    little."""
    weight_OI = torch.tensor([[1, 0, 0, 1]], dtype=torch.int8).repeat(256, 64)
    level_TI = torch.ones(30, weight_OI.shape[1], dtype=torch.uint8)
    gemms = [NativeGemm(weight_OI, torch.ones(weight_OI.shape[0]), None, sparse=sparse) for sparse in (True, False)]
    seconds = [[_seconds(gemm, level_TI) for gemm in gemms] for _ in range(40)]
    sparse, dense = (min(column) for column in zip(*seconds, strict=True))
    return sparse < dense


def _seconds(gemm: NativeGemm, level_TI: Tensor) -> float:
    _, _, at = gemm._layout(gemm.span)
    out_TO = torch.empty(level_TI.shape[0], gemm.out_features)
    start = time.perf_counter()
    gemm._library.sq_gemm(at, level_TI.data_ptr(), *level_TI.shape, 1.0, 0, None, None, out_TO.data_ptr(), 1)
    return time.perf_counter() - start


def _aligned_bytes(size: int) -> Any:
    """``size`` bytes that begin at a multiple of 64."""
    memory = torch.empty(size + 63, dtype=torch.int8)
    start = -memory.data_ptr() % 64
    return memory[start : start + size]
