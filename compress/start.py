"""What a run starts from, and what it refuses before it starts."""

from __future__ import annotations

from dataclasses import replace

from ..models.cut import cut_student
from ..models.dense import Dense
from .plan import Plan
from .recipe import Recipe, RecipeError


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
