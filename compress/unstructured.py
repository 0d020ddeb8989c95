"""Masks without structure: a share of the weights is zero, wherever they are.

Legend: O out_features, I in_features. A mask is bool, of the shape of its score; True = kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def unstructured_mask(score_OI: Tensor, zeros: float) -> Tensor:
    """Keep the ``round((1 - zeros) * numel)`` largest scores of one matrix; among equals the lower flat index is kept.

    Magnitude pruning (ALGORITHMS B.4): ``unstructured_mask(w_OI.abs(), 0.5)``.

    Raises:
        ValueError: ``zeros`` is not between 0 and 1, or a score is NaN.
    """
    return global_masks([score_OI], zeros)[0]


@torch.no_grad()
def global_masks(scores: Sequence[Tensor], zeros: float) -> list[Tensor]:
    """As `unstructured_mask`, with one threshold over several matrices of any shapes (ALGORITHMS B.6).

    Raises:
        ValueError: ``zeros`` is not between 0 and 1, or a score is NaN.
    """
    _check(zeros)
    if not scores:
        return []
    flat = torch.cat([_widen(score).flatten() for score in scores])
    if bool(flat.isnan().any()):
        raise ValueError(f"expected scores without NaN, found {int(flat.isnan().sum())} NaN of {flat.numel()}")
    keep = round((1 - zeros) * flat.numel())
    sizes, shapes = [score.numel() for score in scores], [score.shape for score in scores]
    return [part.view(shape) for part, shape in zip(_largest(flat, keep).split(sizes), shapes, strict=True)]


@torch.no_grad()
def row_mask(score_OI: Tensor, zeros: float) -> Tensor:
    """Remove the ``int(in_features * zeros)`` smallest scores of each row (Wanda, Sun et al., arXiv:2306.11695).

    Among equals the lower index goes first, as in the public code's stable ascending sort.

    Raises:
        ValueError: ``zeros`` is not between 0 and 1, or a score is NaN.
    """
    _check(zeros)
    score_OI = _widen(score_OI)
    if bool(score_OI.isnan().any()):
        raise ValueError(f"expected scores without NaN, found {int(score_OI.isnan().sum())} of {score_OI.numel()}")
    order_OI = score_OI.argsort(dim=1, stable=True)
    removed = int(score_OI.shape[1] * zeros)
    return torch.ones_like(score_OI, dtype=torch.bool).scatter_(1, order_OI[:, :removed], False)


def _largest(flat: Tensor, keep: int) -> Tensor:
    """The ``keep`` largest; a selection instead of a sort, and only the ties across the line are looked at again."""
    if keep in (0, flat.numel()):
        return torch.full_like(flat, bool(keep), dtype=torch.bool)
    least = flat.kthvalue(flat.numel() - keep + 1).values
    kept = flat >= least
    surplus = int(kept.sum()) - keep
    if surplus:
        tied = (flat == least).nonzero().squeeze(1)
        kept[tied[tied.numel() - surplus :]] = False
    return kept


def _check(zeros: float) -> None:
    if not 0 <= zeros <= 1:
        raise ValueError(f"expected a share of zeros between 0 and 1, found {zeros}")


def _widen(score: Tensor) -> Tensor:
    return score if score.dtype in (torch.float32, torch.float64) else score.float()
