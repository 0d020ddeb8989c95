"""The units of a model: what the selection can choose a kernel for, on the CPU and on a GPU.

GPU modules offer theirs (``units()``); the int8 modules of the CPU are wrapped here. Legend: T rows, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .choice import Choice, Unit, Workload
from .int8_gemm import Int8Gemm, Kernel
from .int8_linear import Int8Linear, Int8Slice
from .native.block import FusedForward

BLOCK_LENGTH = 384  # tokens of a sequence at which blocks are compared; shorter ones are one sequence


@dataclass(frozen=True)
class Named:
    """A unit and the modules that it stands for."""

    names: tuple[str, ...]
    unit: Unit


class Int8Unit:
    """One int8 matrix of the CPU, or both of an FFN: the first hands levels over in the form that the second's kernel
    reads, so they share one choice."""

    def __init__(self, *gemms: Int8Gemm) -> None:
        self.gemms = gemms

    @property
    def choose(self) -> Callable[[int], str]:
        return self.gemms[0].kernel_for

    @choose.setter
    def choose(self, choice: Callable[[int], str]) -> None:
        if not isinstance(choice, Choice):
            raise TypeError(f"expected a Choice, which can be copied with the model, found {choice!r}")
        for gemm in self.gemms:
            gemm.kernels = cast("tuple[tuple[int, Kernel], ...]", choice.segments)

    def kernels(self) -> tuple[str, ...]:
        """Those that every matrix can run."""
        first, *others = (gemm.candidates() for gemm in self.gemms)
        return tuple(kernel for kernel in first if all(kernel in other for other in others))

    def workload(self) -> Workload:
        """``linear`` or ``ffn``."""
        first = self.gemms[0]
        flags: list[str] = [first.input.kind, *([first.activation] if first.activation else [])]
        flags += ["bias"] if first.bias_O is not None else []
        flags += ["asymmetric"] if first.input.qmin >= 0 else []
        flags += ["sparse"] if all(gemm.skips_zeros() for gemm in self.gemms) else []
        if len(self.gemms) == 2:
            return Workload("ffn", (first.in_features, first.out_features), tuple(flags))
        return Workload("linear", (first.out_features, first.in_features), tuple(flags))

    def example(self, rows: int) -> tuple[Tensor, ...]:
        """Float32 [T, I] that spans the levels."""
        first = self.gemms[0]
        span = 1.0 if first.input.scale is None else first.input.scale * max(-first.input.qmin, first.input.qmax) / 3
        return (torch.randn(rows, first.in_features, generator=torch.Generator().manual_seed(rows)) * span,)

    def run(self, kernel: str, *inputs: Tensor) -> Tensor:
        """One call of all matrices."""
        (x,) = inputs
        for gemm in self.gemms:
            x = gemm.run_with(cast(Kernel, kernel), x)
        return x

    def prepare_(self, kernels: Collection[str]) -> None:
        """Layouts are made at a kernel's first call: what the measurement made is dropped."""
        for gemm in self.gemms:
            gemm.keep_(kernels)


class BlockUnit:
    """A whole encoder block: one native call (``block``), or its modules, each with its own choice (``modules``)."""

    def __init__(self, forward: FusedForward) -> None:
        self.forward = forward

    @property
    def choose(self) -> Callable[[int], str]:
        return self.forward.kernel_for

    @choose.setter
    def choose(self, choice: Callable[[int], str]) -> None:
        if not isinstance(choice, Choice):
            raise TypeError(f"expected a Choice, which can be copied with the model, found {choice!r}")
        self.forward.kernels = choice.segments

    def kernels(self) -> tuple[str, ...]:
        return ("block", "modules")

    def workload(self) -> Workload:
        qkv, _, up, _ = self.forward.gemms
        kinds = {
            up.activation or "": up.activation is not None,
            "norm_first": self.forward.norm_first,
            "sparse": all(gemm.skips_zeros() for gemm in self.forward.gemms),
            "float32_attention": not self.forward.bfloat16,
            "int8_attention": self.forward.map_levels() is not None,
        }
        flags = tuple(flag for flag, there in kinds.items() if there)
        return Workload("block", (qkv.in_features, up.out_features, self.forward.heads), flags)

    def example(self, rows: int) -> tuple[Tensor, ...]:
        """Float32 [B, L, I] of about so many rows: one sequence, or several of `BLOCK_LENGTH`."""
        batch = max(1, rows // BLOCK_LENGTH)
        shape = (batch, rows // batch, self.forward.gemms[0].in_features)
        return (torch.randn(shape, generator=torch.Generator().manual_seed(rows)),)

    def run(self, kernel: str, *inputs: Tensor) -> Any:
        (x_BLI,) = inputs
        return self.forward.fused(x_BLI, None) if kernel == "block" else self.forward.own((x_BLI,), {})

    def prepare_(self, kernels: Collection[str]) -> None:
        """The block reads the layouts of its matrices, which are kept with them."""


def units_of(model: nn.Module) -> Iterator[Named]:
    """Every unit of ``model``, in its order; blocks come before the matrices inside them.

    Matrices of an FFN that hand levels over, but whose partner is not found, are left with the built-in rule.
    """
    waiting: tuple[str, Int8Gemm] | None = None
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, FusedForward):
            yield Named((name,), BlockUnit(forward))
        if isinstance(module, Int8Slice):
            if module.index == 0:
                yield Named((name,), Int8Unit(module.shared.gemm))
        elif isinstance(module, Int8Linear):
            gemm = module.gemm
            if gemm.next_input is not None:
                waiting = (name, gemm)
            elif not gemm.takes_levels:
                yield Named((name,), Int8Unit(gemm))
            elif waiting is not None and waiting[1].out_features == gemm.in_features:
                yield Named((waiting[0], name), Int8Unit(waiting[1], gemm))
                waiting = None
        elif callable(getattr(module, "units", None)):
            for unit in cast(Any, module).units():
                yield Named((name,), unit)
