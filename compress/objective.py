"""The student and its loss as one module, which is all that the Trainer sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models import adapter_for
from ..models.adapter import find_sites
from ..models.dense import logits
from .distill import FeatureTap, hard_loss, mixed_loss
from .stages import Finetune

Batch = dict[str, Tensor]


class TrainingError(RuntimeError):
    """Training that cannot go on."""


class Objective(nn.Module):
    """Student plus loss as one module, so that the Trainer only sees ``loss = objective(**batch)``.

    It is not a ``PreTrainedModel`` on purpose: the Trainer then saves exactly ``state_dict()``, without the renaming
    of keys that ``save_pretrained`` does for some architectures.
    """

    def __init__(self, student: nn.Module, stage: Finetune, teacher: nn.Module | None, augment: Any, seed: int) -> None:
        super().__init__()
        self.student = student
        self.stage, self.augment, self.seed = stage, augment, seed
        self.step = 0
        # In a tuple: the teacher is no submodule, so it is neither trained nor saved nor put into training mode.
        self._teacher = (teacher,)
        if stage.distill is not None:
            assert teacher is not None
            kinds = stage.distill.features if stage.distill.feature else ()
            self._taps = tuple(FeatureTap(find_sites(m, adapter_for(m)), kinds) for m in (student, teacher))

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        if self.augment is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
            batch = self.augment(batch, generator)
        labels, teacher, config = batch.get("labels"), self._teacher[0], self.stage.distill
        if teacher is None or config is None:
            loss = hard_loss(logits(self.student, batch).float(), labels)
        else:
            student_tap, teacher_tap = self._taps
            with torch.no_grad(), teacher_tap:
                teacher_BC = logits(teacher, batch).float()
            with student_tap:
                student_BC = logits(self.student, batch).float()
            loss = mixed_loss(
                config,
                student_BC,
                teacher_BC,
                labels,
                student_tap.features,
                teacher_tap.features,
                batch.get("attention_mask"),
            )
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} at step {self.step}: lower the learning rate")
        return {"loss": loss}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The student's tensors; a tensor under two names (tied weights) is saved once, as safetensors demands."""
        state = super().state_dict(*args, **kwargs)
        seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
        for name, tensor in list(state.items()):
            key = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if tensor.numel() and key in seen:
                del state[name]
            seen.add(key)
        return state
