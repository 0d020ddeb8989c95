"""The loss that decides whether a stage has trained enough (GPUSQ-TLM's thresholds; ALGORITHMS E.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DECAY = 0.98  # a step counts for some 50 of them


class RunningLoss(nn.Module):
    """Exponential mean of the losses of single steps, corrected for its beginning; part of every checkpoint."""

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64))  # weighted losses, weights

    @torch.no_grad()
    def add_(self, loss: Tensor) -> None:
        """Take a step's loss, a scalar; its mean over the processes that train together."""
        step = torch.stack([loss.detach().double(), torch.ones_like(loss, dtype=torch.float64)]).to(self.sums.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(step)
            step /= torch.distributed.get_world_size()
        self.sums.lerp_(step, 1 - DECAY)

    @property
    def value(self) -> float:
        """NaN before the first step."""
        losses, weights = self.sums.tolist()
        return losses / weights if weights else float("nan")
