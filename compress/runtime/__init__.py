"""What executes a compressed model: fast modules for a device, and the slow reference that defines them."""

from __future__ import annotations

from .cpu import Int8Report, int8_supported, use_int8_
from .embedding import Int8Table, use_int8_embeddings_
from .reference import QuantizedGemm, use_quantized_inputs_, use_reference_

__all__ = [
    "Int8Report",
    "Int8Table",
    "QuantizedGemm",
    "int8_supported",
    "use_int8_",
    "use_int8_embeddings_",
    "use_quantized_inputs_",
    "use_reference_",
]  # fmt: skip
