"""Quantized attention maps as the native kernels take them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ...attention_map import AttentionMapCompressor
from ...quantizers import Quantizer
from ..levels import Levels, MapLevels


class MapReader:
    """The levels of one compressor, read again only where a value of its quantizers has changed."""

    def __init__(self) -> None:
        self._compressor: AttentionMapCompressor | None = None
        self._tensors: tuple[Tensor, ...] = ()
        self._values: tuple[float, ...] = ()
        self._levels: MapLevels | None = None

    def read(self, compressor: nn.Module) -> MapLevels | None:
        """None where the map keeps N of M keys, or a factor is not quantized by static levels of at most 8 bits."""
        if type(compressor) is not AttentionMapCompressor or compressor.active or compressor.training:
            return None
        factors = (compressor.q, compressor.k, compressor.p, compressor.v)
        if not all(isinstance(factor, Quantizer) and factor.active and not factor.observing for factor in factors):
            return None
        if any(factor._forward_hooks or factor._forward_pre_hooks for factor in factors if factor is not None):
            return None
        if compressor is not self._compressor:
            self._compressor, self._values = compressor, ()
            self._tensors = (*compressor.parameters(), *compressor.buffers())
        if any(tensor.numel() != 1 for tensor in self._tensors):
            return None
        values = tuple(float(tensor) for tensor in self._tensors)
        if values != self._values:
            self._values, self._levels = values, _levels(cast(tuple[Quantizer, ...], factors))
        return self._levels


def _levels(factors: tuple[Quantizer, ...]) -> MapLevels | None:
    exported = [factor.export() for factor in factors]
    if any(found.kind != "static" or found.bits > 8 for found in exported):
        return None
    none = torch.zeros(0)
    return MapLevels(*(Levels.of(found, none) for found in exported))
