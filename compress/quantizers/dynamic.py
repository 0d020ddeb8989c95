"""Dynamic quantization: the input's range is taken from each call (PyTorch's ``quantize_dynamic``; Antunes 2021, 4.5).

Its weights are `AbsmaxQuantizer`s per tensor with ``scale = max|w| / 127.5`` and levels -128..127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import InputQuantization, Quantizer
from .minmax import minmax_fake_quantize
from .rounding import widen


class DynamicQuantizer(Quantizer):
    """uint8 input, asymmetric: step = (hi - lo) / 255 of this input, 0 included. Needs no calibration data."""

    calibrated: Tensor

    def __init__(self, bits: int = 8) -> None:
        if bits != 8:
            raise ValueError(f"dynamic quantization has 8 bits, found {bits!r}")
        super().__init__(bits)
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))

    def fake_quantize(self, x: Tensor, update: bool = True) -> Tensor:
        if not x.numel():
            return x
        wide = widen(x)
        return minmax_fake_quantize(wide, *wide.detach().aminmax(), self.bits).to(x.dtype)

    def observe(self, x: Tensor, percentile: float | None = None) -> None:
        """Nothing to learn from data."""

    def finish_calibration_(self) -> None:
        self.calibrated.fill_(True)
        self.active = True
        self.stop_observing_()

    def _input_levels(self) -> InputQuantization:
        return InputQuantization("dynamic", self.bits, None, None, 0, 255)

    def _calibrated(self) -> bool:
        return bool(self.calibrated)
