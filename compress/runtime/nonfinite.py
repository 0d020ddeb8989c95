"""NaN and infinity on a GPU: integers cannot carry them, so a model whose input to any integer GEMM held one gives NaN.

Nothing waits for the device. Triton kernels that round to integers leave a mark in one number of the model's device
memory; the plain forms, also those that ``torch.compile`` traces, add up marks by row. The model's results get the mark
added: 0, or NaN for the whole batch, as on the CPU, where the whole call is refused.
Legend: T rows (tokens of the whole batch), I in_features.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class NonFinite:
    """What one model has met since its call began. Two threads that run one model share it: a NaN of one of them may
    then be missed, or reach the other's result too.

    ``mark``: float32 [] on the device, 0 or NaN.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.mark = torch.zeros((), device=device)
        self._marks: list[Tensor] = []  # [T] each
        self._open = False

    def see(self, x_TI: Tensor) -> None:
        """The plain form: remember whether ``x_TI`` is finite, within a call of the model."""
        if not self._open:
            return
        mark_T = (x_TI - x_TI).sum(1, dtype=torch.float32)
        if self._marks and self._marks[-1].shape == mark_T.shape:
            self._marks[-1] = self._marks[-1] + mark_T
        else:
            self._marks.append(mark_T)

    def begin_(self) -> bool:
        """Whether no other call has begun."""
        if self._open:
            return False
        self._marks, self._open = [], True
        if not torch.compiler.is_compiling():
            self.mark.zero_()
        return True

    def end_(self) -> None:
        self._marks, self._open = [], False

    def put_on(self, result: Any) -> Any:
        """``result`` with the mark added to every floating point tensor that it holds directly."""
        # Traced code runs no Triton kernel of ours, and could not set the mark back.
        marks = [mark_T.sum() for mark_T in self._marks] + ([] if torch.compiler.is_compiling() else [self.mark])
        return _marked(result, sum(marks)) if marks else result


def _marked(result: Any, mark: Any) -> Any:
    if isinstance(result, Tensor):
        return result + mark.to(result.dtype) if result.is_floating_point() else result
    if type(result) in (tuple, list):
        return type(result)(_marked(x, mark) if isinstance(x, Tensor) else x for x in result)
    if isinstance(result, Mapping):  # a ModelOutput of transformers among them
        return type(result)(**{name: _marked(x, mark) if isinstance(x, Tensor) else x for name, x in result.items()})
    return result


class MarkedForward:
    """Stands in a module's instance attribute ``forward``: of hooks ``torch.compile`` would make graphs of their own. A
    call inside another marked one is left to that."""

    def __init__(self, module: nn.Module, seen: NonFinite) -> None:
        self.module, self.seen = module, seen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward: Any = type(self.module).forward
        if not self.seen.begin_():
            return forward(self.module, *args, **kwargs)
        try:
            return self.seen.put_on(forward(self.module, *args, **kwargs))
        finally:
            self.seen.end_()

    @property
    def __signature__(self) -> inspect.Signature:
        """The module's own: transformers asks for it."""
        return inspect.signature(type(self.module).forward.__get__(self.module))


def show_nonfinite_(model: nn.Module, seen: NonFinite) -> None:
    """Let the results of ``model`` show what was seen, and those of an encoder that ``generate`` calls by itself."""
    parts = [model]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        parts.append(model.get_encoder())  # type: ignore[operator]
    for part in parts:
        part.__dict__["forward"] = MarkedForward(part, seen)
