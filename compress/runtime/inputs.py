"""The integer levels of an input, the same for every backend.

    x ~ (q - zero_point) * scale,   q = clamp(round(x / scale) + zero_point, qmin, qmax),   rounding half to even

Symmetric quantizers (LSQ, Q8BERT) have the levels -Qp..Qp and zero point 0, asymmetric ones (MinMax, PACT) 0..2^k - 1.
Static ones have a scale; dynamic ones take it from the range of each call (dynamic quantization of PyTorch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers import InputQuantization, affine_step
from ..quantizers.rounding import no_zero_scale


def check_input(name: str, found: InputQuantization) -> None:
    """Refuse what no backend could execute.

    Raises:
        ValueError: bits outside 2..8, levels that 8 bits cannot hold, a zero point outside them, a scale that is not
            positive and finite.
    """
    if not 2 <= found.bits <= 8:
        raise ValueError(f"{name}: expected 2 to 8 bits for its input, found {found.bits}")
    qp = (1 << (found.bits - 1)) - 1
    if (found.qmin, found.qmax) not in ((-qp, qp), (0, 2 * qp + 1)):
        raise ValueError(
            f"{name}: expected levels {-qp}..{qp} or 0..{2 * qp + 1} for {found.bits} bits, found "
            f"{found.qmin}..{found.qmax}"
        )
    if found.kind == "dynamic":
        return
    if found.zero_point is None or not found.qmin <= found.zero_point <= found.qmax:
        raise ValueError(
            f"{name}: expected a zero point among the levels {found.qmin}..{found.qmax}, found {found.zero_point}"
        )
    # Not below the smallest normal float32: kernels multiply by its reciprocal, which must not overflow.
    if found.scale is None or not (math.isfinite(found.scale) and found.scale >= torch.finfo(torch.float32).tiny):
        raise ValueError(
            f"{name}: expected a positive, finite input scale, found {found.scale}; calibrate the input first"
        )


def step_of(x: Tensor, found: InputQuantization) -> tuple[float, int]:
    """(scale, zero point) for the input ``x``: as calibrated, or of the range of ``x`` itself, 0 included.

    Raises:
        ValueError: a dynamic input that holds NaN or infinity.
    """
    if found.scale is not None and found.zero_point is not None:
        return found.scale, found.zero_point
    if not x.numel():
        return 1.0, 0
    low, high = x.detach().float().aminmax()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"expected a finite input to quantize, found values from {float(low)} to {float(high)}")
    if found.qmin < 0:
        return float(no_zero_scale(torch.maximum(-low, high) / found.qmax)), 0
    step, z = affine_step(low, high, found.bits)
    return float(step), -int(z)


def fake_quantize(x: Tensor, found: InputQuantization, stretch: float = 1.0) -> Tensor:
    """``x`` rounded to its levels, in float32, returned in the dtype of ``x``; ``stretch`` multiplies the scale."""
    scale, zero_point = step_of(x, found)
    scale *= stretch
    levels = (x.float() / scale).round_().clamp_(found.qmin - zero_point, found.qmax - zero_point)
    return levels.mul_(scale).to(x.dtype)


@dataclass
class FakeQuantizedInput:
    """Forward pre-hook: the first positional input rounded to its levels. ``stretch`` is for `stretched_`."""

    input: InputQuantization
    stretch: float = 1.0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (fake_quantize(args[0], self.input, self.stretch), *args[1:])


def stretch_(model: nn.Module, factor: float) -> int:
    """Multiply the scale of every fake-quantized input of ``model`` by ``factor`` (1 restores it); how many there are.

    For measuring how a model answers to single rounding steps.
    """
    count = 0
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, FakeQuantizedInput):
                hook.stretch = factor
                count += 1
    return count
