"""Which blocks of a model run as one native call: found by the adapter's `BlockForm`, tried before they are trusted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ....models.adapter import Block, Sites
from ....models.record import BlockForm
from ..int8_gemm import Int8Gemm
from ..int8_linear import Int8Linear, Int8Slice
from .block import FusedForward
from .kernels import available

# The trial tolerates inputs that fell to the neighbouring level; another order of the parts, another
# scale of the scores or a forgotten mask is off by tenths.
_TOLERANCE = 0.1
_TRIAL_TOKENS = 9


def fuse_blocks_(model: nn.Module, sites: Sites, bfloat16: bool = True) -> tuple[str, ...]:
    """Let every block that has the form its adapter declares, and only int8 GEMMs with static inputs, run as one call.

    To be called on a model in evaluation mode whose GEMMs have been replaced. ``bfloat16``: see :class:`FusedForward`.
    Names of the blocks that were changed.
    """
    if not sites.adapter.forms or not available()[0]:
        return ()
    fused: list[str] = []
    trusted: dict[tuple[object, ...], bool] = {}
    for block in sites.blocks:
        for form in sites.adapter.forms:
            forward = _fused_forward(model, sites, block, form)
            if forward is None:
                continue
            forward.bfloat16 = False  # for the trial: with it, inputs of trained blocks fall to neighbouring levels
            shapes = (forward.heads, forward.head_width, forward.scale, *map(_shape, forward.gemms))
            kind = (form, type(block.module), *shapes)
            if kind not in trusted:
                trusted[kind] = _agrees(forward)
            if trusted[kind]:
                forward.bfloat16 = bfloat16
                block.module.forward = forward
                fused.append(block.name)
                break
    return tuple(fused)


def _shape(gemm: Int8Gemm) -> tuple[object, ...]:
    return gemm.out_features, gemm.in_features, gemm.activation


def _fused_forward(model: nn.Module, sites: Sites, block: Block, form: BlockForm) -> FusedForward | None:
    """The block's parts, or None where one is missing or of another kind."""
    roles = {
        site.role: model.get_submodule(site.name)
        for site in sites.gemms
        if site.block == block.index and site.name.startswith(f"{block.name}.")
    }
    maps = [entry for entry in sites.attention if entry.block == block.index]
    qkv = _qkv(roles)
    others = [_single(roles.get(role)) for role in ("attn_out", "ffn_up", "ffn_down")]
    if qkv is None or None in others or len(maps) != 1 or maps[0].kind != "self" or maps[0].head_dim is None:
        return None
    out, up, down = (gemm for gemm in others if gemm is not None)
    gemms = (qkv, out, up, down)
    heads, rest = divmod(out.in_features, maps[0].head_dim)
    width = qkv.in_features
    attention = maps[0].module
    if (
        any(gemm.input.kind != "static" or gemm.in_features % 4 for gemm in gemms)
        or up.next_input is None or not down.takes_levels or rest or qkv.out_features != 3 * out.in_features
        or (out.out_features, up.in_features, down.in_features, down.out_features)
        != (width, width, up.out_features, width)
        or getattr(attention, "is_causal", False)
    ):  # fmt: skip
        return None
    norms = [_norm(block.module, name, width) for name in (form.attention_norm, form.ffn_norm)]
    if norms[0] is None or norms[1] is None:
        return None
    scale = getattr(attention, "scaling", getattr(attention, "scale", maps[0].head_dim ** -0.5))
    return FusedForward(
        block.module, attention, gemms, (norms[0], norms[1]), form.norm_first, heads, maps[0].head_dim, scale, form.mask
    )


def _qkv(roles: dict[str, nn.Module]) -> Int8Gemm | None:
    """One matrix for Q, K and V: as the model has it, or made of three of one height."""
    if "qkv" in roles:
        return _single(roles["qkv"])
    slices = [roles.get(role) for role in ("q", "k", "v")]
    first = slices[0]
    if not isinstance(first, Int8Slice) or len(first.shared.sizes) != 3 or len(set(first.shared.sizes)) != 1:
        return None
    for index, module in enumerate(slices):
        if not isinstance(module, Int8Slice) or module.shared is not first.shared or module.index != index:
            return None
    return first.shared.gemm


def _single(module: nn.Module | None) -> Int8Gemm | None:
    return module.gemm if isinstance(module, Int8Linear) else None


def _norm(block: nn.Module, name: str, width: int) -> nn.LayerNorm | None:
    try:
        norm = block.get_submodule(name)
    except AttributeError:
        return None
    if not isinstance(norm, nn.LayerNorm) or tuple(norm.normalized_shape) != (width,):
        return None
    tensors: Iterable[torch.Tensor | None] = (norm.weight, norm.bias)
    plain = all(t is None or (t.dtype == torch.float32 and t.is_cpu and t.is_contiguous()) for t in tensors)
    return norm if plain else None


@torch.no_grad()
def _agrees(forward: FusedForward) -> bool:
    """Whether the fused block computes what the block's own forward does, without a mask and with one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, _TRIAL_TOKENS, forward.gemms[0].in_features, generator=generator)
    mask = torch.randn(2, 1, _TRIAL_TOKENS, _TRIAL_TOKENS, generator=generator)
    for given in ({forward.mask: None}, {forward.mask: mask}):
        try:
            expected = forward.own((x,), given)
        except (TypeError, ValueError, RuntimeError):
            return False  # a forward that wants something else
        if not isinstance(expected, torch.Tensor) or expected.shape != x.shape:
            return False
        found = forward.fused(x, given.get(forward.mask))
        if not float((found - expected).norm()) <= _TOLERANCE * float((expected - x).norm()):
            return False
    return True
