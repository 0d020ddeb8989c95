"""Inputs as the bytes that the CPU kernels read. Legend: T rows (tokens of the whole batch), I in_features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantizers import InputQuantization
from .inputs import step_of

SIGN = 128  # what lies between the uint8 and the int8 form of a level


@dataclass(frozen=True)
class Levels:
    """The levels of one input as uint8: ``x ~ (level - zero_point) * scale`` with level in ``low..high``."""

    scale: float
    zero_point: int
    low: int
    high: int

    @classmethod
    def of(cls, found: InputQuantization, x: Tensor) -> Levels:
        """As calibrated, or, of a dynamic input, by the range of ``x``."""
        scale, zero_point = step_of(x, found)
        sign = SIGN if found.qmin < 0 else 0
        return cls(scale, zero_point + sign, found.qmin + sign, found.qmax + sign)


@dataclass(frozen=True)
class MapLevels:
    """Those of the factors of an attention map's two products, all static: Q and K, P and V."""

    q: Levels
    k: Levels
    p: Levels
    v: Levels


def not_finite(x: Tensor, what: str) -> str:
    """The error about an input that has no levels."""
    bad = int((~x.isfinite()).sum())
    if not bad:
        return f"{what} is finite, what comes of it is not: too large values, or parameters with NaN or infinity"
    return (
        f"expected finite values in {what}, found {bad} of {x.numel()} that are NaN or infinite: look at the model's "
        "inputs, and whether backend='reference' gives finite results"
    )


def check_finite(x: Tensor, what: str) -> None:
    """Raises:
    ValueError: NaN or infinity in ``x``; says how many.
    """
    if not math.isfinite(float(x.sum())) and not bool(x.isfinite().all()):  # finite values may sum up to infinity
        raise ValueError(not_finite(x, what))


def to_levels(x_TI: Tensor, levels: Levels, signed: bool) -> Tensor:
    """``x_TI`` as levels: uint8, or minus 128 as int8. A NaN becomes some level.

    PyTorch adds the zero point before it rounds half to even: with an odd one, an input exactly between two levels
    falls to the other of them.
    """
    if not hasattr(torch, "quantize_per_tensor"):
        return to_levels_by_arithmetic(x_TI, levels, signed)
    # Deprecated since PyTorch 2.13, but one pass instead of four. The storage of its result is taken over: int_repr()
    # would copy it. It saturates at the 256 levels of a byte, of which the quantizer may have fewer.
    sign, quantized, integer = (SIGN, torch.qint8, torch.int8) if signed else (0, torch.quint8, torch.uint8)
    found = torch.quantize_per_tensor(x_TI, levels.scale, levels.zero_point - sign, quantized)
    level_TI = torch.empty(0, dtype=integer).set_(found.untyped_storage(), 0, found.shape, found.stride())
    if levels.high < 255:
        return level_TI.clamp_(levels.low - sign, levels.high - sign)
    return level_TI.clamp_(min=levels.low - sign) if levels.low else level_TI


def to_levels_by_arithmetic(x_TI: Tensor, levels: Levels, signed: bool) -> Tensor:
    """The same for a PyTorch without quantized tensors."""
    low, high = levels.low - levels.zero_point, levels.high - levels.zero_point
    step_TI = x_TI.detach().mul(1.0 / levels.scale).round_().clamp_(low, high)
    shift = levels.zero_point - (SIGN if signed else 0)
    return step_TI.add_(shift).to(torch.int8 if signed else torch.uint8)
