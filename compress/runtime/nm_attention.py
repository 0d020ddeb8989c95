"""N:M attention maps for inference through one fused Triton kernel, which never writes the map to memory.

The same function as ``sparse_attention`` without dropout, quantizers of P and gradients; ALGORITHMS C.1 to C.3
(GPUSQ-TLM, Yu et al., ACL Findings 2023, section 3.1). Two things differ: a NaN in a score gives NaN in the outputs of
its row, where the reference raises an error (a kernel cannot without waiting for it); and 16-bit probabilities are
rounded before the division by their sum, not after it. Legend: B batch, H heads, G groups of heads that share keys, Q
queries, K keys, D head dimension, E value dimension.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attention import _cast_for_autocast, _check, sparse_attention
from ..attention_map import attention_maps
from ..masks import Pattern
from .triton_support import interpreting, triton_runs

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256


def nm_attention_supported(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> tuple[bool, str]:
    """Whether the kernel takes such inputs here, and why (not). ``head_dim``: the larger one of D and E."""
    if dtype not in _DTYPES:
        return False, f"the N:M attention kernel takes float32, float16 and bfloat16, not {str(dtype)[6:]}"
    if not 1 <= head_dim <= _LARGEST_HEAD:
        return False, f"the N:M attention kernel takes heads of 1 to {_LARGEST_HEAD}, not {head_dim}"
    return triton_runs(device)


def nm_attention(
    q_BHQD: Tensor,
    k_BGKD: Tensor,
    v_BGKE: Tensor,
    *,
    pattern: Pattern,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    renormalize: bool = False,
    first_key: int = 0,
    kernel: Literal["auto", "triton", "reference"] = "auto",
) -> Tensor:
    """Attention whose map keeps N of each M consecutive keys; see :func:`sparse_attention` for all that is common.

    Works inside CUDA graphs and, as one operator, under ``torch.compile`` (call `nm_attention_operator` before).

    Args:
        q_BHQD, k_BGKD, v_BGKE: any strides; H a multiple of G.
        mask: bool (True = valid) or additive, broadcastable to [B, H, Q, K]. Dimensions of size 1 are not expanded.
        causal: query i sees keys up to i + K - Q, beside what ``mask`` says (the last query sees them all, as with a
            key cache).
        first_key: absolute index of key 0, for a cache that has dropped its oldest keys.
        kernel: ``auto`` takes Triton where `nm_attention_supported` says so and no gradient is asked for, else the
            reference, which also computes groups and heads that are too large for the device's shared memory.

    Returns:
        [B, H, Q, E] in the dtype of the values. A row without a valid key is 0.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: ``triton`` was asked for and cannot run; says why.
    """
    _check(q_BHQD, k_BGKD, v_BGKE, mask)
    q, k, v = _cast_for_autocast(q_BHQD, k_BGKD, v_BGKE)
    supported, reason = nm_attention_supported(q.device, q.dtype, max(q.shape[-1], v.shape[-1]))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, mask)):
        supported, reason = False, "the N:M attention kernel has no gradients; call it under torch.no_grad()"
    if kernel == "triton" and not supported:
        raise RuntimeError(f"{reason}; kernel='reference' computes the same")
    if kernel == "reference" or not supported:
        both = _with_causal(mask, q.shape[2], k.shape[2], q.device) if causal else mask
        out, _ = sparse_attention(
            q, k, v, pattern=pattern, mask=both, scale=scale, renormalize=renormalize, first_key=first_key,
            need_probs=False,
        )  # fmt: skip
        return out
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    shift = first_key % pattern.m
    return nm_attention_operator()(q, k, v, mask, pattern.n, pattern.m, factor, causal, renormalize, shift)


class NmAttention(nn.Module):
    """The kernel as a part of an `AttentionMapCompressor`, which calls it instead of the reference where it can.

    ``choose(rows)`` names the kernel for a number of queries (of the whole batch): ``triton`` or ``reference``.
    """

    def __init__(self, pattern: Pattern, renormalize: bool) -> None:
        super().__init__()
        self.pattern, self.renormalize = pattern, renormalize
        nm_attention_operator()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        nm_attention_operator()

    def choose(self, rows: int) -> str:
        return "triton"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, first_key: int
    ) -> Tensor | None:
        """The output [B, H, Q, E], or None where the reference has to do it."""
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, mask)):
            return None
        if not nm_attention_supported(q.device, q.dtype, max(q.shape[-1], v.shape[-1]))[0]:
            return None
        if self.choose(q.shape[0] * q.shape[2]) != "triton":
            return None
        return nm_attention(
            q, k, v, pattern=self.pattern, mask=mask, scale=scale, renormalize=self.renormalize, first_key=first_key
        )

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}, renormalize={self.renormalize}"


def use_nm_attention_(model: nn.Module) -> tuple[str, ...]:
    """Let the attached N:M maps of ``model`` run through the kernel in evaluation mode; the names of those that will.

    A map with a quantizer of P stays with the reference (its levels need the finished probabilities), and so do maps of
    libraries that show only their probabilities (timm, fairseq). While the kernel runs, no probabilities are returned.
    """
    names = []
    for name, _, compressor in attention_maps(model):
        if compressor.pattern is not None and compressor.p is None:
            compressor.kernel = NmAttention(compressor.pattern, compressor.renormalize)
            names.append(name)
    return tuple(names)


def nm_attention_operator() -> Any:
    """``torch.ops.squeezoo.nm_attention``, registered when it is first needed: before a model is compiled."""
    if not torch.compiler.is_compiling():
        _register()
    return torch.ops.squeezoo.nm_attention.default


@cache
def _register() -> None:
    @torch.library.custom_op("squeezoo::nm_attention", mutates_args=())
    def operator(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, n: int, m: int, scale: float, causal: bool,
        renormalize: bool, shift: int,
    ) -> Tensor:  # fmt: skip
        out_BHQE = _output(q, v)
        if not out_BHQE.numel() or not k.shape[2]:
            return out_BHQE.zero_()
        if not _launch(q, k, v, mask, n, m, scale, causal, renormalize, shift, out_BHQE):
            both = _with_causal(mask, q.shape[2], k.shape[2], q.device) if causal else mask
            found, _ = sparse_attention(
                q, k, v, pattern=Pattern(n, m), mask=both, scale=scale, renormalize=renormalize, first_key=shift,
                need_probs=False,
            )  # fmt: skip
            out_BHQE.copy_(found)
        return out_BHQE

    @operator.register_fake
    def _(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, n: int, m: int, scale: float, causal: bool,
        renormalize: bool, shift: int,
    ) -> Tensor:  # fmt: skip
        return _output(q, v)


def _output(q_BHQD: Tensor, v_BGKE: Tensor) -> Tensor:
    """Stored as [B, Q, H, E], which is what the matrix after it reads."""
    batch, heads, queries, _ = q_BHQD.shape
    return v_BGKE.new_empty((batch, queries, heads, v_BGKE.shape[-1])).transpose(1, 2)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, n: int, m: int, scale: float, causal: bool, renormalize: bool,
    shift: int, out: Tensor,
) -> bool:  # fmt: skip
    """False, and nothing done, where a tile is larger than the device's shared memory: large groups of wide heads."""
    from triton.runtime.errors import OutOfResources

    from . import nm_attention_kernel as kernels

    batch, heads, queries, width = q.shape
    keys, value_width = k.shape[2], v.shape[3]
    kind, threshold = 0, 0.0
    strides = (0, 0, 0, 0)
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        kind = 1 if mask.dtype == torch.bool else 2
        threshold = 0.0 if kind == 1 else torch.finfo(mask.dtype).min / 2
        mask = mask.view(torch.uint8) if kind == 1 else mask
        b, h, q_, _ = (0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
        strides = (b, h, q_, mask.stride(3))
    spacious = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (9, 0)
    block = _blocks(m, max(width, value_width), q.dtype, spacious)
    kernel = kernels.nm_attention_small if m <= 8 else kernels.nm_attention_large
    # Triton launches on the current device
    with torch.cuda.device(q.device if q.is_cuda else -1), suppress(OutOfResources):
        kernel[(-(-queries // block["BLOCK_Q"]) * batch * heads,)](
            q, k, v, q if mask is None else mask, out,
            *q.stride(), *k.stride(), *v.stride(), *strides, *out.stride(),
            heads, heads // k.shape[1], queries, keys, width, value_width, shift, scale, threshold,
            N=n, M=m, MASK=kind, PER_QUERY=mask is not None and mask.shape[2] > 1, CAUSAL=causal,
            RENORMALIZE=renormalize, PRECISION="ieee", WIDEN=interpreting(), BLOCK_D=_power(width),
            BLOCK_E=_power(value_width), **block,
        )  # fmt: skip
        return True
    return False


def _blocks(m: int, width: int, dtype: torch.dtype, spacious: bool) -> dict[str, int]:
    """Tile sizes, and how many warps work on one. Chosen so that the compiler's report for sm_80 and sm_90
    (``spacious``) shows at most a few spilled registers at head dimensions 64 and 128; not tuned by time yet. Wide
    float32 heads load one tile at a time: two of M = 8 would take more shared memory than any GPU has (306 KB at 256).
    """
    stages = 1 if dtype == torch.float32 and width > 64 else 2
    if m <= 8:
        small = dtype == torch.float32 or (width > 64 and not spacious)
        return {"BLOCK_Q": 32 if small else 64, "BLOCK_G": 16, "num_warps": 8 if m == 8 else 4, "num_stages": stages}
    keys = max(64, m)
    return {"BLOCK_Q": 64 if keys == 64 else 16, "BLOCK_G": keys // m, "num_warps": 4, "num_stages": stages}


def _power(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _with_causal(mask: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
    """``mask`` and the causal one, [..., Q, K], for the reference."""
    causal_QK = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if mask is None:
        return causal_QK
    return mask & causal_QK if mask.dtype == torch.bool else mask.masked_fill(~causal_QK, float("-inf"))
