"""fairseq's door: with ``skip_embed_dim_check`` its ``MultiheadAttention`` takes the explicit path, on which the
outputs of ``q_proj``, ``k_proj`` and ``v_proj`` are Q, K and V and ``dropout_module`` receives the softmax's output.

The selection sees the probabilities, not the scores; the attention weights that fairseq returns are those before it.
Checked against fairseq 0.12.3's source.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .attention_hooks import (
    AttentionDoorError,
    Door,
    QuantizeOutput,
    is_class,
    open_probabilities_,
    refuse_missing,
    unhook_,
)
from .attention_map import AttentionMapCompressor

_PARTS = ("q_proj", "k_proj", "v_proj", "dropout_module")


def door_fairseq(module: nn.Module) -> Door | None:
    """The door of fairseq's ``MultiheadAttention``, None for other modules.

    Raises:
        AttentionDoorError: the module lacks the parts that this door needs; when opened: quantizers of K or V beside
            ``add_bias_kv``, whose key and value are not on their path.
    """
    if not is_class(module, "fairseq", "MultiheadAttention"):
        return None
    refuse_missing(module, "fairseq", "skip_embed_dim_check", *_PARTS)
    attention: Any = module
    parts: dict[str, nn.Module] = {name: getattr(module, name) for name in _PARTS}

    def open_(compressor: AttentionMapCompressor) -> None:
        if getattr(module, "bias_k", None) is not None and (compressor.k is not None or compressor.v is not None):
            raise AttentionDoorError(
                "fairseq: this attention appends a learned key and value (add_bias_kv), which the quantizers of K and "
                "V do not see; leave `k` and `v` of the attention rule out"
            )
        compressor.previous["skip_embed_dim_check"] = attention.skip_embed_dim_check
        attention.skip_embed_dim_check = True
        open_probabilities_(parts["dropout_module"], compressor)
        for which in ("q", "k", "v"):
            if getattr(compressor, which) is not None:
                # fairseq scales what q_proj gives in place
                parts[f"{which}_proj"].register_forward_hook(QuantizeOutput(compressor, which, copy=which == "q"))

    def close_(compressor: AttentionMapCompressor) -> None:
        attention.skip_embed_dim_check = compressor.previous.pop("skip_embed_dim_check", attention.skip_embed_dim_check)
        for part in parts.values():
            unhook_(part)

    return Door("fairseq", open_, close_)
