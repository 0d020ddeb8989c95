"""What a GEMM of the CUDA runtime is made from: a quantized or a float matrix in host memory, and how a model runs.

From it come the kernels that can run it, its numbers in each kernel's format, and its scales and biases on the device.
Legend: I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..masks import Pattern, check_nm
from ..quantizers import InputQuantization
from ..quantizers.rounding import no_zero_scale
from .cuda_ops import Algorithm
from .cuda_support import CUDA_BACKENDS, CudaBackend, cuda_capability, supported, works
from .nonfinite import NonFinite
from .reference import QuantizedGemm
from .triton_quantize import Int8Levels

INT8: tuple[CudaBackend, ...] = ("sparse_int8", "dense_int8")
FP8_MAX = 448.0  # of float8_e4m3fn


@dataclass(frozen=True, eq=False)
class FloatGemm:
    """A weight matrix whose recipe prunes but does not quantize it. weight_OI, bias_O: floating point."""

    name: str
    weight_OI: Tensor = field(repr=False)
    bias_O: Tensor | None = field(default=None, repr=False)

    @property
    def out_features(self) -> int:
        return self.weight_OI.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight_OI.shape[1]


@dataclass(frozen=True)
class CudaOptions:
    """How all GEMMs of one model run.

    Args:
        dtype: of the activations between them. device: ``cuda``, or ``cpu`` for tests: the same arithmetic, slowly.
        dynamic: the range of a dynamic input is that of the whole ``tensor``, as in the reference, or of each ``token``
            (symmetric; finer and in one kernel).
        allow_fp8: offer ``sparse_fp8``. check_finite: refuse NaN and infinity in every input; waits for the device.
        seen: remembers NaN and infinity in inputs without waiting; `use_cuda_` makes it.
        algorithms: found by cuSPARSELt's search, for all GEMMs of one shape. search: look for them.
    """

    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    dynamic: Literal["tensor", "token"] = "tensor"
    allow_fp8: bool = False
    check_finite: bool = False
    seen: NonFinite | None = field(default=None, repr=False, compare=False)
    search: bool = True
    algorithms: dict[tuple[Any, ...], Algorithm] = field(default_factory=dict, repr=False)


def runnable(source: QuantizedGemm | FloatGemm, options: CudaOptions) -> tuple[CudaBackend, ...]:
    """The kernels that can run this matrix on this device, tried by doing, in the order of preference."""
    on_gpu = torch.device(options.device).type == "cuda"
    capability = cuda_capability(options.device) if on_gpu else (9, 0)
    shape, quantized = (source.out_features, source.in_features), isinstance(source, QuantizedGemm)
    two_of_four = check_nm(_weight(source), Pattern(2, 4))
    names: list[CudaBackend] = []
    for name in CUDA_BACKENDS:
        if name == "sparse_fp8" and not options.allow_fp8:
            continue
        runs, _ = supported(name, capability, shape, options.dtype, two_of_four=two_of_four, quantized=quantized)
        if runs and (not on_gpu or name == "dense_half" or works(name, options.dtype, options.device)[0]):
            names.append(name)
    return tuple(names)


def vectors(
    source: QuantizedGemm | FloatGemm, options: CudaOptions, levels: Int8Levels | None, names: Collection[str]
) -> dict[str, Tensor | None]:
    """Scales and biases [O] on the device, float32; ``half_bias`` in the model's dtype, integer sums int32.

    ``step`` = weight scale times static input scale; ``correction`` = what the levels' shift adds to every sum;
    ``whole_bias`` = bias and correction for a kernel that scales its sums itself; ``fp8`` = scales of float8 weights.
    """
    bias_O = None if source.bias_O is None else source.bias_O.detach().float()
    found: dict[str, Tensor | None] = dict.fromkeys(("step", "correction", "scale", "sum", "whole_bias", "fp8"))
    found |= {"bias": bias_O, "half_bias": None if bias_O is None else bias_O.to(options.dtype)}
    if isinstance(source, QuantizedGemm):
        sum_O = source.weight_q_OI.sum(1, dtype=torch.int32)
        found |= {"scale": source.scale_O, "sum": sum_O}
        if levels is not None:
            found["step"] = step_O = source.scale_O * levels.scale
            whole_O = bias_O
            if levels.shift:
                found["correction"] = correction_O = sum_O * -levels.shift
                whole_O = step_O * correction_O + (0.0 if bias_O is None else bias_O)
            found["whole_bias"] = whole_O
    if "sparse_fp8" in names:
        found["fp8"] = _fp8_scale(_dequantized(source))
    return {name: None if x is None else x.to(options.device).contiguous() for name, x in found.items()}


def dense_numbers(source: QuantizedGemm | FloatGemm, backend: CudaBackend, dtype: torch.dtype) -> Tensor:
    """The dense matrix [O, I] in the number format of a kernel, in host memory."""
    if backend in INT8:
        return _weight(source)
    w_OI = _dequantized(source)
    if backend == "sparse_fp8":
        return (w_OI / _fp8_scale(w_OI)[:, None]).to(torch.float8_e4m3fn)
    return w_OI.to(dtype)


def static_levels(found: InputQuantization | None) -> Int8Levels | None:
    """The levels of a static input, None of any other."""
    if found is None or found.scale is None or found.zero_point is None:
        return None
    return Int8Levels.of(found, found.scale, found.zero_point)


def _fp8_scale(w_OI: Tensor) -> Tensor:
    return no_zero_scale(w_OI.abs().amax(1) / FP8_MAX)


def _weight(source: QuantizedGemm | FloatGemm) -> Tensor:
    return source.weight_q_OI if isinstance(source, QuantizedGemm) else source.weight_OI


def _dequantized(source: QuantizedGemm | FloatGemm) -> Tensor:
    if isinstance(source, QuantizedGemm):
        return source.weight_q_OI.float() * source.scale_O[:, None]
    return source.weight_OI.float() + 0.0  # a pruned -0.0 becomes 0.0: whoever compresses may look at bits
