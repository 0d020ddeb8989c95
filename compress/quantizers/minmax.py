"""MinMax: asymmetric, zero-aligned, by the range of the values (Wang et al., NeurIPS 2022; ALGORITHMS D.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import InputQuantization, Quantizer
from .ranks import value_of_rank
from .rounding import affine_step, between_, check_bits, refuse_unusable, straight_through, widen


def minmax_fake_quantize(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """``(q + z) * step``, ``q = clamp(round(x / step) - z, 0, 2^bits - 1)``; 0 stays exactly 0.

    The gradient passes unchanged.

    Args:
        low, high: [] the range; it is widened to hold 0. Values outside are clipped.
    """
    step, z = affine_step(low, high, bits)
    top = z + ((1 << bits) - 1)
    return straight_through(x, lambda x: between_((x / step).round_(), z, top).mul_(step))


def affine_levels(low: Tensor, high: Tensor, bits: int) -> InputQuantization:
    """The integers of `minmax_fake_quantize`; their zero point is -z."""
    step, z = affine_step(low.float(), high.float(), bits)
    return InputQuantization("static", bits, float(step), -int(z), 0, (1 << bits) - 1)


class MinMaxQuantizer(Quantizer):
    """MinMax of an input: while training by the range of the batch, in evaluation by the running range.

    The running range is ``(1 - momentum) * old + momentum * new``, a copy at the first batch; calibration batches count
    like training batches. Before the first it is empty: ``low`` = inf, ``high`` = -inf.

    Args:
        bits: 2 to 8. momentum: in (0, 1].
    """

    needs_batches = True
    low: Tensor
    high: Tensor

    def __init__(self, bits: int, momentum: float = 0.1) -> None:
        check_bits(bits, "a MinMax")
        if not 0 < momentum <= 1:
            raise ValueError(f"expected a momentum in (0, 1], found {momentum}")
        super().__init__(bits)
        self.momentum = momentum
        self.register_buffer("low", torch.tensor(math.inf))
        self.register_buffer("high", torch.tensor(-math.inf))
        self._seen: tuple[Tensor, Tensor] | None = None

    def fake_quantize(self, x: Tensor, update: bool = True) -> Tensor:
        if not x.numel():
            return x
        wide = widen(x)
        low, high = self.low, self.high
        if self.training:
            low, high = wide.detach().aminmax()
            if update:
                self._store_(*self._running((self.low, self.high), (low, high)))
        return minmax_fake_quantize(wide, low, high, self.bits).to(x.dtype)

    @torch.no_grad()
    def observe(self, x: Tensor, percentile: float | None = None) -> None:
        """Take one calibration batch into the running range.

        Args:
            percentile: 99.99 leaves out that share of values, by rank, at either end; None takes the whole range.
        """
        refuse_unusable(x, "the calibration input")
        wide = widen(x)
        if percentile is None:
            low, high = wide.aminmax()
        else:
            rank = max(1, math.ceil(percentile / 100 * x.numel()))
            flat = wide.flatten()
            low, high = value_of_rank(flat, x.numel() - rank + 1), value_of_rank(flat, rank)
        self._seen = (low, high) if self._seen is None else self._running(self._seen, (low, high))

    @torch.no_grad()
    def finish_calibration_(self) -> None:
        if self._seen is None:
            raise RuntimeError("expected at least one calibration batch, found none; call observe(x) first")
        self._store_(*self._seen)
        self.active = True
        self.stop_observing_()

    @torch.no_grad()
    def _store_(self, low: Tensor, high: Tensor) -> None:
        self.low.copy_(low)
        self.high.copy_(high)

    def _running(self, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        empty = old[1] < old[0]
        low, high = (
            torch.where(empty, after, (1 - self.momentum) * before + self.momentum * after)
            for before, after in zip(old, new, strict=True)
        )
        return low, high

    def _input_levels(self) -> InputQuantization:
        return affine_levels(self.low, self.high, self.bits)

    def _forget(self) -> None:
        self._seen = None

    def _calibrated(self) -> bool:
        return bool(self.low <= self.high)
