"""Masks from the weights of an attached model alone: by magnitude, or from the zeros that are there already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .attached import compressed_weights, latent_OI
from .masks import Pattern, check_nm, magnitude_mask
from .unstructured import global_masks, unstructured_mask

Scope = Literal["layer", "global"]


class MaskError(ValueError):
    """Weights that do not have the zeros asked for."""


@torch.no_grad()
def magnitude_masks_(model: nn.Module, scope: Scope = "layer") -> None:
    """Set every mask to keep the largest |w|: N of each M, or a share of the weights (ASP, Mishra et al. 2021, section
    4; ALGORITHMS B.1, B.4, B.6).

    Args:
        scope: of unstructured masks. ``layer``: the share is pruned in each matrix, in each of Q, K and V of a fused
            one; ``global``: one threshold over all matrices with the same share. Among equals the lower index is kept.

    Raises:
        ValueError: a weight is NaN; no mask has changed.
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"expected scope 'layer' or 'global', found {scope!r}")
    found: list[tuple[Tensor, Tensor]] = []
    shares: dict[float, list[tuple[Tensor, Tensor]]] = {}
    for name, module, parametrization in compressed_weights(model):
        mask_OI, w_OI = parametrization.mask_OI, latent_OI(module, parametrization)
        if mask_OI is None:
            continue
        if bool(w_OI.isnan().any()):
            raise ValueError(f"{name}: expected weights without NaN, found {int(w_OI.isnan().sum())}; no mask was made")
        if parametrization.pattern is not None:
            found.append((mask_OI, magnitude_mask(w_OI, parametrization.pattern)))
        elif parametrization.unstructured is not None:
            zeros = parametrization.unstructured.zeros
            if scope == "global":
                shares.setdefault(zeros, []).append((mask_OI, w_OI.abs()))
            else:
                parts = w_OI.chunk(parametrization.parts)
                found.append((mask_OI, torch.cat([unstructured_mask(part.abs(), zeros) for part in parts])))
    for zeros, together in shares.items():
        new = global_masks([score_OI for _, score_OI in together], zeros)
        found += [(mask_OI, new_OI) for (mask_OI, _), new_OI in zip(together, new, strict=True)]
    for mask_OI, new_OI in found:
        mask_OI.copy_(new_OI)


def prune_(model: nn.Module) -> None:
    """`magnitude_masks_` with a threshold per matrix."""
    magnitude_masks_(model)


@torch.no_grad()
def inherit_masks_(model: nn.Module) -> tuple[str, ...]:
    """Set every mask to the non-zeros of its weight, for a model that has been pruned before.

    Under a share of zeros, a matrix outside the blocks that has no zero at all is one that the pruned model did not
    have (the pooler of a model that was pruned as a masked language model, DistilBERT's ``pre_classifier``): it is new,
    has nothing to inherit, stays dense and does not count.

    Returns:
        The names of those that stayed dense.

    Raises:
        MaskError: a weight has more non-zeros than its pattern allows; names the GEMM and what was found. For a share
            of zeros the matrices count together, since a global threshold leaves each with another share. No mask has
            changed then.
    """
    found: list[tuple[Tensor, Tensor]] = []
    shares: dict[float, list[_Zeros]] = {}
    for name, module, parametrization in compressed_weights(model):
        mask_OI = parametrization.mask_OI
        if mask_OI is None:
            continue
        kept_OI = latent_OI(module, parametrization) != 0
        if parametrization.pattern is not None and not check_nm(kept_OI, parametrization.pattern):
            raise MaskError(_too_dense(name, kept_OI, parametrization.pattern))
        if parametrization.unstructured is not None:
            row = _Zeros(name, parametrization.block, int((~kept_OI).sum()), kept_OI.numel())
            shares.setdefault(parametrization.unstructured.zeros, []).append(row)
        found.append((mask_OI, kept_OI))
    dense: list[str] = []
    for share, matrices in shares.items():
        pruned = [row for row in matrices if row.zeros or row.block is not None]
        _check_share(share, pruned if any(row.zeros for row in pruned) else matrices)
        dense += [row.name for row in matrices if row not in pruned]
    for mask_OI, kept_OI in found:
        mask_OI.copy_(kept_OI)
    return tuple(dense)


class _Zeros(NamedTuple):
    """Zeros among the ``size`` weights of one matrix; ``block`` is None outside the blocks."""

    name: str
    block: int | None
    zeros: int
    size: int


def _check_share(share: float, matrices: Sequence[_Zeros]) -> None:
    zeros, size = sum(row.zeros for row in matrices), sum(row.size for row in matrices)
    # A threshold per matrix rounds in each of them.
    if zeros < round(share * size) - len(matrices):
        fewest = min(matrices, key=lambda row: row.zeros / row.size)
        raise MaskError(
            f"expected {share:.4%} zeros to inherit, found {zeros / size:.4%} of {size:,} weights ({fewest.name} has "
            f"the fewest: {fewest.zeros / fewest.size:.4%}): hand in a pruned model, or prune with `method: magnitude`"
        )


def _too_dense(name: str, kept_OI: Tensor, pattern: Pattern) -> str:
    padded = torch.nn.functional.pad(kept_OI.to(torch.uint8), (0, -kept_OI.shape[1] % pattern.m))
    counts = padded.unflatten(1, (-1, pattern.m)).sum(-1)
    return (
        f"{name}: expected {pattern} to inherit, at most {pattern.n} non-zeros in each {pattern.m} consecutive "
        f"weights; found {int((counts > pattern.n).sum()):,} of {counts.numel():,} groups with more "
        f"({float((~kept_OI).float().mean()):.2%} of the weights are zero): hand in a pruned model, or prune with "
        "`method: magnitude`"
    )
