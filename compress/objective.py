"""The student and its loss as one module, which is all that the Trainer sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .diagnose import find_fault
from .distill import Pair, full_precision, hard_loss, mixed_terms
from .heads import Batch, DistillError
from .observe import Observed, Observer, available_points, compared_points
from .patient import patient_terms
from .running_loss import RunningLoss
from .stages import Finetune, Patient
from .teacher_cache import TeacherCache

__all__ = ["Batch", "Objective", "TrainingError"]


class TrainingError(RuntimeError):
    """Training that cannot go on."""


class Objective(nn.Module):
    """Student plus loss as one module, so that the Trainer only sees ``loss = objective(**batch)``.

    It is not a ``PreTrainedModel`` on purpose: the Trainer then saves exactly ``state_dict()``, without the renaming
    of keys that ``save_pretrained`` does for some architectures.

    Args:
        student: with a head; which task it is follows from head and batch (`heads.task_kind`).
        teacher: a model, which is frozen and put into evaluation mode, or its outputs on disk; the batches then carry
            ``sample_id`` (`teacher_cache.Numbered`).
        augment: batch, generator -> batch.

    Attributes:
        step: set before each step; augmentation depends on it and the seed alone.
        samples_at: the places in the training data of the samples of a step, for messages, or None.
        penalty: an addition to the loss, called at each step, or None.
        running: of the losses, where the stage may stop at one; else None.
        terms: the weighted terms of the last loss, detached.
        projections: with ``project: true``, one linear map per pair from the student's width to the teacher's, trained
            with the student and no part of it (Romero et al. 2015, FitNets, section 2.2).

    Raises:
        DistillError: teacher and student that cannot be compared. Nothing was changed then.
    """

    def __init__(
        self, student: nn.Module, stage: Finetune, teacher: nn.Module | TeacherCache | None, augment: Any, seed: int
    ) -> None:
        super().__init__()
        self.stage, self.augment, self.seed = stage, augment, seed
        self.step = 0
        self.samples_at: Callable[[int], list[int]] | None = None
        self.penalty: Callable[[], Tensor | None] | None = None
        self.running = RunningLoss() if stage.stop_at_loss else None
        self.terms: dict[str, Tensor] = {}
        config = stage.distill
        ours, theirs = [], []
        if config is not None:
            if teacher is None:
                raise DistillError("this stage distils and has no teacher: pass the teacher, or leave out `distill`")
            if isinstance(teacher, TeacherCache) and augment is not None:
                raise DistillError("cached teacher outputs are those of the plain data: set cache: false to augment")
            of_teacher = teacher.available if isinstance(teacher, TeacherCache) else available_points(teacher, config)
            pairs = compared_points(available_points(student, config), of_teacher, config)
            ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        self.student = student
        # Observers are no modules: the teacher is neither trained nor saved nor put into training mode.
        only_first = isinstance(config, Patient) and config.token == "first"
        self._observe_student = Observer(student, ours, only_first)
        self._observe_teacher: Callable[[Batch, Observed], Observed] | None = None
        self._run_again: list[tuple[str, nn.Module, Observer]] = [("model", student, self._observe_student)]
        if isinstance(teacher, TeacherCache) and config is not None:
            self._observe_teacher = teacher.reader(theirs)
        elif isinstance(teacher, nn.Module) and config is not None:
            teacher.requires_grad_(False).eval()
            observer = Observer(teacher, theirs, only_first)
            self._observe_teacher = lambda batch, _: observer(batch)
            self._run_again = [("student", student, self._observe_student), ("teacher", teacher, observer)]
        self.projections = nn.ModuleList()
        if config is not None and getattr(config, "project", False):
            self.projections.extend(nn.Linear(a.width, b.width) for a, b in zip(ours, theirs, strict=True))

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        if self.augment is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
            batch = self.augment(batch, generator)
        terms = self._terms(batch)
        if self.penalty is not None and (penalty := self.penalty()) is not None:
            terms["penalty"] = penalty
        self.terms = {name: term.detach() for name, term in terms.items()}
        loss = torch.stack([*terms.values()]).sum()
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} at step {self.step} {self._reason(batch)}")
        return {"loss": loss}

    def _reason(self, batch: Batch) -> str:
        """Terms, samples, what broke first, and what to do about it."""
        terms = ", ".join(f"{name} {float(term):g}" for name, term in self.terms.items())
        samples = [] if self.samples_at is None else self.samples_at(self.step)
        more = ", ..." if len(samples) > 8 else ""
        told = f"({terms}), batch of samples {', '.join(map(str, samples[:8]))}{more}" if samples else f"({terms})"
        models = [
            (called, model, lambda observer=observer: observer(batch)) for called, model, observer in self._run_again
        ]
        fault = find_fault(batch, models)
        where = f": {fault.where}" if fault.where else ""
        if fault.kind == "data":
            made = "; augmentation made it" if self.augment is not None else ""
            return f"{told}{where}{made}: mend the training data, or leave this sample out"
        if self.step > 0:
            return f"{told}{where}: lower the learning rate"
        if fault.kind == "weights":
            return f"{told}{where} before any training: hand in a sound model"
        if self.stage.precision == "bfloat16":
            return f"{told}{where} before any training: try `precision: float32`"
        return f"{told}{where} before any training: try the model on this batch, and lower what weighs the loss's terms"

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        config = self.stage.distill
        if config is None or self._observe_teacher is None:
            student = self._observe_student(batch)
            return {"hard": hard_loss(student.scores, student.given)}
        student = self._observe_student(batch)
        with torch.no_grad():
            teacher = self._observe_teacher(batch, student)
        pairs = []
        for index, (ours, theirs) in enumerate(zip(student.features, teacher.features, strict=True)):
            if ours is not None and theirs is not None:
                ours = self.projections[index](ours) if self.projections else ours
                pairs.append(Pair(ours, theirs, student.masks[index]))
        scores = full_precision(student.scores), full_precision(teacher.scores)
        if isinstance(config, Patient):
            return patient_terms(config, *scores, student.given, pairs)
        return mixed_terms(config, *scores, student.given, pairs)

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
