"""Mask policies: how the masks of a fine-tuning stage move."""

from __future__ import annotations

from torch import nn

from ..stages import Admm, Finetune, Iterative, SrSte
from .admm import AdmmPolicy
from .base import Policy
from .iterative import IterativePolicy
from .sr_ste import SrStePolicy

__all__ = ["AdmmPolicy", "IterativePolicy", "Policy", "SrStePolicy", "make_policy"]


def make_policy(student: nn.Module, stage: Finetune, total: int, steps_per_epoch: int, samples: int) -> Policy:
    """The policy of a stage, for a run of ``total`` optimizer steps (0 for ``iterative``, which knows its own
    number) on ``samples`` samples. ``student`` stays as it is.

    Raises:
        TrainingError: the policy does not fit what is attached.
    """
    settings = stage.policy
    if isinstance(settings, SrSte):
        return SrStePolicy(student, settings, total)
    if isinstance(settings, Admm):
        return AdmmPolicy(student, settings, total, steps_per_epoch, samples)
    if isinstance(settings, Iterative):
        return IterativePolicy(student, settings)
    return Policy(student, total)
