"""The Triton kernels around an integer GEMM: rounding its input, finishing its result, LayerNorm before it.

Levels are rounded half to even, as the reference does it: a division rounded to nearest, a clamp, and the addition and
subtraction of 1.5 * 2^23, which leaves no bits behind the point. The clamp in between keeps the compiler from joining
division and addition into one instruction that rounds once.

Integers have no NaN. So a kernel that writes levels stores NaN to the one number at ``mark_ptr`` when it meets NaN or
infinity (SEE); a mark that is never made costs nothing (``nonfinite.py``).

This module imports Triton; ``triton_quantize.py`` imports it when it is first needed. Legend: T rows, I in_features,
O out_features, D width.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _steps(x, scale, low, high):
    """clamp(round(x / scale), low, high), float32."""
    step = tl.minimum(tl.maximum(tl.div_rn(x, scale), low), high)
    return (step + 12582912.0) - 12582912.0


@triton.jit
def _levels(x, scale, low, high, shift):
    """The steps + shift as int8; a NaN becomes some level."""
    return (_steps(x, scale, low, high).to(tl.int32) + shift).to(tl.int8)


@triton.jit
def _nan_unless_finite(x):
    """0 where x is finite, else NaN."""
    return tl.where(tl.abs(x) < float("inf"), 0.0, float("nan"))


@triton.jit
def _see(mark_ptr, x):
    """Mark that x, of any shape, holds NaN or infinity."""
    tl.store(mark_ptr, float("nan"), mask=tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1)) > 0)


@triton.jit
def quantize_kernel(
    x_ptr, level_ptr, mark_ptr, size, scale, low, high, shift, SEE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Element by element, one scale."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(level_ptr + at, _levels(x, scale, low, high, shift), mask=at < size)
    if SEE:
        _see(mark_ptr, x)


@triton.jit
def round_kernel(x_ptr, out_ptr, size, scale, low, high, BLOCK: tl.constexpr):
    """Element by element: the nearest level as a number, NaN for NaN and infinity."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    y = _steps(x, scale, low, high) * scale + _nan_unless_finite(x)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def quantize_rows_kernel(x_ptr, level_ptr, scale_ptr, width, stride_x, highest, BLOCK: tl.constexpr):
    """One row per program: scale = max|x| / highest (1 where that is too small to divide by), symmetric;
    NaN where one is NaN or infinite."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + column, mask=column < width, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 0), highest)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
    tl.store(scale_ptr + row, scale + tl.sum(_nan_unless_finite(x), 0))
    tl.store(level_ptr + row * width + column, _levels(x, scale, -highest, highest, 0), mask=column < width)


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh u) = 1 / (1 + exp(-2 u))
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    elif ACTIVATION == "relu":
        y = tl.maximum(y, 0.0)
    return y


@triton.jit
def finish_kernel(
    sum_ptr, out_ptr, step_ptr, row_ptr, correction_ptr, bias_ptr, mark_ptr, rows, features, stride_sum, scale, low,
    high, shift,
    STEP: tl.constexpr, ROW: tl.constexpr, CORRECTION: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    EMIT: tl.constexpr, SEE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """(sum + correction_O) * step_O * row_T + bias_O, activation, then levels (EMIT) or the dtype of ``out``."""
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = (t_T < rows)[:, None] & (o_O < features)[None, :]
    y = tl.load(sum_ptr + t_T[:, None] * stride_sum + o_O[None, :], mask=inside, other=0)
    if CORRECTION:
        y += tl.load(correction_ptr + o_O, mask=o_O < features, other=0)[None, :]
    y = y.to(tl.float32)
    if STEP:
        y *= tl.load(step_ptr + o_O, mask=o_O < features, other=0.0)[None, :]
    if ROW:
        y *= tl.load(row_ptr + t_T, mask=t_T < rows, other=0.0)[:, None]
    if BIAS:
        y += tl.load(bias_ptr + o_O, mask=o_O < features, other=0.0)[None, :]
    y = _activated(y, ACTIVATION)
    where = out_ptr + t_T[:, None] * features + o_O[None, :]
    if EMIT:
        tl.store(where, _levels(y, scale, low, high, shift), mask=inside)
        if SEE:
            _see(mark_ptr, tl.where(inside, y, 0.0))
    else:
        tl.store(where, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, level_ptr, mark_ptr, width, stride_x, stride_residual, eps,
    scale, low, high, shift, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, EMIT: tl.constexpr,
    SEE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row per program: x (+ residual, rounded to the dtype as a separate addition would), norm, levels of it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0)
    if RESIDUAL:
        other = tl.load(residual_ptr + row * stride_residual + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + other.to(tl.float32)).to(y_ptr.dtype.element_ty)
    x = x.to(tl.float32)
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    y = centred * (1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps))
    if WEIGHT:
        y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * width + column, y, mask=inside)
    if EMIT:
        y = y.to(tl.float32)
        tl.store(level_ptr + row * width + column, _levels(y, scale, low, high, shift), mask=inside)
        if SEE:
            _see(mark_ptr, tl.where(inside, y, 0.0))
