"""SparseGPT: prune column by column and let the columns that follow make up for the error.

Frantar & Alistarh, arXiv:2301.00774, algorithm 1; ALGORITHMS B.7. Legend: O out_features, I in_features (the columns),
B columns of one block, M group size. Inside, matrices lie [I, O]: a column of the weight is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .hessian import InverseFactor, factorise
from .masks import Pattern, nm_mask
from .rules import Unstructured

# (column_O, its index) -> the column rounded to a quantizer's levels; scales come from the dense weight.
QuantizeColumn = Callable[[Tensor, int], Tensor]
# Columns whose errors reach the rest of the block by one product instead of one each (measured: 4 to 16 are alike).
_STEP = 8


@dataclass(frozen=True)
class Solved:
    """One pruned matrix.

    Args:
        w_OI: the new weight, zero where pruned, in the dtype of the old one.
        mask_OI: bool, True = kept. loss_O: 0.5 * sum of squared errors per row, in the metric of the Hessian.
    """

    w_OI: Tensor
    mask_OI: Tensor
    loss_O: Tensor

    @property
    def loss(self) -> float:
        """Sum over the rows."""
        return float(self.loss_O.sum())


@torch.no_grad()
def sparsegpt(
    w_OI: Tensor,
    hessian_II: Tensor | InverseFactor,
    sparsity: Pattern | Unstructured,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    quantize: QuantizeColumn | None = None,
) -> Solved:
    """Prune one matrix to N:M or to an unstructured share of zeros, given the Hessian of its inputs.

    Rows are independent for N:M; unstructured thresholds are taken per block of columns over all rows.

    Args:
        w_OI: the dense weight; not changed.
        hessian_II: `Hessian.value_II`, or its `InverseFactor` where several matrices read the same input.
        block_size: columns per block, a multiple of M; a larger M takes blocks of M. N:M results do not depend on it.
        damping: see `factorise`; not used with an `InverseFactor`.
        quantize: rounds each column before its error is spread (joint pruning and quantization).

    Raises:
        HessianError: the Hessian cannot be factorised.
        ValueError: sizes that do not fit, a block size that is no multiple of M, NaN in the weight.
    """
    factor = hessian_II if isinstance(hessian_II, InverseFactor) else factorise(hessian_II, damping)
    r_II, in_features = factor.r_II, w_OI.shape[1]
    if r_II.shape[0] != in_features:
        raise ValueError(f"expected a Hessian of {in_features} in_features, found {r_II.shape[0]}")
    block_size = _block_size(block_size, sparsity)
    if bool(w_OI.isnan().any()):
        raise ValueError(f"expected a weight without NaN, found {int(w_OI.isnan().sum())} of {w_OI.numel()}")
    w_IO = w_OI.to(r_II.dtype).t().clone(memory_format=torch.contiguous_format)
    w_IO[factor.dead_I] = 0
    mask_IO = torch.empty_like(w_IO, dtype=torch.bool)
    loss_O = w_IO.new_zeros(w_IO.shape[1])
    for start in range(0, in_features, block_size):
        end = min(start + block_size, in_features)
        error_BO = _solve_block_(
            w_IO[start:end], mask_IO[start:end], r_II[start:end, start:end], sparsity, quantize, start
        )
        loss_O += error_BO.square().sum(0)
        w_IO[end:].addmm_(r_II[start:end, end:].t(), error_BO, alpha=-1)
    return Solved(w_IO.t().to(w_OI.dtype), mask_IO.t(), loss_O / 2)


def _block_size(block_size: int, sparsity: Pattern | Unstructured) -> int:
    if block_size < 1:
        raise ValueError(f"expected a block size of at least 1, found {block_size}")
    if not isinstance(sparsity, Pattern):
        return block_size
    if block_size > sparsity.m and block_size % sparsity.m:
        raise ValueError(f"expected a block size that is a multiple of M = {sparsity.m}, found {block_size}")
    return max(block_size, sparsity.m)


def _solve_block_(
    w_BO: Tensor,
    mask_BO: Tensor,
    r_BB: Tensor,
    sparsity: Pattern | Unstructured,
    quantize: QuantizeColumn | None,
    offset: int,
) -> Tensor:
    """Prune the columns of one block in place, left to right; returns their errors [B, O] for the columns after it.

    The error of a column reaches the next few columns at once and the rest of the block ``_STEP`` columns at a time.
    """
    diagonal = r_BB.diagonal().tolist()
    weight_B1 = r_BB.diagonal().square().reciprocal()[:, None]
    error_BO = torch.empty_like(w_BO)
    columns, m = len(w_BO), sparsity.m if isinstance(sparsity, Pattern) else 0
    if not isinstance(sparsity, Pattern):
        score_BO = w_BO.square() * weight_B1
        line = score_BO.flatten().sort().values[min(int(score_BO.numel() * sparsity.zeros), score_BO.numel() - 1)]
        torch.gt(score_BO, line, out=mask_BO)
    for left in range(0, columns, _STEP):
        right = min(left + _STEP, columns)
        for i in range(left, right):
            if isinstance(sparsity, Pattern) and i % m == 0:
                score_MO = w_BO[i : i + m].square() * weight_B1[i : i + m]
                mask_BO[i : i + m] = nm_mask(score_MO.t(), sparsity).t()
            column_O, error_O = w_BO[i], error_BO[i]
            kept_O = column_O * mask_BO[i]
            if quantize is not None:
                kept_O = quantize(kept_O, offset + i) * mask_BO[i]
            torch.sub(column_O, kept_O, out=error_O)
            error_O.div_(diagonal[i])
            w_BO[i + 1 : right].addr_(r_BB[i, i + 1 : right], error_O, alpha=-1)
            column_O.copy_(kept_O)
        w_BO[right:].addmm_(r_BB[left:right, right:].t(), error_BO[left:right], alpha=-1)
    return error_BO
