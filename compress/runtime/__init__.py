"""What executes a compressed model: fast modules for a device, and the slow reference that defines them."""

from __future__ import annotations

from .cpu import Int8Report, int8_supported, use_int8_
from .reference import QuantizedGemm, use_input_scales_, use_reference_

__all__ = ["Int8Report", "QuantizedGemm", "int8_supported", "use_input_scales_", "use_int8_", "use_reference_"]
