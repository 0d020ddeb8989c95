"""Commands that make models: quickstart, plan, finetune, compress."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .terminal import (
    DataDir,
    DenseModel,
    Device,
    Energy,
    EnergyOption,
    Epochs,
    JsonFlag,
    LearningRate,
    MaxLength,
    Out,
    Precision,
    Restart,
    Seed,
    Task,
    TrainBatch,
    TrainRows,
    command,
    out,
    say,
    show_card,
    show_json,
)

EvalEachEpoch = Annotated[
    bool,
    typer.Option(
        "--eval-each-epoch",
        help="score the model after each epoch as it would be saved then, on the task's validation split or, where it "
        "has none, on a tenth of the training rows, which are not trained on then; goes to training_log.jsonl",
    ),
]


@command
def quickstart(
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="folder to write")] = Path("runs/quickstart"),
    restart: Restart = False,
    json_: JsonFlag = False,
) -> None:
    """Train a small ViT on real scans of digits, squeeze it, load it, measure it. Three minutes on two cores.

    Example: squeezoo quickstart --out runs/quickstart
    """
    from .quickstart import NAME, run_quickstart

    card = run_quickstart(out_dir, say, restart=restart)
    show_card(card, out_dir / NAME, json_)


@command
def plan(
    model: DenseModel,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="name or .yaml file, see `squeezoo recipes`")],
    json_: JsonFlag = False,
) -> None:
    """Show what a recipe would do to a model, GEMM by GEMM, before anything is done.

    Example: squeezoo plan minilm-l6 --recipe gpusq-gemm-int8
    """
    from .compress.plan import make_plan
    from .compress.recipe import Recipe
    from .pipeline import load_for

    chosen = Recipe.load(recipe)
    made = make_plan(load_for(model, None).model, chosen)
    if json_:
        show_json(made.to_dict())
    else:
        out.print(made.summary(), highlight=False, markup=False, soft_wrap=True)


@command
def permute(
    model: DenseModel,
    pattern: Annotated[str, typer.Option(help="N:M of the block GEMMs")] = "2:4",
    out_dir: Annotated[Path | None, typer.Option("--out", "-o", help="write the permuted dense model here")] = None,
    json_: JsonFlag = False,
) -> None:
    """What reordering channels brings to N:M sparsity: the share of the magnitude that is kept, GEMM by GEMM, and the
    proof that the dense model's outputs stay the same.

    Example: squeezoo permute minilm-l6 --pattern 2:4
    """
    from .compress.masks import Pattern
    from .compress.permute import describe_permuted, permute_dense_
    from .models.dense import save_dense
    from .pipeline import load_for

    chosen = Pattern.parse(pattern)
    dense = load_for(model, None)
    found, error = permute_dense_(dense.model, chosen)
    if out_dir is not None:
        save_dense(dense.model, dense.processor, out_dir)
    if json_:
        show_json({"gemms": [asdict(gemm) for gemm in found], "output_error": error})
        return
    table = Table("GEMM", "pattern", "kept before", "kept after")
    for gemm in found:
        table.add_row(gemm.name, gemm.pattern, f"{100 * gemm.kept_before:.2f} %", f"{100 * gemm.kept_after:.2f} %")
    out.print(table)
    out.print(f"{describe_permuted(found)}; outputs off by {error:.1e} of the largest", highlight=False)


@command
def finetune(
    model: DenseModel,
    task: Task,
    out_dir: Out,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="a recipe without rules")] = "dense",
    eval_each_epoch: EvalEachEpoch = False,
    data_dir: DataDir = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    batch_size: TrainBatch = None,
    seed: Seed = None,
    precision: Precision = None,
    max_length: MaxLength = None,
    limit: TrainRows = None,
    device: Device = "cpu",
    energy: EnergyOption = Energy.off,
    restart: Restart = False,
    json_: JsonFlag = False,
) -> None:
    """Fine-tune the dense baseline; writes an ordinary transformers or timm folder. Resumes when killed.

    What the command does not say is as in the task's paper: epochs, rate, batch of one device, length, and where it
    names them optimizer, schedule, warm-up and clipping.

    Example: squeezoo finetune minilm-l6 --task glue/mrpc --data-dir DATA --epochs 5 --out runs/minilm-l6.mrpc.dense
    """
    from .compress.engine import train_dense
    from .eval import get_task
    from .eval.environment import device_name
    from .pipeline import load_for, recording_energy, training_data

    of_task = get_task(task)
    paper = of_task.finetune if recipe == "dense" else None
    if paper is not None:
        say(f"settings that are not given: {paper}")
    dense = load_for(model, of_task, seed=seed or 0, retrain=True)
    chosen = _recipe(recipe, epochs, learning_rate, batch_size, seed, precision, paper=paper)
    trained_on, scores = _scored(eval_each_epoch, of_task, chosen, dense, data_dir, max_length, device)
    data = training_data(
        trained_on, dense.processor, data_dir=data_dir, max_length=max_length, limit=limit, model=dense.model
    )
    with recording_energy(out_dir, energy.value, device, restart):
        made = train_dense(
            dense, chosen, data, out_dir,
            evaluate=scores, device=device, restart=restart, hardware=device_name(device), say=say,
        )  # fmt: skip
    _show_run(made, json_)


@command
def compress(
    model: DenseModel,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="name or .yaml file, see `squeezoo recipes`")],
    out_dir: Out,
    task: Annotated[str | None, typer.Option("--task", "-t", help="trains on it; see `squeezoo tasks`")] = None,
    name: Annotated[str | None, typer.Option(help="<model>.<task>.<recipe>; default: the folder's name")] = None,
    pretrained: Annotated[str | None, typer.Option(help="the model before fine-tuning; pkd recipes need it")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="a dense model of the same task to learn from, instead of MODEL")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="N:M of attention maps, instead of the recipe's")] = None,
    blocks: Annotated[int | None, typer.Option(help="of a pkd recipe's student, instead of its own")] = None,
    permute: Annotated[bool, typer.Option("--permute", help="reorder channels so that N:M keeps more")] = False,
    eval_each_epoch: EvalEachEpoch = False,
    data_dir: DataDir = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    batch_size: TrainBatch = None,
    seed: Seed = None,
    precision: Precision = None,
    max_length: MaxLength = None,
    limit: TrainRows = None,
    device: Device = "cpu",
    energy: EnergyOption = Energy.off,
    restart: Restart = False,
    json_: JsonFlag = False,
) -> None:
    """Squeeze a fine-tuned dense model with a recipe and write a packed checkpoint. Resumes when killed.

    Example: squeezoo compress runs/minilm-l6.mrpc.dense -r gpusq-gemm-int8 -t glue/mrpc --data-dir DATA
    --out runs/minilm-l6.mrpc.gpusq-gemm-int8
    """
    from .compress.engine import compress as run
    from .eval import get_task
    from .eval.environment import device_name
    from .pipeline import load_for, recording_energy, training_data

    chosen = _recipe(recipe, epochs, learning_rate, batch_size, seed, precision, attention, permute or None, blocks)
    of_task = None if task is None else get_task(task)
    dense = load_for(model, of_task, seed=seed or 0)
    ancestor = None if pretrained is None else load_for(pretrained, of_task, seed=seed or 0)
    guide = None if teacher is None else load_for(teacher, of_task, seed=seed or 0)
    trained_on, scores = _scored(eval_each_epoch, of_task, chosen, dense, data_dir, max_length, device)
    data = None
    if trained_on is not None:
        data = training_data(
            trained_on, dense.processor, data_dir=data_dir, max_length=max_length, limit=limit, model=dense.model
        )
    with recording_energy(out_dir, energy.value, device, restart):
        made = run(
            dense, chosen, data, out_dir,
            name=name, pretrained=ancestor, teacher=guide, evaluate=scores, device=device, restart=restart,
            hardware=device_name(device), say=say,
        )  # fmt: skip
    _show_run(made, json_)


def _scored(
    wanted: bool, task: Any, recipe: Any, dense: Any, data_dir: Path | None, max_length: int | None, device: str
) -> tuple[Any, Any]:
    """The task to train on, and what scores a model after each epoch: None where that is not ``wanted``."""
    from .eval.held_out import scorer, with_validation

    if not wanted:
        return task, None
    if task is None or not recipe.needs_training:
        missing = (
            "a task: give --task" if task is None else f"training, and recipe {recipe.name} has none: leave it out"
        )
        raise ValueError(f"--eval-each-epoch needs {missing}")
    validation = with_validation(task)
    say(f"scored after each epoch: {validation.note}")
    scores = scorer(validation, dense.processor, data_dir=data_dir, max_length=max_length, device=device)
    return validation.task, scores


def _show_run(made: Any, json_: bool) -> None:
    if json_:
        show_json({"folder": str(made.folder), "plan": made.plan.to_dict(), "stages": made.stages})
        return
    if made.plan.gemms:
        plan = replace(made.plan, notes=())  # they were said before it began
        out.print(plan.summary(), highlight=False, markup=False, soft_wrap=True)
    out.print(f"wrote {made.folder}", highlight=False, markup=False, soft_wrap=True)


def _recipe(name: str, *values: Any, paper: Any = None) -> Any:
    from .compress.recipe import Recipe

    defaults = {} if paper is None else paper.settings()
    keys = ("epochs", "learning_rate", "batch_size", "seed", "precision", "attention", "permute_channels", "blocks")
    return Recipe.load(name).override(**defaults | {k: v for k, v in zip(keys, values) if v is not None})
