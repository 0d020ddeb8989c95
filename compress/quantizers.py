"""Quantizers: fake quantization while training, integers when exported. Rounding is half to even everywhere.

Legend: O out_features, I in_features; scale_O1 one scale per output channel, a scale of shape [] one per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_SCALE = 1e-8
Granularity = Literal["channel", "tensor"]


def largest_level(bits: int) -> int:
    """Qp = 2^(bits-1) - 1, the largest level of a symmetric quantizer; the smallest is -Qp.

    Raises:
        ValueError: ``bits`` is not an integer in 2..8.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise ValueError(f"expected 2 to 8 bits for a symmetric quantizer, found {bits!r}")
    return (1 << (bits - 1)) - 1


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
            error = torch.sub(x_q, inside, out=inside).mul_(g)
            ds = (error.sum_to_size(ctx.scale_shape) * (ctx.grad_factor / s)).to(ctx.scale_dtype)
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


@torch.no_grad()
def quantize_int8(w_OI: Tensor, scale_O1: Tensor, qp: int) -> Tensor:
    """The integers of :func:`lsq_fake_quantize`: int8 [O, I] with ``q * scale`` equal to the fake-quantized weight.

    Raises:
        ValueError: ``w_OI`` holds NaN or the scale is not positive and finite.
    """
    if not bool((scale_O1 > 0).all()) or not bool(scale_O1.isfinite().all()):
        raise ValueError(f"expected positive finite scales, found {scale_O1.min().item()} to {scale_O1.max().item()}")
    _refuse_nan(w_OI, "the weight to quantize")
    w_OI = _widen(w_OI)
    return (w_OI / scale_O1.to(w_OI.dtype).clamp_min(MIN_SCALE)).clamp_(-qp, qp).round_().to(torch.int8)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _refuse_nan(x: Tensor, what: str) -> None:
    count = int(x.isnan().sum())
    if count:
        raise ValueError(f"expected finite values in {what}, found {count} NaN of {x.numel()} values")


class LsqQuantizer(nn.Module):
    """Symmetric fake quantizer with a learned scale, as GPUSQ-TLM's second stage uses it.

    Until it is calibrated (:meth:`init_from_amax_`, or :meth:`observe` and then :meth:`finish_calibration_`) it is the
    identity and ``active`` is False; its scale is then 0, so that a state dict tells the two cases apart.

    Args:
        bits: 2 to 8; levels -Qp..Qp with Qp = 2^(bits-1) - 1.
        shape: of the scale. ``(out_features, 1)``: one scale per output channel of a weight [O, I]; ``()``: one scale
            per tensor of any shape.
    """

    scale: nn.Parameter

    def __init__(self, bits: int, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.qp = largest_level(bits)
        if shape != () and (len(shape) != 2 or shape[1] != 1):
            raise ValueError(f"expected the shape of the scale, (out_features, 1) or (), found {shape}")
        self.bits = bits
        self.granularity: Granularity = "channel" if shape else "tensor"
        self.active = False
        self.scale = nn.Parameter(torch.zeros(shape))
        self._observed: Tensor | None = None
        self._batches = 0
        self._percentile: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize ``x``; computed in float32 (float64 stays), returned in the dtype of ``x``."""
        if not self.active:
            return x
        elements = x.shape[-1] if self.granularity == "channel" else x.numel() // max(1, x.shape[0] if x.ndim else 1)
        grad_factor = 1.0 / math.sqrt(max(1, elements) * self.qp)
        return lsq_fake_quantize(_widen(x), self.scale, self.qp, grad_factor).to(x.dtype)

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
        scale = (amax / self.qp).clamp_(min=MIN_SCALE)
        # amax / Qp is rounded; one step up where needed keeps the largest value itself inside the range.
        scale = torch.where(amax / scale > self.qp, scale.nextafter(scale.new_tensor(math.inf)), scale)
        self.scale.copy_(scale.masked_fill(amax == 0, 1.0))
        self.active = True

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
        size = _widen(x).abs() if channel else _widen(x).abs().flatten()
        peak = size.amax(-1, keepdim=channel)
        if not bool(peak.isfinite().all()):
            _refuse_nan(x, "the calibration input")
            raise ValueError("expected finite values in the calibration input, found infinity")
        if percentile is None:
            self._observed = peak if self._observed is None else torch.maximum(self._observed, peak)
        else:
            rank = max(1, math.ceil(percentile / 100 * size.shape[-1]))
            top = size.kthvalue(rank, -1, keepdim=channel).values
            self._observed = top if self._observed is None else self._observed + top
        self._percentile = percentile
        self._batches += 1

    def finish_calibration_(self) -> None:
        """Turn the observed range into the scale and activate.

        Raises:
            RuntimeError: nothing was observed.
        """
        if self._observed is None:
            raise RuntimeError("expected at least one calibration batch, found none; call observe(x) first")
        self.init_from_amax_(self._observed if self._percentile is None else self._observed / self._batches)
        self._observed, self._batches, self._percentile = None, 0, None

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the scale >= 1e-8; to be called after an optimiser step."""
        if self.active:
            self.scale.clamp_(min=MIN_SCALE)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "scale" in state_dict and not self.scale.is_meta:
            self.active = bool((self.scale.detach() > 0).all())

    def extra_repr(self) -> str:
        return f"bits={self.bits}, granularity={self.granularity}, active={self.active}"
