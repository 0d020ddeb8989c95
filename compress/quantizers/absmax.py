"""Weights by their largest value: per output channel, or as Q8BERT and PyTorch's dynamic quantization do, per tensor.

Legend: O out_features, I in_features, G groups of rows that share a scale, R rows of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import QuantizedWeight, Quantizer
from .rounding import (
    grouped,
    largest_level,
    no_zero_scale,
    one_per_row,
    quantize_int8,
    refuse_unusable,
    straight_through,
    widen,
)


@torch.no_grad()
def absmax_scale(w_GRI: Tensor, span: float) -> Tensor:
    """``max|w| / span`` of each group, [G, 1, 1]; 1 for a group of zeros."""
    return no_zero_scale(w_GRI.abs().amax((1, 2), keepdim=True) / span)


def absmax_fake_quantize(w_GRI: Tensor, scale_G11: Tensor, lowest: int, highest: int) -> Tensor:
    """``clamp(round(w / scale), lowest, highest) * scale``; the gradient passes unchanged."""
    return straight_through(w_GRI, lambda w: (w / scale_G11).round_().clamp_(lowest, highest).mul_(scale_G11))


class AbsmaxQuantizer(Quantizer):
    """Symmetric weight quantizer with ``scale = max|w| / span`` of the current weight; nothing is learned.

    Args:
        bits: 2 to 8; levels -Qp..Qp with Qp = 2^(bits-1) - 1.
        groups: number of scales; each covers out_features / groups rows.
        span: what max|w| is divided by; default Qp.
        lowest: smallest level; default -Qp.
    """

    calibrated: Tensor

    def __init__(self, bits: int, groups: int, span: float | None = None, lowest: int | None = None) -> None:
        self.qp = largest_level(bits)
        super().__init__(bits)
        self.groups = groups
        self.span = float(self.qp) if span is None else span
        self.lowest = -self.qp if lowest is None else lowest
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))

    def fake_quantize(self, x: Tensor, update: bool = True) -> Tensor:
        w_GRI = grouped(widen(x), self.groups)
        scale_G11 = absmax_scale(w_GRI.detach(), self.span)
        return absmax_fake_quantize(w_GRI, scale_G11, self.lowest, self.qp).flatten(0, 1).to(x.dtype)

    def init_from_weight_(self, w_OI: Tensor, mask_OI: Tensor | None = None) -> None:
        """Activate; scales always come from the weight of the moment, what a mask removes included (D.5)."""
        refuse_unusable(w_OI, "the weight to quantize")
        self.calibrated.fill_(True)
        self.active = True

    def _integers(self, w_OI: Tensor) -> QuantizedWeight:
        scale_O1 = one_per_row(absmax_scale(grouped(widen(w_OI), self.groups), self.span), w_OI.shape[0])
        return QuantizedWeight(quantize_int8(w_OI, scale_O1, self.qp, self.lowest), scale_O1)

    def _weight_levels(self) -> tuple[int, int]:
        return self.lowest, self.qp

    def _calibrated(self) -> bool:
        return bool(self.calibrated)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, groups={self.groups}, active={self.active}"
