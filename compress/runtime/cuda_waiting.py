"""Levels that wait at the tensor they belong to: a LayerNorm writes them beside its output, the GEMM that reads the
output finds them. Who reads whom is learned at the first call, so no architecture has to be known.

Only in eager mode (CUDA graphs included: the calls before the capture have taught it); ``torch.compile`` joins
LayerNorm and rounding itself. Legend: T rows, D width.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .nonfinite import NonFinite
from .triton_quantize import Int8Levels, layer_norm

_WAITING = "squeezoo_levels"  # attribute of a tensor: (levels, version, int8 [T, D]), or the norm that made it


def waiting_levels(x: Tensor, levels: Int8Levels | None) -> Tensor | None:
    """The int8 levels [T, D] of ``x`` that wait for it, or None; then the norm that made ``x`` will make them next
    time."""
    if levels is None or torch.compiler.is_compiling():
        return None
    found: Any = getattr(x, _WAITING, None)
    if isinstance(found, LevelsNorm):
        if found.levels is None:
            found.levels = levels
        return None
    if found is not None and found[0] == levels and found[1] == _version(x):
        return found[2]
    return None


class LevelsNorm(nn.Module):
    """In the place of an ``nn.LayerNorm`` over the last dimension, for inference: the same parameters and, once a GEMM
    has read its output, that GEMM's levels beside it. Called with two tensors it adds them first.

    ``seen`` remembers NaN and infinity among the levels.
    """

    def __init__(self, norm: nn.LayerNorm, seen: NonFinite | None = None) -> None:
        super().__init__()
        self.seen = seen
        self.normalized_shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.levels: Int8Levels | None = None
        self.training = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if torch.compiler.is_compiling() or not x.numel() or (torch.is_grad_enabled() and x.requires_grad):
            x = x if residual is None else x + residual
            return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        width = self.normalized_shape[-1]
        x_TD = x.reshape(-1, width)
        residual_TD = None if residual is None else residual.expand_as(x).reshape(-1, width)
        y_TD, level_TD = layer_norm(x_TD, residual_TD, self.weight, self.bias, self.eps, self.levels, self.seen)
        y = y_TD.view(x.shape)
        setattr(y, _WAITING, self if level_TD is None else (self.levels, _version(y), level_TD))
        return y

    def extra_repr(self) -> str:
        return f"{tuple(self.normalized_shape)}, eps={self.eps}, levels={self.levels}"


class ResidualNorm(nn.Module):
    """In the place of BERT's ``BertSelfOutput`` and ``BertOutput``: dense, then LayerNorm of the sum with the residual,
    in one kernel. Names of the children stay."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.dense, self.dropout, self.LayerNorm = module.dense, module.dropout, module.LayerNorm
        self.training = False

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        norm: Any = self.LayerNorm
        dense: Any = self.dense
        y: Tensor = norm(dense(hidden_states), input_tensor)
        return y


_TIMM_NORM = ("timm.layers.norm", "LayerNorm")  # computes what its base class does
# Modules whose forward is LayerNorm(dropout(dense(hidden_states)) + input_tensor), exact classes only.
_RESIDUAL_NORMS = {
    ("transformers.models.bert.modeling_bert", name) for name in ("BertSelfOutput", "BertOutput")
} | {("transformers.models.roberta.modeling_roberta", name) for name in ("RobertaSelfOutput", "RobertaOutput")
}  # fmt: skip


def use_levels_norms_(model: nn.Module, seen: NonFinite | None = None) -> int:
    """Replace every LayerNorm over one dimension, exact class only, and join it with the residual where the module
    around it is known; returns how many. Modules with hooks are left alone."""
    count = 0
    for name, module in list(model.named_modules()):
        if _is_norm(module) and not _hooked(module):
            _replace_(model, name, LevelsNorm(module, seen))
            count += 1
    for name, module in list(model.named_modules()):
        key = (type(module).__module__, type(module).__qualname__)
        if (
            key in _RESIDUAL_NORMS
            and isinstance(getattr(module, "LayerNorm", None), LevelsNorm)
            and not _hooked(module)
        ):
            _replace_(model, name, ResidualNorm(module))
    return count


def _is_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    known = type(module) is nn.LayerNorm or (type(module).__module__, type(module).__qualname__) == _TIMM_NORM
    return known and isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _replace_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
