"""Q8BERT's inputs: symmetric, by a running mean of max|x| (Zafrir et al., arXiv:1910.06188, section 3).

Its weights and embeddings are `AbsmaxQuantizer`s with one scale per tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import InputQuantization, Quantizer
from .ranks import value_of_rank
from .rounding import largest_level, no_zero_scale, refuse_unusable, straight_through, widen


def q8bert_fake_quantize(x: Tensor, peak: Tensor, bits: int) -> Tensor:
    """``clamp(round(x / s), -M, M) * s``, ``s = peak / M`` (1 for peak 0), M = 2^(bits-1) - 1; gradient unchanged."""
    m = largest_level(bits)
    scale = no_zero_scale(peak / m)
    return straight_through(x, lambda x: (x / scale).round_().clamp_(-m, m).mul_(scale))


class Q8BertQuantizer(Quantizer):
    """Q8BERT of an input: ``peak <- peak - (1 - decay) * (peak - max|x|)`` at each training step, before it is used.

    Calibration starts it at the first batch's max|x| and goes on with further batches as training does. Before, it is
    -inf.

    Args:
        bits: 2 to 8. decay: in [0, 1). dynamic: always max|x| of the input itself; needs no calibration data.
    """

    peak: Tensor

    def __init__(self, bits: int = 8, decay: float = 0.9999, dynamic: bool = False) -> None:
        self.m = largest_level(bits)
        if not 0 <= decay < 1:
            raise ValueError(f"expected a decay in [0, 1), found {decay}")
        super().__init__(bits)
        self.decay, self.dynamic = decay, dynamic
        self.register_buffer("peak", torch.tensor(-math.inf))
        self._seen: Tensor | None = None  # the running mean over the calibration batches so far

    @property
    def needs_batches(self) -> bool:  # type: ignore[override]
        return not self.dynamic

    def fake_quantize(self, x: Tensor, update: bool = True) -> Tensor:
        if not x.numel():
            return x
        wide = widen(x)
        peak = self.peak
        if self.dynamic:
            peak = _peak(wide)
        elif self.training and update:
            with torch.no_grad():
                self.peak.sub_((1 - self.decay) * (self.peak - _peak(wide)))
        return q8bert_fake_quantize(wide, peak, self.bits).to(x.dtype)

    @torch.no_grad()
    def observe(self, x: Tensor, percentile: float | None = None) -> None:
        """Take max|x| of one calibration batch, or that percentile of |x| by rank, into the running mean."""
        refuse_unusable(x, "the calibration input")
        peak = _peak(widen(x))
        if percentile is not None:
            size = widen(x).abs().flatten()
            peak = value_of_rank(size, max(1, math.ceil(percentile / 100 * size.numel())))
        peak = peak.double()
        self._seen = peak if self._seen is None else self._seen - (1 - self.decay) * (self._seen - peak)

    @torch.no_grad()
    def finish_calibration_(self) -> None:
        if self.dynamic:
            self.peak.fill_(0.0)
        elif self._seen is None:
            raise RuntimeError("expected at least one calibration batch, found none; call observe(x) first")
        else:
            self.peak.copy_(self._seen)
        self.active = True
        self.stop_observing_()

    def _input_levels(self) -> InputQuantization:
        if self.dynamic:
            return InputQuantization("dynamic", self.bits, None, 0, -self.m, self.m)
        scale = float(no_zero_scale(self.peak.float() / self.m))
        return InputQuantization("static", self.bits, scale, 0, -self.m, self.m)

    def _forget(self) -> None:
        self._seen = None

    def _calibrated(self) -> bool:
        return bool(self.peak >= 0)


def _peak(x: Tensor) -> Tensor:
    low, high = x.detach().aminmax()
    return torch.maximum(-low, high)
