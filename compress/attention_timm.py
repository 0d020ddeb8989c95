"""timm's door: ``Attention`` computes its map explicitly once ``fused_attn`` is off, and ``attn_drop`` receives it.

``q_norm`` and ``k_norm`` end with Q and K; V is the last third of what ``qkv`` gives. The selection sees the
probabilities, not the scores. Checked with timm 1.0.31.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .attention_hooks import Door, QuantizeOutput, is_class, open_probabilities_, refuse_missing, unhook_
from .attention_map import AttentionMapCompressor

_PARTS = ("qkv", "q_norm", "k_norm", "attn_drop")


def door_timm(module: nn.Module) -> Door | None:
    """The door of ``timm.layers.Attention``, None for other modules.

    Raises:
        AttentionDoorError: the module lacks the parts that this door needs.
    """
    if not is_class(module, "timm", "Attention") or not hasattr(module, "qkv"):
        return None
    refuse_missing(module, "timm", "fused_attn", *_PARTS)
    attention: Any = module
    parts: dict[str, nn.Module] = {name: getattr(module, name) for name in _PARTS}

    def open_(compressor: AttentionMapCompressor) -> None:
        compressor.previous["fused_attn"] = attention.fused_attn
        attention.fused_attn = False
        open_probabilities_(parts["attn_drop"], compressor)
        if compressor.q is not None:
            parts["q_norm"].register_forward_hook(QuantizeOutput(compressor, "q"))
        if compressor.k is not None:
            parts["k_norm"].register_forward_hook(QuantizeOutput(compressor, "k"))
        if compressor.v is not None:
            parts["qkv"].register_forward_hook(QuantizeOutput(compressor, "v", part=2, parts=3))

    def close_(compressor: AttentionMapCompressor) -> None:
        attention.fused_attn = compressor.previous.pop("fused_attn", attention.fused_attn)
        for part in parts.values():
            unhook_(part)

    return Door("timm", open_, close_)
