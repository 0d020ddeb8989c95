"""Two-sided PACT and PACT+: learned clip values (Choi et al., arXiv:1805.06085; Wang et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .base import InputQuantization, Quantizer
from .minmax import affine_levels
from .ranks import value_of_rank
from .rounding import affine_step, between_, check_bits, refuse_unusable, widen

MIN_ALPHA = 1e-6


class _PactFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, alpha_n: Tensor, bits: int, plus: bool) -> Tensor:
        high, low = alpha.to(x.dtype).clamp(min=MIN_ALPHA), alpha_n.to(x.dtype).clamp(max=0)
        step, z = affine_step(low, high, bits)
        # Rounding is monotone: the level of a clipped value is that of the clip value.
        top = torch.minimum(z + ((1 << bits) - 1), (high / step).round())
        ctx.save_for_backward(x, low, high, step)
        ctx.bits, ctx.plus, ctx.dtype = bits, plus, alpha.dtype
        return between_((x / step).round_(), z, top).mul_(step)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, low, high, step = ctx.saved_tensors
        # threshold's own backward keeps its first argument where the second is > 0: exact, and on a CPU ten times as
        # fast as a mask of bools. One buffer serves all steps.
        keep, keep_into = torch.ops.aten.threshold_backward, torch.ops.aten.threshold_backward.grad_input
        buffer = x - low
        dx = keep(g, buffer, 0)
        keep_into(dx, torch.sub(high, x, out=buffer), 0, grad_input=dx)
        outside = torch.sub(g, dx, out=buffer)
        total = outside.sum()
        d_alpha = keep_into(outside, x, 0, grad_input=outside).sum()  # high > 0 >= low
        d_alpha_n = total - d_alpha
        if ctx.plus:
            v = (x - low).div_(step)
            error = ((v - v.round()).mul_(dx)).sum() / ((1 << ctx.bits) - 1)
            d_alpha, d_alpha_n = d_alpha - error, d_alpha_n + error
        return dx, d_alpha.to(ctx.dtype), d_alpha_n.to(ctx.dtype), None, None


def pact_fake_quantize(x: Tensor, alpha: Tensor, alpha_n: Tensor, bits: int, plus: bool = False) -> Tensor:
    """``x`` clipped to alpha_n..alpha, then rounded as MinMax does with that range (ALGORITHMS D.3).

    dx = g where alpha_n < x < alpha, else 0; d alpha = sum of g over x >= alpha; d alpha_n = that over x <= alpha_n.
    ``plus`` adds PACT+'s terms of the values inside.

    Args:
        alpha, alpha_n: [] learned clip values. Taken as >= 1e-6 and <= 0; the gradient flows as if they were.
    """
    return _PactFakeQuantize.apply(x, alpha, alpha_n, bits, plus)


class PactQuantizer(Quantizer):
    """Two-sided PACT of an input. Both clip values are 0 until it is calibrated.

    Calibration: of each batch the value of rank int(p * numel), p = ``low`` and ``high``; the mean over the batches
    (fms-model-optimizer, ``ObserverPercentile``). A calibration stage's own percentile does not apply.

    Args:
        bits: 2 to 8. plus: PACT+. low, high: the shares by rank, in [0, 1].
    """

    needs_batches = True

    def __init__(self, bits: int, plus: bool = False, low: float = 0.01, high: float = 0.99) -> None:
        check_bits(bits, "a PACT")
        if not 0 <= low < high <= 1:
            raise ValueError(f"expected shares by rank 0 <= low < high <= 1, found {low} and {high}")
        super().__init__(bits)
        self.plus, self.low, self.high = plus, low, high
        self.alpha = nn.Parameter(torch.zeros(()))
        self.alpha_n = nn.Parameter(torch.zeros(()))
        self._sums: tuple[Tensor, Tensor] | None = None
        self._batches = 0

    def fake_quantize(self, x: Tensor, update: bool = True) -> Tensor:
        return pact_fake_quantize(widen(x), self.alpha, self.alpha_n, self.bits, self.plus).to(x.dtype)

    @torch.no_grad()
    def observe(self, x: Tensor, percentile: float | None = None) -> None:
        refuse_unusable(x, "the calibration input")
        flat = widen(x).flatten()
        low, high = (value_of_rank(flat, max(1, int(share * flat.numel()))).double() for share in (self.low, self.high))
        self._sums = (low, high) if self._sums is None else (self._sums[0] + low, self._sums[1] + high)
        self._batches += 1

    @torch.no_grad()
    def finish_calibration_(self) -> None:
        if self._sums is None:
            raise RuntimeError("expected at least one calibration batch, found none; call observe(x) first")
        self.alpha_n.copy_(self._sums[0] / self._batches)
        self.alpha.copy_(self._sums[1] / self._batches)
        self.active = True
        self.clamp_()
        self.stop_observing_()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep alpha >= 1e-6 and alpha_n <= 0; to be called after each optimizer step."""
        if self.active:
            self.alpha.clamp_(min=MIN_ALPHA)
            self.alpha_n.clamp_(max=0)

    def _input_levels(self) -> InputQuantization:
        low, high = self.alpha_n.detach().clamp(max=0), self.alpha.detach().clamp(min=MIN_ALPHA)
        return affine_levels(low, high, self.bits)

    def _forget(self) -> None:
        self._sums, self._batches = None, 0

    def _calibrated(self) -> bool:
        return bool(self.alpha.detach() > 0)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, plus={self.plus}, active={self.active}"
