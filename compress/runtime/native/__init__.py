"""Native kernels for x86 CPUs with AVX-512 VNNI: int8 GEMM, attention, layer norm, whole encoder blocks.

C++ behind a plain C interface, compiled on first use (``build.py``); where that fails nothing else does: the runtime
then computes the same with PyTorch's operators.
"""

from __future__ import annotations

from .kernels import attention, available, has_bfloat16, layer_norm, quantize, say_if_unavailable
from .matrix import DENSE_SPAN, NativeGemm, supported

__all__ = [
    "DENSE_SPAN",
    "NativeGemm",
    "attention",
    "available",
    "has_bfloat16",
    "layer_norm",
    "quantize",
    "say_if_unavailable",
    "supported",
]
