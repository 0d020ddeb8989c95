"""Single native operations on tensors. Legend: T rows (tokens of the whole batch), I in_features, O out_features;
B batch, H heads, Q queries, K keys, D head dimension.

All tensors are on the CPU and float32 unless said otherwise; the caller sees to it that shapes fit.
"""

from __future__ import annotations

import ctypes
import warnings
from ctypes import addressof
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..levels import Levels, MapLevels, not_finite
from .build import BuildError, is_linux_x86
from .library import CAttention, CMapLevels, CMask, CNorm, c_levels, load, missing_instructions
from .matrix import NativeGemm


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
def say_if_unavailable() -> None:
    """Warn, once per process, where this CPU could run the native kernels and something else is in the way."""
    runs, why = available()
    if not runs and is_linux_x86() and not missing_instructions():
        warnings.warn(
            f"int8 models run on PyTorch's own operators, which are slower than the native kernels: {why}",
            RuntimeWarning,
            stacklevel=5,
        )


def _is_exact() -> bool:
    """Against int64 arithmetic, on the largest sums, 255 * 127 and 255 * -128, and on a matrix of odd shape."""
    level_TI = torch.tensor([[255, 255, 255], [0, 255, 1], [1, 0, 254]], dtype=torch.uint8).repeat(5, 30)
    weight_OI = torch.tensor([[127, 127, 127], [-128, -128, -128], [-127, 1, 64]], dtype=torch.int8).repeat(25, 30)
    levels = Levels(1.0, 128, 0, 255)
    found_TO = NativeGemm(weight_OI, torch.ones(weight_OI.shape[0]), None)(level_TI, levels)
    expected_TO = (level_TI.long() - 128) @ weight_OI.long().t()
    return bool((found_TO == expected_TO).all())


def quantize(x_TI: Tensor, levels: Levels) -> Tensor:
    """float32 [T, I] → uint8 levels: x / scale rounded half to even, then the zero point.

    Raises:
        ValueError: NaN or infinity in ``x_TI``.
    """
    x_TI = x_TI.contiguous()
    record = c_levels(levels)
    level_TI = torch.empty(x_TI.shape, dtype=torch.uint8)
    finite = load().sq_quantize(
        x_TI.data_ptr(), x_TI.shape[0], x_TI.shape[1], addressof(record), level_TI.data_ptr(), torch.get_num_threads()
    )
    if not finite:
        raise ValueError(not_finite(x_TI, "the input of an int8 matrix"))
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
    map_levels: MapLevels | None = None,
) -> Tensor:
    """softmax(scale Q K^T + mask) V in float32 → [B, Q, H * D], or as uint8 levels.

    The last axis of q, k and v is dense, the others have any stride; H is a multiple of G. ``mask``: bool (True =
    valid) or float32 (added), broadcastable to [B, H, Q, K]. A query without a valid key gives 0. ``causal``: the last
    query sees all keys, each one before it one less. ``bfloat16``: round Q, K, V and P to bfloat16 where this CPU
    multiplies such numbers (:func:`has_bfloat16`); scores and sums stay float32.
    ``map_levels``: round Q, K, P and V to these levels and add their products up in integers; keys at most 65,536.
    """
    (batch, queries, heads, width), keys = q_BQHD.shape, k_BKGD.shape[1]
    shape = CAttention(
        batch, heads, queries, keys, width, _strides(q_BQHD), _strides(k_BKGD), _strides(v_BKGD),
        heads // k_BKGD.shape[2], width**-0.5 if scale is None else scale, int(causal), int(bfloat16),
    )  # fmt: skip
    expanded, record = mask_record(mask, batch, heads, queries, keys)
    out = torch.empty((batch, queries, heads * width), dtype=torch.float32 if levels is None else torch.uint8)
    emitted = None if levels is None else c_levels(levels)
    of_map = None if map_levels is None else c_map_levels(map_levels)
    load().sq_attention(
        q_BQHD.data_ptr(), k_BKGD.data_ptr(), v_BKGD.data_ptr(), addressof(shape), addressof(record),
        None if of_map is None else addressof(of_map),
        None if emitted is None else addressof(emitted), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    del expanded
    return out


def c_map_levels(levels: MapLevels) -> CMapLevels:
    """The record for C."""
    return CMapLevels(*(c_levels(one) for one in (levels.q, levels.k, levels.p, levels.v)))


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
