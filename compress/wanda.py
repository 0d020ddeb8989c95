"""Wanda: prune by |weight| x norm of its input (Sun et al., arXiv:2306.11695, equation 1; ALGORITHMS B.8).

Legend: O out_features, I in_features, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import Pattern, nm_mask
from .rules import Unstructured
from .unstructured import row_mask


class InputSquares:
    """Running sum of x^2 of each input feature. ``scaler_I`` is the sum over tokens divided by calibration sequences.

    Args:
        in_features: I. device: where the sums are kept, in float32.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        # sums, then the number of sequences: one tensor, so that one all-reduce carries both
        self.sums = torch.zeros(in_features + 1, device=device)

    @torch.no_grad()
    def add_(self, x_TI: Tensor, sequences: int) -> None:
        """Take the inputs of ``sequences`` calibration sequences; padding must be left out by the caller."""
        x_TI = x_TI.float()
        self.sums[:-1] += torch.linalg.vector_norm(x_TI, dim=0).square_()
        self.sums[-1] += sequences

    @property
    def scaler_I(self) -> Tensor:
        """sum over tokens of x_i^2 / sequences: [I], float32."""
        return self.sums[:-1] / self.sums[-1]


@torch.no_grad()
def wanda_mask(w_OI: Tensor, scaler_I: Tensor, sparsity: Pattern | Unstructured) -> Tensor:
    """Mask [O, I] of the largest ``|w| * sqrt(scaler)``: N of each M, or per row for unstructured sparsity.

    Args:
        w_OI: the weight. scaler_I: mean squared input per feature, `InputSquares.scaler_I`.

    Raises:
        ValueError: the sizes differ, or weight or scaler hold NaN.
    """
    if scaler_I.shape != w_OI.shape[1:]:
        raise ValueError(f"expected one scaler per in_feature, [{w_OI.shape[1]}], found {list(scaler_I.shape)}")
    metric_OI = w_OI.float().abs() * scaler_I.float().sqrt()
    if isinstance(sparsity, Pattern):
        return nm_mask(metric_OI, sparsity)
    return row_mask(metric_OI, sparsity.zeros)
