"""N:M attention maps (GPUSQ-TLM's GEMM-MHA; Yu et al., ACL Findings 2023, section 3.1): one function for all libraries.

    A_h = sp_{N:M}[ softmax(Q K^T scale + mask) ] V

N of M consecutive keys are kept in each row of each head, chosen anew in every forward pass on the scores; the kept
probabilities keep the denominator of the full row. Inputs of both products may be quantized (Deep Compression of
Pre-trained Transformers, section 2.2). Legend: B batch, H heads, G groups of heads that share keys, Q queries, K keys,
D head dimension, E value dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention_core import MapOptions, attend, keep_largest
from .masks import Pattern

Quantizer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AttentionQuantizers:
    """Quantizers of the inputs of both products: Q and K of the scores, P and V of the output; None: as it is.

    That of P must map 0 to exactly 0, so that what was not kept stays out.
    """

    q: Quantizer | None = None
    k: Quantizer | None = None
    p: Quantizer | None = None
    v: Quantizer | None = None


@torch.compiler.disable
def sparse_attention(
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    *,
    pattern: Pattern | None,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    renormalize: bool = False,
    quantizers: AttentionQuantizers | None = None,
    first_key: int = 0,
    need_probs: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention whose map keeps N of each M consecutive keys, in each row of each head.

    Order: quantize Q and K, scores, softmax, keep N of M, dropout, quantize P and V, product. The selection is made on
    float32 scores (float64 in float64); among equal scores the lower key is kept. Invalid keys are never kept: a group
    with v valid keys keeps min(N, v). A row without a valid key gives output 0 and gradient 0. Everything is
    differentiable, the probabilities and an additive mask included. Under ``torch.compile`` it breaks the graph.

    Args:
        q_BHQD, k_BGKD, v_BGKE: queries, keys, values; H a multiple of G (grouped-query attention).
        pattern: N:M, or None to keep every key.
        mask: broadcastable to [B, H, Q, K]. Bool: True = valid. Float: added to the scores before the selection
            (relative positions, ALiBi); at or below half of its dtype's minimum a key is invalid.
        scale: of the scores; None: 1 / sqrt(D).
        dropout_p: of the probabilities, after the selection, when ``training``.
        renormalize: divide the kept probabilities by their sum.
        first_key: absolute index of key 0, for a cache that has dropped its oldest keys: groups are aligned at absolute
            index 0, so they do not move.
        need_probs: return the probabilities too.

    Returns:
        The output [B, H, Q, E] in the dtype of the values (under autocast: its dtype), and the probabilities that
        multiplied V [B, H, Q, K] in the same dtype, selected, after dropout and quantization; or None.

    Raises:
        ValueError: shapes that do not fit, or NaN in a score (on a GPU, which would have to be waited for: NaN in the
            output of its row).
    """
    quantizers = quantizers or AttentionQuantizers()
    _check(q_BHQD, k_BGKD, v_BGKE, mask)
    q, k, v = _cast_for_autocast(q_BHQD, k_BGKD, v_BGKE)
    q, k, v = (x if f is None else f(x) for x, f in ((q, quantizers.q), (k, quantizers.k), (v, quantizers.v)))
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    dropout_p = dropout_p if training else 0.0
    options = MapOptions(
        pattern=pattern,
        renormalize=renormalize,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        dropout_p=dropout_p if quantizers.p is None else 0.0,
        first_key=first_key,
        probs_dtype=v.dtype if need_probs else None,
    )
    mask_BHQK = None if mask is None else _additive(mask)
    if quantizers.p is None:
        out, probs = attend(q, k, v, mask_BHQK, options)
        assert out is not None
        return out, probs
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    _, probs = attend(q, k, None, mask_BHQK, MapOptions(**{**vars(options), "probs_dtype": wide}))
    assert probs is not None
    probs = quantizers.p(F.dropout(probs, dropout_p)).to(v.dtype)
    return probs @ v, probs if need_probs else None


def keep_probabilities(p: Tensor, pattern: Pattern, renormalize: bool = False) -> Tensor:
    """The N largest of each group of M along the last axis of a softmax's output, the rest 0; differentiable.

    For libraries that show only their probabilities. exp is monotone and a row has one denominator, so this is the
    selection on the scores, but where two scores round to the same probability the lower key is kept.

    Raises:
        ValueError: a probability is NaN, on a CPU; on a GPU it stays NaN.
    """
    kept = keep_largest(p, pattern)
    if renormalize:
        kept = kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return kept


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(
            f"expected q [B, H, Q, D], k [B, G, K, D], v [B, G, K, E], found {_sizes(q)}, {_sizes(k)}, {_sizes(v)}"
        )
    (batch, heads, queries, width), keys = q.shape, k.shape[2]
    if k.shape[0] != batch or k.shape[3] != width or k.shape[:3] != v.shape[:3] or heads % k.shape[1]:
        raise ValueError(
            f"expected k [{batch}, G, K, {width}] and v [{batch}, G, K, E] with {heads} heads a multiple of G, found k "
            f"{_sizes(k)}, v {_sizes(v)}"
        )
    if mask is not None:
        wanted = (batch, heads, queries, keys)
        fits = mask.ndim <= 4 and all(have in (1, want) for have, want in zip(mask.shape[::-1], wanted[::-1]))
        if not fits or mask.shape[-1:] != (keys,):
            raise ValueError(f"expected a mask broadcastable to [B, H, Q, K] = {list(wanted)}, found {_sizes(mask)}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"expected a mask of bool (True = valid) or of floats to add to the scores, found {mask.dtype}; write "
                "mask.bool() if 1 means valid"
            )


def _sizes(x: Tensor) -> list[int]:
    return list(x.shape)


def _additive(mask: Tensor) -> Tensor:
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


def _cast_for_autocast(*inputs: Tensor) -> tuple[Tensor, ...]:
    """What autocast does to the factors of a product; without it, factors of several dtypes go to the widest."""
    device = inputs[0].device.type
    if torch.is_autocast_enabled(device) and all(x.dtype != torch.float64 for x in inputs):
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = inputs[0].dtype
        for x in inputs[1:]:
            dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in inputs)
