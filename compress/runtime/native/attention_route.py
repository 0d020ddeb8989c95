"""The native attention as an implementation of transformers' AttentionInterface, for models that run block parts one by
one: decoders, and encoders that are not fused.

Legend: B batch, H heads, G key heads, Q queries, K keys, D head dimension.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import attention, available, has_bfloat16

NATIVE_ATTENTION = "squeezoo_native"
# With fewer queries laying out K and V takes longer than the products: a token after a prompt stays PyTorch's.
_FEWEST_QUERIES = 16
# Arguments that change the map in ways that the kernel does not know.
_UNKNOWN = ("softcap", "s_aux", "sinks", "indices", "block_indices", "cache", "position_bias")


def route_attention_(model: nn.Module) -> bool:
    """Let a transformers model attend by the native kernel in bfloat16; whether it does.

    It must attend by PyTorch's ``scaled_dot_product_attention`` so far, and this CPU multiply bfloat16 numbers.
    """
    if "transformers.modeling_utils" not in sys.modules or not available()[0] or not has_bfloat16():
        return False
    from transformers.modeling_utils import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        return False
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if any(module.config._attn_implementation != "sdpa" for module in inner):
        return False
    register_attention()
    model.set_attn_implementation(NATIVE_ATTENTION)
    return True


def register_attention() -> None:
    """Make the name known to transformers in this process, where it is loaded."""
    if "transformers.modeling_utils" not in sys.modules:
        return
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NATIVE_ATTENTION, _attention)
    AttentionMaskInterface.register(NATIVE_ATTENTION, sdpa_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' attention modules call: [B, H, Q, D], [B, G, K, D] -> [B, Q, H, D], and no probabilities."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and queries > 1
    plain = not dropout and all(kwargs.get(name) is None for name in _UNKNOWN)
    if (
        torch.compiler.is_compiling() or not plain or queries < _FEWEST_QUERIES or (causal and queries != keys)
        or not all(map(_fits, (query, key, value))) or not _masks(attention_mask, keys)
    ):  # fmt: skip
        return _pytorch(module, query, key, value, attention_mask, scaling, dropout, is_causal, **kwargs)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = attention(q, k, v, attention_mask, scaling, causal, bfloat16=True)
    return out.view(batch, queries, heads, -1), None


def _fits(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_cpu and x.stride(-1) == 1 and x.numel() > 0 and not x.requires_grad


def _masks(mask: Tensor | None, keys: int) -> bool:
    """Whether the kernel reads such a mask."""
    return mask is None or (mask.dtype in (torch.bool, torch.float32) and mask.ndim == 4 and mask.shape[-1] == keys)


def _pytorch(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module, query, key, value, mask, scaling, dropout, is_causal = args
    found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return found
