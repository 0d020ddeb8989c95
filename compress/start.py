"""What a run starts from, and what it refuses before it starts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..models.cut import cut_student
from ..models.dense import Dense, DenseError
from ..models.example import example_batch
from .distill import check_scores
from .finetune import stage_steps
from .fingerprint import weights_digest
from .heads import DistillError
from .observe import Observer, available_points, compared_points
from .plan import Plan
from .policies.admm import schedule_note
from .recipe import Recipe, RecipeError
from .stages import Admm, Finetune
from .train_data import TrainData


def student_base(dense: Dense, recipe: Recipe, pretrained: Dense | None) -> Dense:
    """The dense model that is compressed: the one handed in, or the first blocks of it or of its ancestor."""
    if recipe.student is None:
        return dense
    source = dense
    if recipe.student.weights == "pretrained":
        if pretrained is None:
            raise RecipeError(
                f"recipe {recipe.name} takes its student from the pre-trained model: pass `pretrained` (the model that "
                "was fine-tuned), or write `weights: teacher` to take the fine-tuned one's first blocks"
            )
        source = pretrained
    return replace(source, model=cut_student(source.model, recipe.student.blocks), processor=dense.processor)


def refuse_unstorable(plan: Plan) -> None:
    """Before hours of training: what the checkpoint could not hold at their end."""
    found = next((gemm for gemm in plan.gemms if gemm.weight and gemm.weight.get("levels") == "full-range"), None)
    if found is not None:
        raise RecipeError(
            f"full-range SAWB ({found.name}) has no zero level and no integers to store: write `levels: zero-aligned`; "
            "for the ablation use attach_, calibrate_ and finetune_ on a model in memory"
        )


def refuse_broken(dense: Dense) -> None:
    """A model with weights that are not finite gives NaN wherever it is run.

    Raises:
        DenseError: names the first such weight.
    """
    for name, parameter in dense.model.named_parameters():
        if not bool(torch.isfinite(parameter.detach()).all()):
            broken = int((~parameter.detach().isfinite()).sum())
            raise DenseError(
                f"{name} of {dense.name} holds NaN or infinity ({broken:,} of {parameter.numel():,} values): hand in a "
                "sound model, for example an earlier checkpoint, or fine-tune it again with a lower learning rate"
            )


def foreign_teacher(student: Dense, teacher: Dense, recipe: Recipe) -> dict[str, Any]:
    """Check a teacher that is another model than the student came from; returns what the training records say of it.

    Raises:
        RecipeError: no stage learns from it. DenseError: its head is untrained. DistillError: it knows other labels, or
            reads other inputs.
    """
    if not any(
        isinstance(s, Finetune) and s.distill is not None and s.distill.teacher == "dense" for s in recipe.stages
    ):
        raise RecipeError(f"recipe {recipe.name} learns from no dense teacher: leave the teacher out")
    if teacher.new:
        raise DenseError(f"the teacher {teacher.name} is not trained on this task: {teacher.new_note}")
    ours, theirs = (_vocabulary(dense.processor) for dense in (student, teacher))
    if ours is not None and theirs is not None and ours != theirs:
        raise DistillError(
            f"the teacher {teacher.name} has another tokenizer ({len(theirs):,} tokens, the student's {len(ours):,}): "
            "both read the same batches; take a teacher with the student's vocabulary"
        )
    ours, theirs = (getattr(getattr(d.model, "config", None), "label2id", None) for d in (student, teacher))
    if ours and theirs and ours.keys() == theirs.keys() and ours != theirs:
        raise DistillError(
            f"the teacher {teacher.name} numbers its labels {theirs}, the student {ours}: one order for both"
        )
    batch = {
        name: tensor.to(next(student.model.parameters()).device)
        for name, tensor in example_batch(student.model).items()
    }
    with torch.no_grad():
        scores, wanted = Observer(teacher.model)(batch).scores, Observer(student.model)(batch).scores
    check_scores(wanted, scores)
    return {"name": teacher.name, "revision": teacher.revision, "sha256": weights_digest(teacher.model)}


def _vocabulary(processor: Any) -> dict[str, int] | None:
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None


def refuse_unlike_teachers(student: nn.Module, teacher: nn.Module, recipe: Recipe, data: TrainData | None) -> None:
    """Every stage's student and teacher are compared before the first stage does any work.

    Args:
        student: its dense form, which has the shapes of ``teacher: previous`` too. teacher: that of ``teacher: dense``.

    Raises:
        DistillError: feature maps of other depths or widths; cached outputs of samples that are augmented.
    """
    for index, stage in enumerate(recipe.stages):
        if not isinstance(stage, Finetune) or stage.distill is None:
            continue
        other = teacher if stage.distill.teacher == "dense" else student
        try:
            compared_points(
                available_points(student, stage.distill), available_points(other, stage.distill), stage.distill
            )
            if stage.distill.cache and data is not None and data.augment is not None:
                raise DistillError("cached teacher outputs are those of the plain data: set cache: false to augment")
        except DistillError as error:
            raise DistillError(f"stage {index + 1} of recipe {recipe.name}: {error}") from error


def schedule_notes(recipe: Recipe, data: TrainData | None) -> list[str]:
    """What is likely too short about the stages' schedules."""
    notes = []
    for index, stage in enumerate(recipe.stages):
        if data is not None and isinstance(stage, Finetune) and isinstance(stage.policy, Admm):
            total, steps_per_epoch = stage_steps(stage, len(data.features))
            if note := schedule_note(stage.policy, total, steps_per_epoch, len(data.features)):
                notes.append(f"stage {index + 1}: {note}")
    return notes
