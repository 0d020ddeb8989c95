"""Megatron's door: ``DotProductAttention`` (the local ``core_attention``) is called with Q, K and V, and its
``attention_dropout`` receives the softmax's output.

The selection sees the probabilities, not the scores. Checked against megatron-core 0.16's source.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .attention_hooks import Door, Hook, is_class, open_probabilities_, refuse_missing, unhook_
from .attention_map import AttentionMapCompressor

_ARGUMENTS = {"query": "q", "key": "k", "value": "v"}


class QuantizeQKV(Hook):
    """Forward pre-hook of ``core_attention(query, key, value, ...)``, by position or by name."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values, named = list(args), dict(kwargs)
        for position, (argument, which) in enumerate(_ARGUMENTS.items()):
            quantizer = getattr(self.compressor, which)
            if quantizer is None:
                continue
            if position < len(values):
                values[position] = quantizer(values[position])
            else:
                named[argument] = quantizer(named[argument])
        return tuple(values), named


def door_megatron(module: nn.Module) -> Door | None:
    """The door of megatron-core's ``DotProductAttention``, None for other modules.

    Raises:
        AttentionDoorError: the module lacks the parts that this door needs.
    """
    if not is_class(module, "megatron", "DotProductAttention"):
        return None
    refuse_missing(module, "megatron", "scale_mask_softmax", "attention_dropout")
    dropout = module.attention_dropout
    assert isinstance(dropout, nn.Module)

    def open_(compressor: AttentionMapCompressor) -> None:
        open_probabilities_(dropout, compressor)
        if any(quantizer is not None for quantizer in (compressor.q, compressor.k, compressor.v)):
            module.register_forward_pre_hook(QuantizeQKV(compressor), with_kwargs=True)

    def close_(compressor: AttentionMapCompressor) -> None:
        unhook_(dropout)
        unhook_(module)

    return Door("megatron", open_, close_)
