"""SR-STE: masks follow |W| at every step, pruned weights learn through the mask and decay towards zero.

Zhou et al. 2021, Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch, arXiv:2102.04010, equation 9
(ALGORITHMS B.5): W <- W - lr * (g(W * m) + decay * (1 - m) * W), m = the N:M mask of |W|.

Legend: O out_features, I in_features; m mask, True = kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..objective import TrainingError
from ..stages import SrSte
from .base import Policy, Record, gradients_, mask_similarity, rates


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w_OI: Tensor, mask_OI: Tensor) -> Tensor:
        return w_OI * mask_OI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor, None]:
        return grad_OI, None


class _MaskedQuantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_OI: Tensor, w_OI: Tensor, mask_OI: Tensor) -> Tensor:
        ctx.save_for_backward(mask_OI)
        return q_OI * mask_OI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor, Tensor, None]:
        (mask_OI,) = ctx.saved_tensors
        kept_OI = grad_OI * mask_OI
        return kept_OI, grad_OI - kept_OI, None


def straight_through(q_OI: Tensor, w_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """``q * mask``; its gradient reaches all entries of the weight, the pruned ones too.

    Args:
        q_OI: the quantized weight, or ``w_OI`` itself. Kept entries get their gradient through the quantizer, whose
            scale thus sees them alone; pruned ones get it straight.
        w_OI: the latent weight.
    """
    return _Masked.apply(w_OI, mask_OI) if q_OI is w_OI else _MaskedQuantized.apply(q_OI, w_OI, mask_OI)


def add_decay_(
    x: Sequence[Tensor], weights: Sequence[Tensor], masks: Sequence[Tensor], factor: Sequence[float]
) -> None:
    """``x += factor * (1 - m) * W`` for each matrix: on gradients with the decay, on weights with ``-lr * decay``."""
    for x_OI, w_OI, mask_OI, alpha in zip(x, weights, masks, factor, strict=True):
        x_OI.add_(w_OI.masked_fill(mask_OI, 0), alpha=alpha)


class SrStePolicy(Policy):
    """The ``sr_ste`` policy. The masks are recomputed after each step, once, and are those of the next forward pass.

    The log has one record per epoch: the share of weights kept at the last epoch's end that are kept still.
    """

    method = "sr_ste"

    def __init__(self, student: nn.Module, settings: SrSte, total: int) -> None:
        super().__init__(student, total)
        self.settings = settings
        self._need_weights()
        for entry in self.weights:
            if entry.parametrization.pattern is None:
                raise TrainingError(
                    f"policy sr_ste needs N:M sparsity, {entry.name} has {entry.parametrization.unstructured} zeros "
                    "without structure: write for example '2:4', or take policy admm"
                )
        for i, entry in enumerate(self.weights):
            self.register_buffer(f"last_{i}", torch.zeros_like(entry.mask_OI))

    def start_(self, step: int) -> list[Record]:
        for i, entry in enumerate(self.weights):
            if step == 0:
                entry.mask_OI.copy_(entry.support(entry.w_OI))
                self.get_buffer(f"last_{i}").copy_(entry.mask_OI)
            entry.parametrization.apply_mask = straight_through
        return []

    @torch.no_grad()
    def after_backward_(self) -> None:
        if self.settings.decay and not self.settings.decoupled:
            grads = [entry.oriented(g) for entry, g in zip(self.weights, gradients_(self.weights), strict=True)]
            self._add_decay_(grads, [self.settings.decay] * len(grads))

    @torch.no_grad()
    def after_step_(self, step: int, optimizer: torch.optim.Optimizer, epoch_ends: bool) -> list[Record]:
        if self.settings.decay and self.settings.decoupled:
            weights = [entry.w_OI for entry in self.weights]
            self._add_decay_(weights, [-rate * self.settings.decay for rate in rates(optimizer, self.weights)])
        for entry in self.weights:
            entry.mask_OI.copy_(entry.support(entry.w_OI))
        if not epoch_ends:
            return []
        last = [self.get_buffer(f"last_{i}") for i in range(len(self.weights))]
        masks = [entry.mask_OI for entry in self.weights]
        similarity, layers = mask_similarity(last, masks)
        for before, now in zip(last, masks, strict=True):
            before.copy_(now)
        names = [entry.name for entry in self.weights]
        return [{"kind": "sr_ste", "similarity": similarity, "layers": dict(zip(names, layers, strict=True))}]

    def _add_decay_(self, x: Sequence[Tensor], factor: Sequence[float]) -> None:
        add_decay_(x, [entry.w_OI for entry in self.weights], [entry.mask_OI for entry in self.weights], factor)
