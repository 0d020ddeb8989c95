"""One weight matrix on a GPU, ready to multiply by any of its kernels.

    y_TO = act(s_x * s_O * ((levels_TI + z) @ q_OI^T) + b_O)

Kernels, by name (``cuda_support.CUDA_BACKENDS``): ``sparse_int8`` and ``sparse_half`` read the 2:4 form through
cuSPARSELt, ``dense_int8`` and ``dense_half`` the whole matrix, ``sparse_fp8`` rounds weight and input anew to float8
and is offered on request only. The integer ones compute exact sums of the reference's levels. ``*_half`` multiply the
dequantized weight in the model's dtype (16 bit; ``dense_half`` also float32) with inputs rounded to their static
levels, since a model trained with them relies on their ends; a dynamic range ends at its input, and is not rounded.

Legend: T rows (tokens of the whole batch), I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from ..quantizers import InputQuantization, affine_step
from ..quantizers.rounding import no_zero_scale
from .choice import EVER, Choice, Workload
from .cuda_layout import Layout, built
from .cuda_ops import DEFAULT_ALGORITHM, Algorithm, multiply, search, searched_rows, sparse_mm_operator
from .cuda_source import FP8_MAX, INT8, CudaOptions, FloatGemm, dense_numbers, runnable, static_levels, vectors
from .cuda_support import CudaBackend, check_finite, fused_scales
from .cuda_waiting import waiting_levels
from .int8_gemm import Activation
from .reference import QuantizedGemm
from .triton_quantize import activated, finish, quantize, quantize_rows, rounded


class CudaGemm:
    """One weight matrix on a device. The neutral form stays in host memory; layouts are made by ``prepare_``, or when
    first used, which neither ``torch.compile`` nor the capture of a CUDA graph can do.

    Args:
        source: the matrix, in host memory.
        activation: applied to the result.
        next_input: static levels that integer kernels emit, for the next GEMM, instead of ``options.dtype``.
        takes_levels: int8 inputs are levels of its own input.
    """

    choose: Callable[[int], str]

    def __init__(
        self,
        source: QuantizedGemm | FloatGemm,
        options: CudaOptions,
        *,
        activation: Activation | None = None,
        next_input: InputQuantization | None = None,
        takes_levels: bool = False,
    ) -> None:
        self.source, self.options = source, options
        self.name, self.out_features, self.in_features = source.name, source.out_features, source.in_features
        self.activation, self.takes_levels = activation, takes_levels
        self.input = source.input if isinstance(source, QuantizedGemm) else None
        self.levels = static_levels(self.input)
        self.emitted = static_levels(next_input)
        self._layouts: dict[str, Layout] = {}
        self._names = runnable(source, options)
        self._fused = (False, False)
        if self.sparse:
            sparse_mm_operator()
            if "sparse_int8" in self._names and options.dtype != torch.float32:
                self._fused = fused_scales(options.dtype, options.device)
        self._vectors = vectors(source, options, self.levels, self._names)
        self.choose = Choice(((EVER, self._names[0]),))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.sparse:
            sparse_mm_operator()

    @property
    def sparse(self) -> bool:
        return any(name.startswith("sparse") for name in self._names)

    # -- what the selection asks

    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that can run this matrix here, the preferred one first."""
        return self._names

    def workload(self) -> Workload:
        return Workload("linear", (self.out_features, self.in_features), self.flags())

    def flags(self) -> tuple[str, ...]:
        """What beside the sizes decides how fast it is."""
        found = [str(self.options.dtype).removeprefix("torch."), *([self.activation] if self.activation else [])]
        if self.input is not None:
            found.append(self.input.kind if self.input.kind == "static" else f"dynamic_{self.options.dynamic}")
        conditions = {
            "bias": self.source.bias_O is not None,
            "two_of_four": self.sparse,
            "zero_point": self._vectors["correction"] is not None,
            "emits": self.emitted is not None,
            "takes": self.takes_levels,
        }
        return (*found, *(name for name, holds in conditions.items() if holds))

    def example(self, rows: int) -> tuple[Tensor, ...]:
        """A random input of ``rows`` rows, on the device; where static levels are known, it spans them."""
        span = 1.0 if self.levels is None else self.levels.scale * max(-self.levels.low, self.levels.high) / 3
        x_TI = torch.randn(rows, self.in_features, device=self.options.device) * span
        return (x_TI.to(self.options.dtype),)

    def prepare_(self, kernels: Collection[str]) -> None:
        """Build the layouts of these kernels and drop all others."""
        self._layouts = {name: self._layout(cast(CudaBackend, name)) for name in kernels}

    def units(self) -> Iterator[CudaGemm]:
        yield self

    # -- computing

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O] by the kernel of ``choose``; see `run`."""
        return self.run(self.choose(x.numel() // self.in_features), x)

    def run(self, kernel: str, x: Tensor) -> Tensor:
        """[..., I] → [..., O] in ``options.dtype``, or int8 where an integer kernel emits levels.

        Raises:
            ValueError: another last dimension, or (with ``check_finite``) NaN or infinity.
            TypeError: ``x`` is neither floating point nor levels that this GEMM takes.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"{self.name}: expected an input of {self.in_features} features, found the shape {list(x.shape)}"
            )
        x_TI = x if x.ndim == 2 else x.reshape(-1, self.in_features)
        if x.dtype == torch.int8:
            if not self.takes_levels or kernel not in INT8:
                raise TypeError(f"{self.name}: expected a floating point input, found int8")
        elif not x.is_floating_point():
            raise TypeError(f"{self.name}: expected a floating point input, found {str(x.dtype)[6:]}")
        elif self.options.check_finite:
            check_finite(x_TI, f"input of {self.name}")
        backend = cast(CudaBackend, kernel)
        if not x_TI.shape[0]:
            y_TO = x_TI.new_zeros((0, self.out_features), dtype=self._result_dtype(backend))
        elif backend in INT8:
            y_TO = self._int8(backend, x_TI, waiting_levels(x, self.levels))
        elif backend == "sparse_fp8":
            y_TO = self._fp8(x_TI)
        else:
            y_TO = self._half(backend, x_TI)
        return y_TO if x.ndim == 2 else y_TO.reshape(*x.shape[:-1], self.out_features)

    def _int8(self, backend: CudaBackend, x_TI: Tensor, waiting_TI: Tensor | None) -> Tensor:
        step_O, correction_O, row_T = self._vectors["step"], self._vectors["correction"], None
        if x_TI.dtype == torch.int8:
            level_TI = x_TI
        elif self.levels is None and self.options.dynamic == "token":
            assert self.input is not None
            level_TI, row_T = quantize_rows(x_TI, (1 << (self.input.bits - 1)) - 1)
            step_O, correction_O = self._vectors["scale"], None
        elif self.levels is None:
            level_TI, step_O, correction_O = self._by_range(x_TI)
        elif waiting_TI is not None:
            level_TI = waiting_TI
        else:
            level_TI = quantize(x_TI, self.levels, self.options.seen)
        layout, dtype, bias_O = self._layout(backend), self.options.dtype, self._vectors["bias"]
        seen = self.options.seen
        scaled, biased = self._fused
        if backend == "sparse_int8" and self.levels is not None and scaled and (biased or correction_O is None):
            inside_O = self._vectors["whole_bias"] if biased else None
            algorithm = self._algorithm(layout, level_TI, step_O, inside_O, dtype)
            y_TO = multiply(layout, level_TI, step_O, inside_O, out_dtype=dtype, algorithm=algorithm)
            outside_O = None if biased else bias_O
            if outside_O is None and self.activation is None and self.emitted is None:
                return y_TO
            return finish(y_TO, bias_O=outside_O, activation=self.activation, emit=self.emitted, dtype=dtype, seen=seen)
        algorithm = self._algorithm(layout, level_TI, None, None, torch.int32)
        sum_TO = multiply(layout, level_TI, out_dtype=torch.int32, algorithm=algorithm)
        return finish(
            sum_TO, step_O=step_O, row_T=row_T, correction_O=correction_O, bias_O=bias_O, activation=self.activation,
            emit=self.emitted, dtype=dtype, seen=seen,
        )  # fmt: skip

    def _by_range(self, x_TI: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Levels by the range of the whole input, scales and zero-point correction, without waiting for the device."""
        assert self.input is not None
        assert self._vectors["scale"] is not None
        assert self._vectors["sum"] is not None
        wide_TI = x_TI.float()
        low, high = wide_TI.aminmax()
        low, high = low + (high - high), high + (low - low)  # NaN where one is not finite: then all scales are
        if self.input.qmin < 0:
            scale = no_zero_scale(torch.maximum(-low, high) / self.input.qmax)
            level_TI = (wide_TI / scale).round().clamp(self.input.qmin, self.input.qmax)
            return level_TI.to(torch.int8), self._vectors["scale"] * scale, None
        scale, z = affine_step(low, high, self.input.bits)
        sign = 128 if self.input.qmax > 127 else 0
        level_TI = ((wide_TI / scale).round() - z).clamp(0, self.input.qmax) - sign
        correction_O = self._vectors["sum"] * (z + sign).to(torch.int32)
        return level_TI.to(torch.int8), self._vectors["scale"] * scale, correction_O

    def _half(self, backend: CudaBackend, x_TI: Tensor) -> Tensor:
        dtype = self.options.dtype
        x_TI = x_TI.to(dtype) if self.levels is None else rounded(x_TI, self.levels, dtype)
        layout, bias_O = self._layout(backend), self._vectors["half_bias"]
        algorithm = self._algorithm(layout, x_TI, None, bias_O, dtype)
        y_TO = multiply(layout, x_TI, None, bias_O, out_dtype=dtype, algorithm=algorithm)
        return activated(y_TO, self.activation)

    def _fp8(self, x_TI: Tensor) -> Tensor:
        layout, scale_O = self._layout("sparse_fp8"), self._vectors["fp8"]
        assert scale_O is not None
        if self.levels is None:
            scale = no_zero_scale(x_TI.abs().amax().float() / FP8_MAX)
        else:
            largest = self.levels.scale * max(-self.levels.low, self.levels.high)
            scale = scale_O.new_full((), largest / FP8_MAX)
        wide_TI = x_TI.float()
        x8_TI = ((wide_TI / scale).clamp(-FP8_MAX, FP8_MAX) + (wide_TI - wide_TI)).to(torch.float8_e4m3fn)
        algorithm = self._algorithm(layout, x8_TI, None, None, torch.float32)
        y_TO = multiply(layout, x8_TI, out_dtype=torch.float32, algorithm=algorithm)
        return finish(
            y_TO, step_O=scale_O * scale, bias_O=self._vectors["bias"], activation=self.activation,
            dtype=self.options.dtype,
        )  # fmt: skip

    def _algorithm(
        self, layout: Layout, x_TI: Tensor, alpha_O: Tensor | None, bias_O: Tensor | None, out_dtype: torch.dtype
    ) -> Algorithm:
        """cuSPARSELt's algorithm for about so many rows, searched at the first call that may wait for the device."""
        if not layout.backend.startswith("sparse") or not self.options.search or not x_TI.is_cuda:
            return DEFAULT_ALGORITHM
        rows = searched_rows(x_TI.shape[0], layout.backend)
        key = (layout.backend, self.out_features, self.in_features, rows, out_dtype, alpha_O is None, bias_O is None)
        found = self.options.algorithms.get(key)
        if found is not None or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return found or DEFAULT_ALGORITHM
        times = -(-rows // x_TI.shape[0])
        example_TI = x_TI.contiguous().view(torch.int8).repeat(times, 1)[:rows].view(x_TI.dtype)
        found = search(layout, example_TI, alpha_O, bias_O, out_dtype=out_dtype)
        self.options.algorithms[key] = found
        return found

    # -- preparing

    def _layout(self, backend: CudaBackend) -> Layout:
        layout = self._layouts.get(backend)
        if layout is None:
            if backend not in self._names:
                raise ValueError(f"{self.name}: {backend!r} cannot run here; expected one of {', '.join(self._names)}")
            numbers_OI = dense_numbers(self.source, backend, self.options.dtype)
            layout = self._layouts[backend] = built(backend, numbers_OI, self.options.device)
        return layout

    def _result_dtype(self, backend: CudaBackend) -> torch.dtype:
        return torch.int8 if backend in INT8 and self.emitted is not None else self.options.dtype
