"""What the doors are made of: hooks as objects, so that ``deepcopy`` and pickle lead to the copied compressor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention_map import AttentionMapCompressor


class AttentionDoorError(ValueError):
    """An attention map cannot be reached, or not like this. The model is unchanged."""


@dataclass(frozen=True)
class Door:
    """The way to one attention module's map. ``open_`` lets the map go through a compressor, ``close_`` undoes it.

    ``routed``: the map is reached only after the whole model is switched over (transformers).
    """

    library: str
    open_: Callable[[AttentionMapCompressor], None]
    close_: Callable[[AttentionMapCompressor], None]
    routed: bool = False


class Hook:
    """Base of the hooks that a door hangs into a model; `unhook_` finds them by this class."""

    def __init__(self, compressor: AttentionMapCompressor) -> None:
        self.compressor = compressor


class KeepProbabilities(Hook):
    """Forward pre-hook of the module that applies dropout to the probabilities: softmax, select, dropout."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.compressor.keep(args[0]), *args[1:])


class QuantizeOutput(Hook):
    """Forward hook that quantizes a module's output, or one of ``parts`` equal slices of its last axis.

    Args:
        which: the quantizer, one of q, k, p, v. part: index of the slice.
        copy: give a copy, for callers that change it in place, which must not reach what the quantizer has saved.
    """

    def __init__(
        self, compressor: AttentionMapCompressor, which: str, part: int = 0, parts: int = 1, copy: bool = False
    ) -> None:
        super().__init__(compressor)
        self.which, self.part, self.parts, self.copy = which, part, parts, copy

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        quantizer = getattr(self.compressor, self.which)
        if self.parts == 1:
            quantized = quantizer(output)
            return quantized.clone() if self.copy and quantized is not output else quantized
        slices = list(output.tensor_split(self.parts, dim=-1))
        quantized = quantizer(slices[self.part])
        if quantized is slices[self.part]:
            return output
        slices[self.part] = quantized
        return torch.cat(slices, dim=-1)


def unhook_(module: nn.Module) -> None:
    """Remove every `Hook` from ``module`` itself."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def open_probabilities_(dropout: nn.Module, compressor: AttentionMapCompressor) -> None:
    """Hang selection before and P's quantizer behind the module that applies dropout to the probabilities."""
    dropout.register_forward_pre_hook(KeepProbabilities(compressor))
    if compressor.p is not None:
        dropout.register_forward_hook(QuantizeOutput(compressor, "p"))


def is_class(module: nn.Module, package: str, name: str) -> bool:
    """Whether a module is of class ``name`` of a library, or of a subclass of it, without importing the library."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == package for c in type(module).__mro__)


def missing_attributes(module: nn.Module, *names: str) -> str:
    """The first of ``names`` that ``module`` lacks, or nothing."""
    return next((name for name in names if not hasattr(module, name)), "")


def refuse_missing(module: nn.Module, library: str, *names: str) -> None:
    """Raise when the installed library's attention module has no longer the parts that its door needs."""
    if missing := missing_attributes(module, *names):
        raise AttentionDoorError(
            f"{library}: {type(module).__qualname__} has no {missing!r}, which the door to its attention map needs; "
            f"expected {', '.join(names)}"
        )
