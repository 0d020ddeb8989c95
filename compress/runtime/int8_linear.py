"""Linear modules around int8 GEMMs: a matrix of its own, or some rows of one that several modules share.

Legend: T rows (tokens of the whole batch), I in_features, O out_features.
"""

from __future__ import annotations

import weakref
from typing import Any, NoReturn

from torch import Tensor, nn

from .inference_only import REFUSED
from .int8_gemm import Activation, Int8Gemm, Kernel, prefers_plain

__all__ = ["Activation", "Int8Gemm", "Int8Linear", "Int8Slice", "Kernel", "SharedInput", "prefers_plain"]


class SharedInput:
    """Several GEMMs of one input as one: the first caller computes all, the others are handed their rows.

    The results wait in one attribute, together with the tensor they belong to, and leave it when they are fetched, or
    when that tensor dies. Another tensor, an altered one, or another thread in between only means that the GEMM runs
    again: each step takes or replaces the attribute as a whole. (Inference tensors do not record alterations; one that
    is changed in place between two of the callers is taken for the same.)
    """

    def __init__(self, gemm: Int8Gemm, sizes: tuple[int, ...]) -> None:
        self.gemm = gemm
        self.sizes = sizes
        self._waiting: tuple[weakref.ref[Tensor], int, tuple[Tensor | None, ...]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"gemm": self.gemm, "sizes": self.sizes, "_waiting": None}

    def take(self, index: int, x: Tensor) -> Tensor:
        """Result ``index`` for the input ``x``: a view of [..., sum(sizes)]."""
        version = -1 if x.is_inference() else x._version
        waiting = self._waiting
        result = waiting[2][index] if waiting is not None and waiting[0]() is x and waiting[1] == version else None
        if waiting is not None and result is not None:
            owner, results = waiting[0], waiting[2]
        else:
            results = self.gemm(x).split(self.sizes, dim=-1)
            owner, result = weakref.ref(x, self._forget), results[index]
        others = (*results[:index], None, *results[index + 1 :])
        self._waiting = (owner, version, others) if any(other is not None for other in others) else None
        return result

    def _forget(self, owner: weakref.ref[Tensor]) -> None:
        waiting = self._waiting
        if waiting is not None and waiting[0] is owner:
            self._waiting = None


class InferenceOnly(nn.Module):
    """No parameters, no gradients, nothing to save."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> InferenceOnly:
        if mode:
            raise RuntimeError(REFUSED)
        return super().train(False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        raise RuntimeError(
            f"{prefix.rstrip('.')} is an int8 runtime module without parameters, so a state dict of this model would "
            "be incomplete: keep the checkpoint that it was loaded from, or save the model before use_int8_"
        )


class Int8Linear(InferenceOnly):
    """In the place of one linear: its own GEMM."""

    def __init__(self, gemm: Int8Gemm) -> None:
        super().__init__()
        self.gemm = gemm
        self.in_features, self.out_features = gemm.in_features, gemm.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.gemm(x)

    def extra_repr(self) -> str:
        fused = f", activation={self.gemm.activation}" if self.gemm.activation else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{fused}"


class Int8Slice(InferenceOnly):
    """In the place of one linear of several that read the same tensor: some rows of a common GEMM."""

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self.shared = shared
        self.index = index
        self.in_features, self.out_features = shared.gemm.in_features, shared.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.take(self.index, x)

    def extra_repr(self) -> str:
        part = f"part {self.index + 1} of {len(self.shared.sizes)}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {part}"
