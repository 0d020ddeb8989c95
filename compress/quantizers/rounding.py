"""Rounding shared by all quantizers: levels, straight-through gradients, scales per group of rows. Half to even.

Legend: O out_features, I in_features, G groups of rows that share a scale, R rows of one group; scale_G11 broadcasts
over w_GRI; scale_O1 one scale per output channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MIN_SCALE = 1e-8


def check_bits(bits: int, kind: str) -> int:
    """Raises:
    ValueError: ``bits`` is not an integer in 2..8.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise ValueError(f"expected 2 to 8 bits for {kind} quantizer, found {bits!r}")
    return bits


def largest_level(bits: int) -> int:
    """Qp = 2^(bits-1) - 1, the largest level of a symmetric quantizer; the smallest is -Qp.

    Raises:
        ValueError: ``bits`` is not an integer in 2..8.
    """
    return (1 << (check_bits(bits, "a symmetric") - 1)) - 1


def widen(x: Tensor) -> Tensor:
    """float32; float64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def refuse_nan(x: Tensor, what: str) -> None:
    """Raises:
    ValueError: ``x`` holds NaN; says how many.
    """
    count = int(x.isnan().sum())
    if count:
        raise ValueError(f"expected finite values in {what}, found {count} NaN of {x.numel()} values")


def refuse_unusable(x: Tensor, what: str) -> None:
    """Raises:
    ValueError: ``x`` is empty or holds NaN or infinity, so no range can be taken from it.
    """
    if not x.numel():
        raise ValueError(f"expected values to calibrate on, found an empty tensor of shape {tuple(x.shape)}")
    low, high = x.aminmax()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        refuse_nan(x, what)
        raise ValueError(f"expected finite values in {what}, found infinity")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Callable[[Tensor], Tensor], clip: Tensor | None) -> Tensor:
        ctx.save_for_backward(*(() if clip is None else (x, clip)))
        return rounded(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.saved_tensors:
            return g, None, None
        x, clip = ctx.saved_tensors
        return g * (x.abs() <= clip), None, None


def straight_through(x: Tensor, rounded: Callable[[Tensor], Tensor], clip: Tensor | None = None) -> Tensor:
    """``rounded(x)`` with the gradient of ``x``: g everywhere, or, given ``clip``, where |x| <= clip and else 0.

    ``rounded`` returns a new tensor; it is called without gradient (Bengio et al., arXiv:1308.3432).
    """
    return _StraightThrough.apply(x, rounded, clip)


def grouped(w_OI: Tensor, groups: int) -> Tensor:
    """[O, I] seen as [G, R, I], whatever its strides: one group per tensor, per part of a fused matrix, or per row."""
    return w_OI.unflatten(0, (groups, w_OI.shape[0] // groups))


def one_per_row(scale_G11: Tensor, rows: int) -> Tensor:
    """A scale per group as float32 [O, 1]."""
    return scale_G11.reshape(-1, 1).repeat_interleave(rows // scale_G11.numel(), 0).float()


def no_zero_scale(scale: Tensor) -> Tensor:
    """1 where the scale is 0 or too small to divide by: what it belongs to holds zeros."""
    return scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 1.0)


@torch.no_grad()
def quantize_int8(w_OI: Tensor, scale_O1: Tensor, qp: int, lowest: int | None = None) -> Tensor:
    """Integers of a symmetric quantizer: int8 [O, I], ``q * scale`` is the fake-quantized weight.

    Args:
        qp: largest level. lowest: smallest level, default -qp.

    Raises:
        ValueError: ``w_OI`` holds NaN or the scale is not positive and finite.
    """
    if not bool((scale_O1 > 0).all()) or not bool(scale_O1.isfinite().all()):
        raise ValueError(f"expected positive finite scales, found {scale_O1.min().item()} to {scale_O1.max().item()}")
    refuse_nan(w_OI, "the weight to quantize")
    w_OI = widen(w_OI)
    scale_O1 = scale_O1.to(w_OI.dtype).clamp_min(torch.finfo(torch.float32).tiny)
    return (w_OI / scale_O1).round_().clamp_(-qp if lowest is None else lowest, qp).to(torch.int8)


def between_(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x.clamp_(low, high)`` for bounds of shape []; on a CPU ten times as fast as that is for tensors."""
    return torch.minimum(torch.maximum(x, low, out=x), high, out=x)


def affine_step(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero level z of the zero-aligned range that holds ``low``, ``high`` and 0 (ALGORITHMS D.2).

    ``step = (hi - lo) / (2^bits - 1)``, 1 for an empty range; ``z = round(lo / step)``, an integer <= 0. Both are
    tensors of the shape of ``low``, so that no device waits.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = no_zero_scale((high - low) / ((1 << bits) - 1))
    return step, (low / step).round()
