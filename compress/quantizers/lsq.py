"""LSQ: a symmetric quantizer with a learned scale (Esser et al., arXiv:1902.08153), GPUSQ-TLM's second stage.

Legend: O out_features, I in_features; scale_O1 one scale per output channel, a scale of shape [] one per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .base import Granularity, InputQuantization, QuantizedWeight, Quantizer
from .ranks import value_of_rank
from .rounding import MIN_SCALE, largest_level, quantize_int8, refuse_nan, widen


class _LsqFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qp: int, grad_factor: float) -> Tensor:
        s = scale.to(x.dtype).clamp_min(MIN_SCALE)
        x_q = (x / s).clamp_(-qp, qp).round_().mul_(s)
        ctx.save_for_backward(x, s, x_q)
        ctx.qp, ctx.grad_factor, ctx.scale_shape, ctx.scale_dtype = qp, grad_factor, scale.shape, scale.dtype
        return x_q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, s, x_q = ctx.saved_tensors
        # hardtanh's own backward keeps its first argument where |v| < bound: one pass without a mask of bools, which
        # are slow on a CPU. The bound is the next number after Qp, so that |v| = Qp counts as inside.
        bound = ctx.qp + 2.0 ** (ctx.qp.bit_length() - 1) * torch.finfo(x.dtype).eps
        v = x / s
        dx = torch.ops.aten.hardtanh_backward(g, v, -bound, bound) if ctx.needs_input_grad[0] else None
        ds = None
        if ctx.needs_input_grad[1]:
            # s * e of the paper: x_q - x inside; x_q = +-Qp * s where clipped.
            inside = torch.ops.aten.hardtanh_backward(x, v, -bound, bound)
            minus_error = inside.sub_(x_q).mul_(g)  # in place; torch.compile takes no ``out=`` of a transposed tensor
            ds = (minus_error.sum_to_size(ctx.scale_shape) * (-ctx.grad_factor / s)).to(ctx.scale_dtype)
        return dx, ds, None, None


def lsq_fake_quantize(x: Tensor, scale: Tensor, qp: int, grad_factor: float) -> Tensor:
    """Learned step size quantization (Esser et al., arXiv:1902.08153, equations 1, 2 and 5), symmetric range.

    Forward: ``round(clamp(x / s, -qp, qp)) * s``. Backward, v = x / s: dx = g where |v| <= qp, else 0;
    ds = grad_factor * sum g * e with e = round(v) - v inside and +-qp where clipped.

    Args:
        x: a float tensor; give float32 or wider, as :class:`LsqQuantizer` does, for the accuracy of 8 bits.
        scale: broadcastable to ``x``: [O, 1] per output channel of a weight, [] per tensor. Taken as >= 1e-8, and the
            gradient flows as if it had not been raised.
        qp: largest level, 127 for 8 bits.
        grad_factor: multiplies the gradient of the scale, usually 1 / sqrt(elements per scale * qp).
    """
    return _LsqFakeQuantize.apply(x, scale, qp, grad_factor)


class LsqQuantizer(Quantizer):
    """Symmetric fake quantizer with a learned scale, as GPUSQ-TLM's second stage uses it, for weights and inputs.

    Until it is calibrated (:meth:`init_from_weight_`, :meth:`init_from_amax_`, or :meth:`observe` and then
    :meth:`finish_calibration_`) it is the identity and ``active`` is False; its scale is then 0, so that a state dict
    tells the two cases apart.

    Args:
        bits: 2 to 8; levels -Qp..Qp with Qp = 2^(bits-1) - 1.
        shape: of the scale. ``(out_features, 1)``: one scale per output channel of a weight [O, I]; ``()``: one scale
            per tensor of any shape.
    """

    needs_batches = True
    scale: nn.Parameter

    def __init__(self, bits: int, shape: tuple[int, ...] = ()) -> None:
        self.qp = largest_level(bits)
        super().__init__(bits)
        if shape != () and (len(shape) != 2 or shape[1] != 1):
            raise ValueError(f"expected the shape of the scale, (out_features, 1) or (), found {shape}")
        self.granularity: Granularity = "channel" if shape else "tensor"
        self.scale = nn.Parameter(torch.zeros(shape))
        self.reduce_amax: Callable[[Tensor], Tensor] | None = None  # tensor parallel: max over the processes
        self._observed: Tensor | None = None
        self._batches = 0
        self._percentile: float | None = None

    def fake_quantize(self, x: Tensor, update: bool = True) -> Tensor:
        elements = x.shape[-1] if self.granularity == "channel" else x.numel() // max(1, x.shape[0] if x.ndim else 1)
        grad_factor = 1.0 / math.sqrt(max(1, elements) * self.qp)
        return lsq_fake_quantize(widen(x), self.scale, self.qp, grad_factor).to(x.dtype)

    @torch.no_grad()
    def init_from_amax_(self, amax: Tensor) -> None:
        """Set scale = amax / Qp (amax 0: scale 1) and activate. ``amax``: max|x|, of the shape of ``scale`` or [O].

        Raises:
            ValueError: ``amax`` is NaN, infinite or negative, or has another number of channels.
        """
        if amax.numel() != self.scale.numel():
            raise ValueError(f"expected {self.scale.numel()} ranges, one per scale, found shape {tuple(amax.shape)}")
        if not bool(amax.isfinite().all()) or bool((amax < 0).any()):
            bad = amax[~(amax.isfinite() & (amax >= 0))].flatten()[0].item()
            raise ValueError(f"expected finite ranges max|x| >= 0 to calibrate on, found {bad}")
        amax = amax.to(self.scale).reshape(self.scale.shape)
        amax = amax if self.reduce_amax is None else self.reduce_amax(amax)
        scale = (amax / self.qp).clamp_(min=MIN_SCALE)
        # amax / Qp is rounded; one step up where needed keeps the largest value itself inside the range.
        scale = torch.where(amax / scale > self.qp, scale.nextafter(scale.new_tensor(math.inf)), scale)
        self.scale.copy_(scale.masked_fill(amax == 0, 1.0))
        self.active = True

    @torch.no_grad()
    def init_from_weight_(self, w_OI: Tensor, mask_OI: Tensor | None = None) -> None:
        """Scales from max|w| of what the mask keeps; activates."""
        refuse_nan(w_OI, "the weight to quantize")
        size_OI = widen(w_OI).abs() if mask_OI is None else widen(w_OI).abs() * mask_OI
        self.init_from_amax_(size_OI.amax(1, keepdim=True) if self.granularity == "channel" else size_OI.amax())

    @torch.no_grad()
    def observe(self, x: Tensor, percentile: float | None = None) -> None:
        """Take one calibration batch into the running range of |x|.

        Args:
            percentile: None takes max|x| over all batches; 99.99 that percentile of |x| by rank, mean over the batches.

        Raises:
            ValueError: ``x`` is empty, holds NaN or infinity, or ``percentile`` is not in (0, 100] or not that of the
                batches before; the range is left as it was.
        """
        if percentile is not None and not 0 < percentile <= 100:
            raise ValueError(f"expected a percentile in (0, 100], for example 99.99, found {percentile}")
        if self._batches and percentile != self._percentile:
            raise ValueError(f"expected percentile {self._percentile} as for the batches before, found {percentile}")
        if not x.numel():
            raise ValueError(f"expected values to calibrate on, found an empty tensor of shape {tuple(x.shape)}")
        channel = self.granularity == "channel"
        size = widen(x).abs() if channel else widen(x).abs().flatten()
        peak = size.amax(-1, keepdim=channel)
        if not bool(peak.isfinite().all()):
            refuse_nan(x, "the calibration input")
            raise ValueError("expected finite values in the calibration input, found infinity")
        if percentile is None:
            self._observed = peak if self._observed is None else torch.maximum(self._observed, peak)
        else:
            rank = max(1, math.ceil(percentile / 100 * size.shape[-1]))
            top = size.kthvalue(rank, -1, keepdim=True).values if channel else value_of_rank(size, rank)
            self._observed = top if self._observed is None else self._observed + top
        self._percentile = percentile
        self._batches += 1

    def finish_calibration_(self) -> None:
        if self._observed is None:
            raise RuntimeError("expected at least one calibration batch, found none; call observe(x) first")
        self.init_from_amax_(self._observed if self._percentile is None else self._observed / self._batches)
        self.stop_observing_()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the scale >= 1e-8; to be called after an optimizer step."""
        if self.active:
            self.scale.clamp_(min=MIN_SCALE)

    def _input_levels(self) -> InputQuantization:
        if self.granularity == "channel":
            raise self._wrong_side("inputs")
        scale = float(self.scale.detach().clamp_min(MIN_SCALE))
        return InputQuantization("static", self.bits, scale, 0, -self.qp, self.qp)

    def _integers(self, w_OI: Tensor) -> QuantizedWeight:
        scale_O1 = self.scale.detach().float().clamp_min(MIN_SCALE).expand(w_OI.shape[0], 1).contiguous()
        return QuantizedWeight(quantize_int8(w_OI, scale_O1, self.qp), scale_O1)

    def _weight_levels(self) -> tuple[int, int]:
        return -self.qp, self.qp

    def _forget(self) -> None:
        self._observed, self._batches, self._percentile = None, 0, None

    def _calibrated(self) -> bool:
        return bool((self.scale.detach() > 0).all())

    def extra_repr(self) -> str:
        return f"bits={self.bits}, granularity={self.granularity}, active={self.active}"
