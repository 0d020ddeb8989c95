"""The modules that the CUDA runtime puts into a model, and the FFN pair as one unit of the selection.

Legend: T rows (tokens of the whole batch), I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .choice import Workload
from .cuda_linear import CudaGemm
from .int8_linear import InferenceOnly, SharedInput


class CudaFfn:
    """Both matrices of an FFN with the activation between them, under one choice: with an integer kernel the first
    hands its result over as levels, which only an integer kernel of the second can read."""

    def __init__(self, up: CudaGemm, down: CudaGemm) -> None:
        self.up, self.down = up, down
        self.choose = up.choose if up.kernels()[0] in self.kernels() else down.choose

    @property
    def choose(self) -> Callable[[int], str]:
        return self.up.choose

    @choose.setter
    def choose(self, choose: Callable[[int], str]) -> None:
        self.up.choose = self.down.choose = choose

    def kernels(self) -> tuple[str, ...]:
        """Those that both can run."""
        return tuple(name for name in self.up.kernels() if name in self.down.kernels())

    def workload(self) -> Workload:
        return Workload("ffn", (self.up.in_features, self.up.out_features), self.up.flags())

    def example(self, rows: int) -> tuple[Tensor, ...]:
        return self.up.example(rows)

    def run(self, kernel: str, x: Tensor) -> Tensor:
        return self.down.run(kernel, self.up.run(kernel, x))

    def prepare_(self, kernels: Collection[str]) -> None:
        self.up.prepare_(kernels)
        self.down.prepare_(kernels)


class CudaLinear(InferenceOnly):
    """In the place of one linear: its own GEMM. ``unit``: what is chosen with it, None where another module has it."""

    def __init__(self, gemm: CudaGemm, unit: CudaGemm | CudaFfn | None) -> None:
        super().__init__()
        self.gemm, self.unit = gemm, unit
        self.in_features, self.out_features = gemm.in_features, gemm.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.gemm(x)

    def units(self) -> Iterator[CudaGemm | CudaFfn]:
        if self.unit is not None:
            yield self.unit

    def extra_repr(self) -> str:
        return _described(self.gemm)


class TracedInput(SharedInput):
    """A `SharedInput` that ``torch.compile`` can trace: there the input is held itself, since weak references cannot be
    traced, until the last caller has fetched its result; nothing of it is left in the compiled code."""

    traced: tuple[Tensor, list[Tensor | None]] | None = None

    def take(self, index: int, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().take(index, x)
        if self.traced is None or self.traced[0] is not x or self.traced[1][index] is None:
            self.traced = (x, list(self.gemm(x).split(self.sizes, dim=-1)))
        results = self.traced[1]
        result = results[index]
        assert result is not None
        results[index] = None
        if all(other is None for other in results):
            self.traced = None
        return result


class CudaSlice(InferenceOnly):
    """In the place of one linear of several that read the same tensor: some rows of a common GEMM."""

    def __init__(self, shared: TracedInput, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index
        self.gemm: Any = shared.gemm
        self.in_features, self.out_features = self.gemm.in_features, shared.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.take(self.index, x)

    def units(self) -> Iterator[CudaGemm]:
        if self.index == 0:
            yield self.gemm

    def extra_repr(self) -> str:
        return f"{_described(self.gemm)}, part {self.index + 1} of {len(self.shared.sizes)}"


def _described(gemm: CudaGemm) -> str:
    fused = f", activation={gemm.activation}" if gemm.activation else ""
    return f"in_features={gemm.in_features}, out_features={gemm.out_features}, kernels={gemm.kernels()}{fused}"


def runtime_modules(model: nn.Module) -> Iterator[CudaLinear | CudaSlice]:
    """Every module of this runtime in ``model``."""
    for module in model.modules():
        if isinstance(module, CudaLinear | CudaSlice):
            yield module
