"""What every mask policy is: a module whose buffers go into each checkpoint, with hooks that the training loop calls.

Legend: O out_features, I in_features. Masks are bool, True = kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attached import CompressedWeight, compressed_weights, latent
from ..masks import magnitude_mask
from ..objective import TrainingError
from ..unstructured import unstructured_mask

Record = dict[str, Any]


@dataclass(frozen=True)
class SparseWeight:
    """One attached GEMM that a rule makes sparse."""

    name: str
    module: nn.Module
    parametrization: CompressedWeight

    @property
    def weight(self) -> Tensor:
        """The trained weight below mask and quantizer, as it is stored."""
        return latent(self.module)

    @property
    def mask_OI(self) -> Tensor:
        mask_OI = self.parametrization.mask_OI
        assert mask_OI is not None
        return mask_OI

    def oriented(self, stored: Tensor) -> Tensor:
        """A tensor of the stored weight's layout as [out_features, in_features]."""
        return stored.t() if self.parametrization.transposed else stored

    @property
    def w_OI(self) -> Tensor:
        return self.oriented(self.weight.detach())

    def support(self, x_OI: Tensor) -> Tensor:
        """Mask of the nearest matrix with this GEMM's sparsity (ALGORITHMS A.5, B.4): bool [O, I].

        Without structure the largest are kept per matrix; fused Q, K and V are three matrices.
        """
        if self.parametrization.pattern is not None:
            return magnitude_mask(x_OI, self.parametrization.pattern)
        assert self.parametrization.unstructured is not None
        zeros = self.parametrization.unstructured.zeros
        return torch.cat([unstructured_mask(part.abs(), zeros) for part in x_OI.chunk(self.parametrization.parts)])


def sparse_weights(student: nn.Module) -> tuple[SparseWeight, ...]:
    """Every attached GEMM with a mask, in model order."""
    found = (SparseWeight(*entry) for entry in compressed_weights(student))
    return tuple(entry for entry in found if entry.parametrization.mask_OI is not None)


class Policy(nn.Module):
    """How the masks of one stage move. This class is ``fixed``: they stay as they are (ASP, ALGORITHMS B.1).

    The parametrization multiplies by the mask, which masks the gradient too, so a pruned weight contributes nothing and
    cannot come back: the same as masking gradient and weight at each step.

    Hooks, in order: ``start_`` once, after a checkpoint was loaded; at each optimizer step ``after_backward_`` (all
    gradients there, averaged over processes, not yet clipped) and ``after_step_``; ``finish_`` at the end. State that a
    resumed run needs is in buffers, here and in the masks; everything else follows from the step. No random numbers are
    drawn, so data-parallel processes with equal weights keep equal masks.

    Args:
        student: attached model. It is not changed before ``start_``.
        total: optimizer steps of the stage.

    Attributes:
        total: as given; the policy may know better.
        period: steps of one learning rate schedule, after which it begins anew.

    Raises:
        TrainingError: the policy does not fit what is attached.
    """

    method = "fixed"

    def __init__(self, student: nn.Module, total: int) -> None:
        super().__init__()
        self.weights = sparse_weights(student)
        self.total = self.period = total

    def start_(self, step: int) -> list[Record]:
        """Begin, ``step`` optimizer steps being done; returns records for the log."""
        return []

    def after_backward_(self) -> None:
        """Change the gradients before they are clipped."""

    def after_step_(self, step: int, optimizer: torch.optim.Optimizer, epoch_ends: bool) -> list[Record]:
        """After the optimizer's step number ``step``, counted from 1; the rates are still those of that step."""
        return []

    @contextmanager
    def pruned(self) -> Iterator[None]:
        """Inside, the student is as it would be if training ended now."""
        yield

    def finish_(self) -> None:
        """Leave the final masks in force."""

    def release_(self) -> None:
        """Take everything off the student but its masks."""
        for entry in self.weights:
            entry.parametrization.apply_mask = None

    def _need_weights(self) -> None:
        if not self.weights:
            raise TrainingError(
                f"policy {self.method} moves masks, but no attached GEMM has sparsity: add it to a rule"
            )


def rates(optimizer: torch.optim.Optimizer, weights: Sequence[SparseWeight]) -> list[float]:
    """The learning rate that the optimizer used for each weight."""
    rate = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    return [rate[id(entry.weight)] for entry in weights]


def gradients_(weights: Sequence[SparseWeight]) -> list[Tensor]:
    """The gradient of each weight as it is stored; zeros are put where this batch left none."""
    found = []
    for entry in weights:
        if entry.weight.grad is None:
            entry.weight.grad = torch.zeros_like(entry.weight)
        found.append(entry.weight.grad)
    return found


def mask_similarity(previous: Sequence[Tensor], current: Sequence[Tensor]) -> tuple[float, list[float]]:
    """Share of the weights kept before that are kept still (NxMTransformer; ALGORITHMS B.9): over all, and per mask."""
    both = [int((p & c).sum()) for p, c in zip(previous, current, strict=True)]
    before = [int(p.sum()) for p in previous]
    return sum(both) / max(1, sum(before)), [b / max(1, n) for b, n in zip(both, before, strict=True)]
