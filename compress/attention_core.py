"""The sparse attention map itself: softmax(scale Q K^T + mask), N of M keys kept, times V, with exact gradients.

Legend: B batch, H heads, Q queries, K keys, D head dimension, E value dimension. P probabilities, S scores;
R rows in a piece.

Works through the map in pieces that fit a processor's cache: nothing of size [B, H, Q, K] is written except what the
backward pass needs, one tensor, which holds P with the sign telling kept (+) from dropped (-).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .masks import Pattern, mask_without_waiting

# Elements of the map handled at a time, per thread: the temporaries of a piece stay in a core's cache (measured).
_CPU_PIECE = 1 << 18
_GPU_PIECE = 1 << 27
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class MapOptions:
    """What is done to the map.

    Args:
        pattern: N kept of M consecutive keys, None keeps all. renormalize: divide by the sum of the kept.
        scale: of the scores. dropout_p: applied after the selection, 0 in evaluation.
        first_key: absolute index of key 0; groups are aligned at absolute index 0.
        probs_dtype: dtype of the returned probabilities; None returns none.
    """

    pattern: Pattern | None
    renormalize: bool
    scale: float
    dropout_p: float
    first_key: int
    probs_dtype: torch.dtype | None


@dataclass(frozen=True)
class _Saved:
    """What the backward pass needs: P with its sign [B, H, Q, K], and which entries dropout left, or None."""

    signed_BHQK: Tensor
    left_BHQK: Tensor | None


def attend(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKE: Tensor | None, mask: Tensor | None, options: MapOptions
) -> tuple[Tensor | None, Tensor | None]:
    """Output [B, H, Q, E] (None without V) and the probabilities that multiply V [B, H, Q, K], or None.

    Scores, softmax and selection are in float32 (float64 stays), whatever the dtype of the inputs. ``mask``: additive,
    four-dimensional, broadcastable to [B, H, Q, K]; values at or below half of its dtype's minimum make a key invalid.
    """
    inputs = (q_BHQD, k_BHKD, v_BHKE, mask)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _Attend.apply(*inputs, options)
    with torch.no_grad(), torch.autocast(q_BHQD.device.type, enabled=False):
        out, probs, _ = _forward(*inputs, options, track=False)
    return out, probs


class _Attend(torch.autograd.Function):
    """Backward: GPUSQ-TLM's map with the selection held constant. Dropped keys get -P_j D, not 0, since they are in
    the denominator; renormalised, their gradient is 0."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor | None, mask: Tensor | None, options: MapOptions
    ) -> tuple[Tensor | None, Tensor | None]:
        with torch.autocast(q.device.type, enabled=False):
            out, probs, saved = _forward(q, k, v, mask, options, track=True)
        assert saved is not None
        ctx.save_for_backward(q, k, v, saved.signed_BHQK, saved.left_BHQK)
        ctx.options = options
        ctx.mask_like = None if mask is None else (mask.shape, mask.dtype)
        ctx.set_materialize_grads(False)
        return out, probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_probs: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, signed, left = ctx.saved_tensors
        if d_out is None and d_probs is None:
            return None, None, None, None, None
        with torch.autocast(q.device.type, enabled=False):
            shape, dtype = ctx.mask_like if ctx.mask_like and ctx.needs_input_grad[3] else (None, None)
            d_mask = None if shape is None else torch.zeros(shape, dtype=signed.dtype, device=q.device)
            grads = _backward(q, k, v, _Saved(signed, left), ctx.options, d_out, d_probs, d_mask)
        return *grads, None if d_mask is None else d_mask.to(dtype), None


def _forward(
    q: Tensor, k: Tensor, v: Tensor | None, mask: Tensor | None, o: MapOptions, track: bool
) -> tuple[Tensor | None, Tensor | None, _Saved | None]:
    shape = (*q.shape[:3], k.shape[2])
    wide = _wide(q)
    blocked = None
    if mask is not None:
        mask = mask.to(wide).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))
        blocked = (mask == float("-inf")).all(-1, keepdim=True)  # rows without a valid key
        if q.device.type == "cpu" and not bool(blocked.any()):  # a GPU would have to be waited for
            blocked = None
    out = None if v is None else v.new_empty((*shape[:3], v.shape[3]))
    probs = None if o.probs_dtype is None else q.new_empty(shape, dtype=o.probs_dtype)
    signed = q.new_empty(shape, dtype=wide) if track else None
    left = q.new_empty(shape, dtype=torch.bool) if track and o.dropout_p else None
    for at in _pieces(shape, q.device):
        s = _product(q[at], k[at].transpose(-1, -2)).mul_(o.scale)
        if mask is not None:
            s.add_(_part(mask, at))
        kept = p = s.softmax(-1)
        if blocked is not None:
            p.masked_fill_(_part(blocked, at), 0.0)
        if o.pattern is not None:
            keep = select(s, o.pattern, o.first_key)
            kept = torch.mul(p, keep, out=s)
            if o.renormalize:
                kept.div_(kept.sum(-1, keepdim=True).clamp_min_(torch.finfo(wide).tiny))
                p = kept
        if signed is not None:
            torch.lerp(p, kept, 2.0, out=signed[at])  # p + 2 (kept - p): exactly p where kept, exactly -p elsewhere
        if o.dropout_p:
            chance = torch.empty(kept.shape, dtype=torch.bool, device=q.device).bernoulli_(1 - o.dropout_p)
            kept = torch.mul(kept, chance).mul_(_undo(o.dropout_p))
            if left is not None:
                left[at] = chance
        if probs is not None:
            probs[at] = kept
        if v is not None and out is not None:
            out[at] = _product(kept, v[at])
    return out, probs, None if signed is None else _Saved(signed, left)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    saved: _Saved,
    o: MapOptions,
    d_out: Tensor | None,
    d_probs: Tensor | None,
    d_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    d_q, d_k = torch.empty_like(q), torch.empty_like(k)
    d_v = None if v is None or d_out is None else torch.empty_like(v)
    for at in _pieces(saved.signed_BHQK.shape, q.device):
        signed = saved.signed_BHQK[at]
        kept = signed.clamp_min(0.0)
        d_p = None if d_probs is None else d_probs[at].to(signed.dtype)
        left = None if saved.left_BHQK is None else saved.left_BHQK[at]
        if d_out is not None and v is not None and d_v is not None:
            after = kept if left is None else torch.mul(kept, left).mul_(_undo(o.dropout_p))
            d_v[at] = _product(after.transpose(-1, -2), d_out[at])
            through = _product(d_out[at], v[at].transpose(-1, -2))
            d_p = through if d_p is None else through.add_(d_p)
        assert d_p is not None
        if left is not None:
            d_p = torch.mul(d_p, left).mul_(_undo(o.dropout_p))
        d_s = kept.mul_(d_p)
        d_s.addcmul_(signed.abs(), d_s.sum(-1, keepdim=True), value=-1.0)
        if d_mask is not None:
            part = _part(d_mask, at)
            part.add_(d_s.sum_to_size(part.shape))
        d_q[at] = _product(d_s, k[at]).mul_(o.scale)
        d_k[at] = _product(d_s.transpose(-1, -2), q[at]).mul_(o.scale)
    return d_q, d_k, d_v


def select(s_BHQK: Tensor, pattern: Pattern, first_key: int = 0) -> Tensor:
    """Mask of the N largest of each group of M keys, ties to the lower key; a cut first or last group keeps min(N, its
    keys). Entries of -inf fill groups that have fewer valid keys; their P is 0, so nothing of them is kept.

    Raises:
        ValueError: a score is NaN, on a CPU. A GPU would have to be waited for: P is NaN there, and all that follows.
    """
    front = -first_key % pattern.m  # keys of a group that began before key 0
    if not 0 < front < s_BHQK.shape[-1]:
        return mask_without_waiting(s_BHQK, pattern)
    parts = (s_BHQK[..., :front], s_BHQK[..., front:])
    return torch.cat([mask_without_waiting(part, pattern) for part in parts], dim=-1)


def keep_largest(p: Tensor, pattern: Pattern) -> Tensor:
    """``p`` [..., K] of values >= 0 with all but the N largest of each group of M set to 0, differentiable.

    Raises:
        ValueError: NaN in ``p``, on a CPU; on a GPU it stays NaN.
    """
    kept: Tensor = _KeepLargest.apply(p, pattern)
    return kept


class _KeepLargest(torch.autograd.Function):
    """Saves its output alone, which the product with V saves too. A kept 0 counts as dropped in the backward pass: the
    softmax before it multiplies its gradient by that 0."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, pattern: Pattern) -> Tensor:
        p = p.contiguous()
        kept = torch.empty_like(p)
        p_RK, kept_RK = p.flatten(0, -2), kept.flatten(0, -2)
        rows = max(1, _limit(p.device) // max(1, p.shape[-1]))
        for row in range(0, p_RK.shape[0], rows):
            at = slice(row, row + rows)
            torch.mul(p_RK[at], mask_without_waiting(p_RK[at], pattern), out=kept_RK[at])
        ctx.save_for_backward(kept)
        return kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_kept: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(d_kept, kept, 0), None


def _pieces(shape: tuple[int, ...] | torch.Size, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of batch and heads: several samples, or one sample, or some of its heads at a time."""
    batch, heads, *rest = shape
    limit = _limit(device)
    row = max(1, rest[0] * rest[1])
    samples, some = max(1, limit // (heads * row)), max(1, min(heads, limit // row))
    for b in range(0, batch, samples):
        for h in range(0, heads, some):
            yield slice(b, b + samples), slice(h, h + some)


def _limit(device: torch.device) -> int:
    return _CPU_PIECE * torch.get_num_threads() if device.type == "cpu" else _GPU_PIECE


def _part(x: Tensor, at: tuple[slice, slice]) -> Tensor:
    """``x[at]`` of a tensor whose batch or heads may be 1, for broadcasting."""
    every = slice(None)
    return x[at[0] if x.shape[0] > 1 else every, at[1] if x.shape[1] > 1 else every]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product, accumulated and returned in float32 (float64 stays). On a GPU the factors keep their half
    precision for the tensor cores; on a CPU they are widened, which is also faster there."""
    half = next((x.dtype for x in (a, b) if x.dtype in _HALF), None)
    if half is not None and a.device.type == "cuda":
        product = torch.bmm(a.to(half).flatten(0, 1), b.to(half).flatten(0, 1), out_dtype=torch.float32)
        return product.unflatten(0, a.shape[:2])
    return a.to(_wide(a)) @ b.to(_wide(b))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _undo(dropout_p: float) -> float:
    return 0.0 if dropout_p >= 1 else 1.0 / (1.0 - dropout_p)
