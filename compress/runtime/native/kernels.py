"""Single native operations on tensors. Legend: T rows (tokens of the whole batch), I in_features, O out_features;
B batch, H heads, Q queries, K keys, D head dimension.

All tensors are on the CPU and float32 unless said otherwise; the caller sees to it that shapes fit.
"""

from __future__ import annotations

import ctypes
import time
from ctypes import addressof
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..levels import Levels
from .build import BuildError
from .library import CAttention, CGemm, CMask, CNorm, c_levels, load

_ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
DENSE_SPAN = 4
MAX_INPUTS = 65_536  # 255 * 127 * 65,536 is the largest sum that an int32 holds


def supported(out_features: int, in_features: int) -> bool:
    """Whether there is a native kernel for a matrix of this shape."""
    return 0 < in_features <= MAX_INPUTS and out_features > 0


class NativeGemm:
    """One weight matrix laid out for the kernel, at most 1 byte per weight.

    Args:
        weight_q_OI: int8 [O, I]. scale_O: float32 [O], dense. bias_O: float32 [O], dense, or None.
        activation: applied to the result.
        sparse: leave out zeros where the weights allow it (2:4, 4:8, 1:4, 2:8, 4:16 along I, and I a multiple of 16);
            None: where this is faster on this CPU. The result is the same to the bit.

    ``span``: how many inputs share one multiplication of 4; 4 is dense.
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
        weight_q_OI = weight_q_OI.contiguous()
        self.span = DENSE_SPAN
        if sparse is not False:
            self.span = self._library.sq_span(weight_q_OI.data_ptr(), self.out_features, self.in_features)
            if sparse is None and self.span != DENSE_SPAN and not sparse_is_faster():
                self.span = DENSE_SPAN
        size = self._library.sq_packed_size(self.out_features, self.in_features, self.span)
        self._panels = aligned_bytes(size)
        sum_O = torch.empty(self.out_features, dtype=torch.int32)
        self._library.sq_pack(
            weight_q_OI.data_ptr(), self.out_features, self.in_features, self.span,
            self._panels.data_ptr(), sum_O.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        self._kept = (sum_O, scale_O, bias_O)
        bias = None if bias_O is None else bias_O.data_ptr()
        self.record = CGemm(
            self._panels.data_ptr(), sum_O.data_ptr(), scale_O.data_ptr(), bias,
            self.out_features, self.in_features, _ACTIVATIONS[activation], self.span,
        )  # fmt: skip
        self._at = addressof(self.record)

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
        if self.in_features % 4:  # the kernel reads four at a time
            level_TI = F.pad(level_TI, (0, -self.in_features % 4))
        kind = torch.float32 if emitted is None else torch.uint8
        record = None if emitted is None else c_levels(emitted)
        out_TO = torch.empty((rows, self.out_features), dtype=kind)
        self._library.sq_gemm(
            self._at, level_TI.data_ptr(), rows, level_TI.shape[1], levels.scale, levels.zero_point,
            None if residual_TO is None else residual_TO.data_ptr(),
            None if record is None else addressof(record), out_TO.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out_TO


@cache
def available() -> tuple[bool, str]:
    """Whether the native kernels run on this machine, and why (not). Compiles them if need be; once per process."""
    try:
        load()
    except BuildError as error:
        return False, str(error)
    if not _is_exact():
        return False, "the native kernels do not add up exactly on this CPU"
    return True, "native kernels with AVX-512 VNNI"


@cache
def sparse_is_faster() -> bool:
    """Whether 2:4 weights multiply faster without their zeros on this CPU: it is if it shuffles beside multiplying.
    Measured once per process, in some milliseconds."""
    weight_OI = torch.tensor([[1, 0, 0, 1]], dtype=torch.int8).repeat(512, 96)
    level_TI, levels = torch.ones(60, weight_OI.shape[1], dtype=torch.uint8), Levels(1.0, 0, 0, 255)
    fastest = []
    for sparse in (True, False):
        gemm = NativeGemm(weight_OI, torch.ones(weight_OI.shape[0]), None, sparse=sparse)
        fastest.append(min(_seconds(gemm, level_TI, levels) for _ in range(9)))
    return fastest[0] < fastest[1]


def _seconds(gemm: NativeGemm, level_TI: Tensor, levels: Levels) -> float:
    start = time.perf_counter()
    gemm(level_TI, levels)
    return time.perf_counter() - start


def _is_exact() -> bool:
    """Against int64 arithmetic, on the largest sums, 255 * 127 and 255 * -128, and on a matrix of odd shape."""
    level_TI = torch.tensor([[255, 255, 255], [0, 255, 1], [1, 0, 254]], dtype=torch.uint8).repeat(5, 30)
    weight_OI = torch.tensor([[127, 127, 127], [-128, -128, -128], [-127, 1, 64]], dtype=torch.int8).repeat(25, 30)
    levels = Levels(1.0, 128, 0, 255)
    found_TO = NativeGemm(weight_OI, torch.ones(weight_OI.shape[0]), None)(level_TI, levels)
    expected_TO = (level_TI.long() - 128) @ weight_OI.long().t()
    return bool((found_TO == expected_TO).all())


def aligned_bytes(size: int) -> Tensor:
    """``size`` bytes that begin at a multiple of 64."""
    memory = torch.empty(size + 63, dtype=torch.int8)
    start = -memory.data_ptr() % 64
    return memory[start : start + size]


def quantize(x_TI: Tensor, levels: Levels) -> Tensor:
    """float32 [T, I] → uint8 levels: x / scale rounded half to even, then the zero point. A NaN becomes ``low``."""
    x_TI = x_TI.contiguous()
    record = c_levels(levels)
    level_TI = torch.empty(x_TI.shape, dtype=torch.uint8)
    load().sq_quantize(
        x_TI.data_ptr(), x_TI.shape[0], x_TI.shape[1], addressof(record), level_TI.data_ptr(), torch.get_num_threads()
    )
    return level_TI


def layer_norm(
    x_TI: Tensor, weight_I: Tensor | None, bias_I: Tensor | None, epsilon: float, levels: Levels | None = None
) -> tuple[Tensor, Tensor | None]:
    """Layer normalization of dense rows, and the result as uint8 levels too where they are given."""
    y_TI = torch.empty_like(x_TI)
    level_TI = None if levels is None else torch.empty(x_TI.shape, dtype=torch.uint8)
    record = None if levels is None else c_levels(levels)
    norm = norm_record(weight_I, bias_I, x_TI.shape[1], epsilon)
    load().sq_normalize(
        x_TI.data_ptr(), x_TI.shape[0], addressof(norm),
        y_TI.data_ptr(), None if record is None else addressof(record),
        None if level_TI is None else level_TI.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y_TI, level_TI


def norm_record(weight_I: Tensor | None, bias_I: Tensor | None, width: int, epsilon: float) -> CNorm:
    """``weight_I`` and ``bias_I`` must outlive it."""
    weight, bias = (None if tensor is None else tensor.data_ptr() for tensor in (weight_I, bias_I))
    return CNorm(weight, bias, width, epsilon)


def attention(
    q_BQHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    levels: Levels | None = None,
    bfloat16: bool = False,
) -> Tensor:
    """softmax(scale Q K^T + mask) V in float32 → [B, Q, H * D], or as uint8 levels.

    The last axis of q, k and v is dense, the others have any stride; H is a multiple of G. ``mask``: bool (True =
    valid) or float32 (added), broadcastable to [B, H, Q, K]. A query without a valid key gives 0. ``causal``: the last
    query sees all keys, each one before it one less. ``bfloat16``: round Q, K, V and P to bfloat16 where this CPU
    multiplies such numbers (:func:`has_bfloat16`); scores and sums stay float32.
    """
    (batch, queries, heads, width), keys = q_BQHD.shape, k_BKGD.shape[1]
    shape = CAttention(
        batch, heads, queries, keys, width, _strides(q_BQHD), _strides(k_BKGD), _strides(v_BKGD),
        heads // k_BKGD.shape[2], width**-0.5 if scale is None else scale, int(causal), int(bfloat16),
    )  # fmt: skip
    expanded, record = mask_record(mask, batch, heads, queries, keys)
    out = torch.empty((batch, queries, heads * width), dtype=torch.float32 if levels is None else torch.uint8)
    emitted = None if levels is None else c_levels(levels)
    load().sq_attention(
        q_BQHD.data_ptr(), k_BKGD.data_ptr(), v_BKGD.data_ptr(), addressof(shape), addressof(record),
        None if emitted is None else addressof(emitted), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    del expanded
    return out


def has_bfloat16() -> bool:
    """Whether the attention kernel can work in bfloat16 here: AVX512_BF16 and AVX512_VBMI. Needs the library."""
    return bool(load().sq_has_bfloat16())


def mask_record(mask: Tensor | None, batch: int, heads: int, queries: int, keys: int) -> tuple[Tensor | None, CMask]:
    """The mask as the kernel reads it, and the tensor that it points into."""
    if mask is None:
        return None, CMask(None, 0, (ctypes.c_int64 * 3)())
    if mask.stride(-1) != 1 or mask.shape[-1] != keys:
        mask = mask.expand(*mask.shape[:-1], keys).contiguous()
    mask = mask.expand(batch, heads, queries, keys)
    return mask, CMask(mask.data_ptr(), int(mask.dtype == torch.bool), (ctypes.c_int64 * 3)(*mask.stride()[:3]))


def _strides(x_BQHD: Tensor) -> Any:
    return (ctypes.c_int64 * 3)(x_BQHD.stride(0), x_BQHD.stride(2), x_BQHD.stride(1))
