"""The engine: plan, stages in list order, checkpoint. It never names an architecture.

Beside the output folder stands ``<out>.work`` while the run lasts: the state after each finished stage and the
Trainer's checkpoints of the running one. A run killed at any step and started again with the same arguments goes on
from there and ends with the same weights as an uninterrupted one (same hardware, same seed).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..models.dense import Dense, library_of, load_dense, save_dense
from .checkpoint import save_checkpoint
from .finetune import Evaluate
from .plan import Plan, make_plan
from .provenance import PROVENANCE, is_trained, read_provenance, write_provenance
from .recipe import Recipe, RecipeError
from .run import Run
from .start import foreign_teacher, refuse_unstorable, student_base
from .train_data import TrainData
from .work import RunError

TRAINING_LOG = "training_log.jsonl"  # what policies did and what was scored after each epoch, where there is any

__all__ = [
    "PROVENANCE",
    "Compressed",
    "Evaluate",
    "RunError",
    "compress",
    "is_trained",
    "read_provenance",
    "train_dense",
]


@dataclass(frozen=True)
class Compressed:
    """What ``compress`` made: the folder, the plan, one record per stage (name, steps, seconds, loss)."""

    folder: Path
    plan: Plan
    stages: tuple[dict[str, Any], ...]


def compress(
    model: Dense | nn.Module | str,
    recipe: Recipe | str,
    data: TrainData | None,
    out: str | Path,
    *,
    pretrained: Dense | None = None,
    teacher: Dense | nn.Module | str | None = None,
    evaluate: Evaluate | None = None,
    name: str | None = None,
    device: str = "cpu",
    restart: bool = False,
    save_seconds: float = 120.0,
    hardware: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Compressed:
    """Compress a dense model with a recipe and write a checkpoint folder.

    Args:
        model: the trained dense model, or the source of one (see ``load_dense``). It is not changed, and is the teacher
            of ``teacher: dense``.
        recipe: a recipe, or the name or path of one.
        data: training samples; None for recipes that neither train nor calibrate.
        out: the checkpoint folder to write.
        pretrained: the model before its fine-tuning, with a head for the task; for recipes whose student starts from
            its first blocks.
        teacher: a dense model, of any architecture, that every stage with ``teacher: dense`` learns from instead of
            ``model``. It must know the same labels and read the same inputs; feature maps need an adapter and equal
            widths, or ``project: true``. Its weights' sha256 stands in the training records.
        evaluate: model -> metrics; called after every epoch on the model as it would be saved then, and logged.
        name: of the checkpoint; default the folder's name.
        restart: throw an unfinished run in ``<out>.work`` away instead of resuming it.
        save_seconds: at least this long between two checkpoints of a training stage.
        hardware: what ``device`` is called, for the training record.
        say: receives one line per stage.

    Raises:
        AdapterError, DenseError, DistillError, PlanError, RecipeError: the recipe, a model or the teacher is refused;
            nothing was written.
        RunError: ``<out>.work`` holds an unfinished run of something else.
    """
    dense = _as_dense(model)
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    base = student_base(dense, recipe, pretrained)
    plan = make_plan(base.model, recipe)
    refuse_unstorable(plan)
    guide = dense if teacher is None else _as_dense(teacher)
    told = None if teacher is None else foreign_teacher(base, guide, recipe)
    run = Run(base, guide, recipe, data, device, restart, save_seconds, hardware, evaluate, say, told)
    student, work = run.stages(Path(out))
    folder = save_checkpoint(
        student, plan, recipe, out,
        name=name or Path(out).name, base={"name": dense.name, "revision": dense.revision},
        processor=dense.processor, training=tuple(work.records),
    )  # fmt: skip
    work.write_log(Path(folder) / TRAINING_LOG)
    work.remove()
    return Compressed(folder, plan, tuple(work.records))


def train_dense(
    dense: Dense,
    recipe: Recipe | str,
    data: TrainData,
    out: str | Path,
    *,
    evaluate: Evaluate | None = None,
    device: str = "cpu",
    restart: bool = False,
    save_seconds: float = 120.0,
    hardware: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Compressed:
    """Fine-tune the dense baseline with a recipe without rules and write an ordinary transformers / timm folder.

    A file ``squeezoo_training.json`` in it says what it was trained from and how.

    The same stages, seeds, batches and resume as ``compress``, so that dense and compressed compare.

    Raises:
        RecipeError: the recipe compresses something. RunError: as ``compress``.
    """
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    if recipe.rules:
        raise RecipeError(f"recipe {recipe.name} has rules; the dense baseline takes one without, such as `dense`")
    plan = make_plan(dense.model, recipe)
    run = Run(dense, dense, recipe, data, device, restart, save_seconds, hardware, evaluate, say)
    student, work = run.stages(Path(out))
    save_dense(student.to("cpu"), dense.processor, Path(out))
    write_provenance(dense, recipe, work, Path(out))
    work.write_log(Path(out) / TRAINING_LOG)
    work.remove()
    return Compressed(Path(out), plan, tuple(work.records))


def _as_dense(model: Dense | nn.Module | str) -> Dense:
    if isinstance(model, Dense):
        return model
    if isinstance(model, nn.Module):
        return Dense(model.eval(), None, type(model).__name__, None, library_of(model))
    return load_dense(model, kind="auto")
