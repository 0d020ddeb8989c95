"""Iterative magnitude pruning with rewinding (IMP), one global threshold over all matrices.

Chen et al. 2020, The Lottery Ticket Hypothesis for Pre-trained BERT Networks, arXiv:2007.12223; Antunes 2021, Best Way
to Squeeze, MSc thesis (ALGORITHMS B.6). A step of 0.1 is ten points of the original weights: with p events done, an
event takes 1 / (10 - p) of the survivors.

Legend: O out_features, I in_features; m mask, True = kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..backbone import backbone_parameters
from ..objective import TrainingError
from ..stages import Iterative
from ..unstructured import global_masks
from .base import Policy, Record


def amount(step: float, done: int) -> float:
    """Share of the survivors that the next event prunes, ``done`` events of ``step`` of the original weights before."""
    return 1 / (1 / step - done)


@torch.no_grad()
def prune_smallest(weights: Sequence[Tensor], masks: Sequence[Tensor], share: float) -> list[Tensor]:
    """New masks without the round(share * survivors) smallest |w| of all survivors together; pruned stay pruned.

    Among equals the lower index goes first, matrices counting in order, as the public code does (vector `imp_global`).
    """
    sizes = [float(w.abs().amax()) for w in weights]
    if not all(size < float("inf") for size in sizes):
        raise ValueError("expected finite weights, found NaN or infinity; no mask was made")
    total, survivors = sum(m.numel() for m in masks), sum(int(m.sum()) for m in masks)
    keep = survivors - round(share * survivors)
    scores = torch.cat([w.abs().masked_fill_(~m, -1).flatten() for w, m in zip(weights, masks, strict=True)])
    # From the end, since global_masks keeps the first of equals.
    kept = global_masks([scores.flip(0)], (total - keep) / total)[0].flip(0)
    return [part.view_as(m) for part, m in zip(kept.split([m.numel() for m in masks]), masks, strict=True)]


class IterativePolicy(Policy):
    """The ``iterative`` policy.

    Event 0 comes before any training, the others every ``interval`` steps; after each the whole backbone is set back to
    its first weights (the head is not, as in the public code) and optimizer and schedule start anew. The last interval
    trains under the final mask. ``start_from: rewound`` sets the backbone back once more at the end.

    The log has one record per event: weights pruned by it, zeros in all, sparsity over all matrices and of each.
    """

    method = "iterative"

    def __init__(self, student: nn.Module, settings: Iterative) -> None:
        super().__init__(student, 0)
        self._need_weights()
        self.settings = settings
        targets = {str(entry.parametrization.unstructured or entry.parametrization.pattern) for entry in self.weights}
        if len(targets) > 1 or self.weights[0].parametrization.unstructured is None:
            raise TrainingError(
                "policy iterative prunes all matrices with one threshold to one share of zeros, such as '70%'; found "
                + ", ".join(sorted(targets))
            )
        self.period = settings.interval
        self.total = settings.interval * settings.events(self.weights[0].parametrization.unstructured.zeros)
        self.backbone = tuple(backbone_parameters(student))
        for i, parameter in enumerate(self.backbone):
            self.register_buffer(f"first_{i}", parameter.detach().clone())

    def start_(self, step: int) -> list[Record]:
        if step:
            return []
        for entry in self.weights:
            entry.mask_OI.fill_(True)
        return [self._prune_(0)]

    def after_step_(self, step: int, optimizer: torch.optim.Optimizer, epoch_ends: bool) -> list[Record]:
        if step % self.settings.interval or step >= self.total:
            return []
        record = self._prune_(step // self.settings.interval)
        self._rewind_()
        optimizer.state.clear()
        return [record]

    def finish_(self) -> None:
        if self.settings.start_from == "rewound":
            self._rewind_()

    def _prune_(self, event: int) -> Record:
        masks = [entry.mask_OI for entry in self.weights]
        kept = sum(int(mask.sum()) for mask in masks)
        new = prune_smallest([entry.w_OI for entry in self.weights], masks, amount(self.settings.step, event))
        for entry, mask in zip(self.weights, new, strict=True):
            entry.mask_OI.copy_(mask)
        zeros = sum(int((~mask).sum()) for mask in masks)
        total = sum(mask.numel() for mask in masks)
        layers = {entry.name: 1 - float(entry.mask_OI.float().mean()) for entry in self.weights}
        return {
            "kind": "iterative", "event": event, "pruned": zeros - (total - kept), "zeros": zeros,
            "sparsity": zeros / total, "layers": layers,
        }  # fmt: skip

    @torch.no_grad()
    def _rewind_(self) -> None:
        for i, parameter in enumerate(self.backbone):
            parameter.copy_(self.get_buffer(f"first_{i}"))
