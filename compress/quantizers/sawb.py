"""SAWB and SAWB+: the clip value of a weight from its statistics (Choi et al., arXiv:1807.06964; Wang et al., NeurIPS
2022, section 2).

    alpha = c1 * sqrt(mean(w^2)) + c2 * mean(|w|)

Legend: O out_features, I in_features, G groups of rows that share a clip value, R rows of one group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .base import QuantizedWeight, Quantizer
from .rounding import (
    grouped,
    largest_level,
    no_zero_scale,
    one_per_row,
    quantize_int8,
    refuse_unusable,
    straight_through,
    widen,
)

Levels = Literal["zero-aligned", "full-range"]
Gradient = Literal["plus", "clipped"]
Fit = Literal["published", "own"]
Coefficients = tuple[float, float]

# foundation-model-stack/fms-model-optimizer, codes 103, 403, 703, 803 and, full range, 102 and those without a code.
PUBLISHED: dict[Levels, dict[int, Coefficients]] = {
    "zero-aligned": {2: (2.6, -1.71), 4: (12.035, -12.03), 7: (28.24, -30.81), 8: (31.76, -35.04)},
    "full-range": {
        2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.68, -12.80), 5: (17.74, -18.64), 8: (31.76, -35.04),
    },
}  # fmt: skip
# Line through the clip values of least squared error of six distributions (Gaussian, Laplace, logistic, uniform,
# triangle, von Mises), alpha / E|w| against sqrt(E w^2) / E|w|. The same procedure gives (3.114, -2.049) for 2 bits
# full range and (11.82, -11.86) for 4 bits zero-aligned: form and sign of the published ones.
OWN: dict[Levels, dict[int, Coefficients]] = {
    "zero-aligned": {3: (6.943, -6.305), 5: (16.926, -17.808), 6: (22.171, -23.992)},
    "full-range": {6: (22.278, -24.117), 7: (27.608, -30.438)},
}


def sawb_note(bits: int, levels: Levels = "zero-aligned", fit: Fit = "published") -> str:
    """What is used where no coefficients are known, and what could be written instead; "" where they are."""
    if sawb_coefficients(bits, levels, fit) is not None:
        return ""
    own = OWN[levels].get(bits)
    hint = f"; write `fit: own` for our own fit, {own[0]}, {own[1]}" if own else ""
    return f"no SAWB coefficients are published for {bits} bits, {levels}: the clip value is max|w| instead{hint}"


def sawb_coefficients(bits: int, levels: Levels = "zero-aligned", fit: Fit = "published") -> Coefficients | None:
    """(c1, c2) of the clip value, c2 negative; None where none are published and ``fit`` is not ``own``."""
    return PUBLISHED[levels].get(bits) or (OWN[levels].get(bits) if fit == "own" else None)


@torch.no_grad()
def sawb_alpha(w_GRI: Tensor, coefficients: Coefficients | None) -> Tensor:
    """Clip value of each group, [G, 1, 1]: by the statistics, or max|w| without coefficients.

    Below 0.5 * mean|w| it is max|w| too: nearly constant |w| would give a tiny or negative value (ALGORITHMS D.1). It
    may exceed max|w|. 0 for a group of zeros.
    """
    size = w_GRI.abs()
    peak = size.amax((1, 2), keepdim=True)
    if coefficients is None:
        return peak
    mean = size.mean((1, 2), keepdim=True)
    rms = size.square_().mean((1, 2), keepdim=True).sqrt_()
    alpha = coefficients[0] * rms + coefficients[1] * mean
    return torch.where(alpha < 0.5 * mean, peak, alpha)


def sawb_fake_quantize(
    w_GRI: Tensor, alpha_G11: Tensor, bits: int, levels: Levels = "zero-aligned", gradient: Gradient = "plus"
) -> Tensor:
    """Fake-quantize with a given clip value, which gets no gradient.

    zero-aligned: 2^k - 1 levels, ``clamp(round(w / step), -n, n) * step``, n = 2^(k-1) - 1, step = alpha / n.
    full-range: 2^k levels without zero. Gradient ``plus`` passes everywhere (SAWB+), ``clipped`` where |w| <= alpha.
    """
    step = no_zero_scale(alpha_G11 / largest_level(bits))
    divisor, top = no_zero_scale(alpha_G11), (1 << bits) - 1

    def zero_aligned(w: Tensor) -> Tensor:
        n = largest_level(bits)
        return (w / step).round_().clamp_(-n, n).mul_(step)

    def full_range(w: Tensor) -> Tensor:
        unit = (w / divisor).clamp_(-1, 1).mul_(0.5).add_(0.5)
        return unit.mul_(top).round_().mul_(2 / top).sub_(1).mul_(alpha_G11)

    rounded = zero_aligned if levels == "zero-aligned" else full_range
    return straight_through(w_GRI, rounded, alpha_G11 if gradient == "clipped" else None)


class SawbQuantizer(Quantizer):
    """SAWB of a weight. The clip value follows the dense latent weight of the moment, pruned entries included (D.5).

    Where no coefficients are published (and ``fit`` is not ``own``) the clip value is max|w|; ``note`` says so, and so
    does the plan.

    Args:
        bits: 2 to 8.
        groups: number of clip values: 1 per tensor, 3 for a fused QKV matrix, out_features per channel.
        levels, gradient, fit: see ``compress.rules.Sawb``.
    """

    calibrated: Tensor

    def __init__(
        self,
        bits: int,
        groups: int = 1,
        *,
        levels: Levels = "zero-aligned",
        gradient: Gradient = "plus",
        fit: Fit = "published",
    ) -> None:
        self.qp = largest_level(bits)
        super().__init__(bits)
        self.groups, self.levels, self.gradient = groups, levels, gradient
        self.coefficients = sawb_coefficients(bits, levels, fit)
        self.note = sawb_note(bits, levels, fit)
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))

    def fake_quantize(self, x: Tensor, update: bool = True) -> Tensor:
        w_GRI = grouped(widen(x), self.groups)
        alpha_G11 = sawb_alpha(w_GRI.detach(), self.coefficients)
        return sawb_fake_quantize(w_GRI, alpha_G11, self.bits, self.levels, self.gradient).flatten(0, 1).to(x.dtype)

    def init_from_weight_(self, w_OI: Tensor, mask_OI: Tensor | None = None) -> None:
        """Activate; the clip value always comes from the weight of the moment."""
        refuse_unusable(w_OI, "the weight to quantize")
        self.calibrated.fill_(True)
        self.active = True

    def _integers(self, w_OI: Tensor) -> QuantizedWeight:
        if self.levels == "full-range":
            raise ValueError(
                "full-range SAWB has no zero level and so no integers of a symmetric GEMM: write "
                "`levels: zero-aligned` in the recipe to store integers"
            )
        alpha_G11 = sawb_alpha(grouped(widen(w_OI), self.groups), self.coefficients)
        scale_O1 = one_per_row(no_zero_scale(alpha_G11 / self.qp), w_OI.shape[0])
        return QuantizedWeight(quantize_int8(w_OI, scale_O1, self.qp), scale_O1)

    def _weight_levels(self) -> tuple[int, int]:
        return -self.qp, self.qp

    def _calibrated(self) -> bool:
        return bool(self.calibrated)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, groups={self.groups}, levels={self.levels}, active={self.active}" + (
            f", {self.note}" if self.note else ""
        )
