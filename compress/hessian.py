"""The Hessian of a layer's reconstruction error, and the factor of its inverse that SparseGPT walks along.

Frantar & Alistarh, arXiv:2301.00774, section 3; ALGORITHMS B.7. Legend: I in_features, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of H that are made by one product; what lies left of the diagonal block is mirrored instead of computed.
_STRIP = 256
_RETRIES = 3


class HessianError(ValueError):
    """A Hessian that cannot be factorised."""


class Hessian:
    """H = (2 / sequences) * sum over tokens of x x^T, in float32.

    Args:
        in_features: I. device: where the I x I sum is kept.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(in_features + 1, in_features, device=device)  # the last row: the number of sequences

    @torch.no_grad()
    def add_(self, x_TI: Tensor, sequences: int) -> None:
        """Take the inputs of ``sequences`` calibration sequences; padding must be left out by the caller."""
        x_TI = x_TI.float()
        upper_II = self.sums[:-1]
        for left, right in _strips(x_TI.shape[1]):
            upper_II[left:right, left:].addmm_(x_TI[:, left:right].t(), x_TI[:, left:])
        self.sums[-1] += sequences

    @property
    def diagonal_I(self) -> Tensor:
        """Sum over tokens of x_i^2, without the factor."""
        return self.sums.diagonal()

    @torch.no_grad()
    def value_II(self) -> Tensor:
        """H, symmetric. The memory of the running sum is taken over: call it once, when all data has been seen."""
        h_II = self.sums[:-1]
        for left, right in _strips(h_II.shape[1]):
            h_II[right:, left:right] = h_II[left:right, right:].t()
        return h_II.mul_(2 / self.sums[-1, 0])


def _strips(in_features: int) -> list[tuple[int, int]]:
    return [(left, min(left + _STRIP, in_features)) for left in range(0, in_features, _STRIP)]


@dataclass(frozen=True)
class InverseFactor:
    """R with H^-1 = R^T R after damping, and the inputs that were zero on all calibration data.

    Args:
        r_II: upper triangular. dead_I: bool. damping: the factor that was used.
    """

    r_II: Tensor
    dead_I: Tensor
    damping: float


@torch.no_grad()
def factorise(hessian_II: Tensor, damping: float = 0.01) -> InverseFactor:
    """Upper Cholesky factor of the inverse of the damped Hessian.

    With J the reversal of the order of rows, J H J = L L^T gives H = U U^T with U = J L J upper triangular, so that
    R = U^-1: one factorisation and one triangular inverse, and H is never inverted.

    Args:
        hessian_II: symmetric, [I, I]; not changed.
        damping: share of the mean of the diagonal that is added to it. When the factorisation fails it is raised
            tenfold, at most three times.

    Raises:
        HessianError: not square, not finite, or not positive definite with any of the four dampings.
    """
    if hessian_II.dim() != 2 or hessian_II.shape[0] != hessian_II.shape[1]:
        raise HessianError(f"expected a square Hessian, found {list(hessian_II.shape)}")
    if not damping > 0:
        raise HessianError(f"expected a positive damping, found {damping}")
    if not bool(hessian_II.sum().isfinite()):
        raise HessianError("expected a finite Hessian, found NaN or infinity: the calibration activations hold some")
    dtype = torch.promote_types(hessian_II.dtype, torch.float32)
    dead_I = hessian_II.diagonal() == 0
    diagonal_I = hessian_II.diagonal().to(dtype).masked_fill(dead_I, 1)
    tried, step = damping, float(diagonal_I.mean())
    for _ in range(_RETRIES + 1):
        h_II = hessian_II.to(dtype).flip(0, 1)
        h_II.diagonal().copy_((diagonal_I + tried * step).flip(0))
        l_II, info = torch.linalg.cholesky_ex(h_II)
        del h_II  # these matrices are the largest things around
        if int(info) == 0 and bool(l_II.diagonal().isfinite().all()):
            u_II = l_II.flip(0, 1)
            del l_II
            eye_II = torch.eye(len(u_II), dtype=dtype, device=u_II.device)
            return InverseFactor(torch.linalg.solve_triangular(u_II, eye_II, upper=True, out=eye_II), dead_I, tried)
        tried *= 10
    raise HessianError(
        f"the Hessian is not positive definite even with damping {tried / 10:g}: more calibration data, or a larger "
        f"damping than {damping:g}, is needed"
    )
