"""Commands that make models: quickstart, plan, finetune, compress."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .terminal import (
    DataDir,
    Device,
    Energy,
    EnergyOption,
    Epochs,
    JsonFlag,
    LearningRate,
    MaxLength,
    Model,
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


class SearchMethod(str, Enum):
    """How trials are drawn from a search space."""

    grid = "grid"
    random = "random"


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
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="name or .yaml file, see `squeezoo recipes`")],
    json_: JsonFlag = False,
) -> None:
    """Show what a recipe would do to a model, GEMM by GEMM, before anything is done.

    Example: squeezoo plan minilm-l6 --recipe gpusq-gemm-int8
    """
    from .compress.plan import make_plan
    from .compress.recipe import Recipe
    from .models.dense import load_dense

    made = make_plan(load_dense(model, kind="auto").model, Recipe.load(recipe))
    if json_:
        show_json(made.to_dict())
    else:
        out.print(made.summary(), highlight=False, markup=False, soft_wrap=True)


@command
def permute(
    model: Model,
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
    from .models.dense import load_dense, save_dense

    dense = load_dense(model, kind="auto")
    found, error = permute_dense_(dense.model, Pattern.parse(pattern))
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
    model: Model,
    task: Task,
    out_dir: Out,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="a recipe without rules")] = "dense",
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

    Epochs, rate, batch and length are those of the task's paper where the command does not say them.

    Example: squeezoo finetune minilm-l6 --task glue/mrpc --data-dir DATA --epochs 5 --out runs/minilm-l6.mrpc.dense
    """
    from .compress.engine import train_dense
    from .eval import get_task
    from .eval.environment import device_name
    from .pipeline import load_for, recording_energy, training_data

    of_task = get_task(task)
    paper = of_task.finetune
    if recipe == "dense" and paper is not None and None in (epochs, learning_rate, batch_size):
        say(f"settings that are not given: {paper.source}")
        epochs = paper.epochs if epochs is None else epochs
        learning_rate = paper.learning_rate if learning_rate is None else learning_rate
        batch_size = paper.batch_size if batch_size is None else batch_size
    dense = load_for(model, of_task, seed=seed or 0)
    chosen = _recipe(recipe, epochs, learning_rate, batch_size, seed, precision)
    data = training_data(
        task, dense.processor, data_dir=data_dir, max_length=max_length, limit=limit, model=dense.model
    )
    with recording_energy(out_dir, energy.value, device):
        made = train_dense(
            dense, chosen, data, out_dir, device=device, restart=restart, hardware=device_name(device), say=say
        )
    _show_run(made, json_)


@command
def compress(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="name or .yaml file, see `squeezoo recipes`")],
    out_dir: Out,
    task: Annotated[str | None, typer.Option("--task", "-t", help="trains on it; see `squeezoo tasks`")] = None,
    name: Annotated[str | None, typer.Option(help="<model>.<task>.<recipe>; default: the folder's name")] = None,
    pretrained: Annotated[str | None, typer.Option(help="the model before fine-tuning; pkd recipes need it")] = None,
    attention: Annotated[str | None, typer.Option(help="N:M of attention maps, instead of the recipe's")] = None,
    blocks: Annotated[int | None, typer.Option(help="of a pkd recipe's student, instead of its own")] = None,
    permute: Annotated[bool, typer.Option("--permute", help="reorder channels so that N:M keeps more")] = False,
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
    data = None
    if task is not None:
        data = training_data(
            task, dense.processor, data_dir=data_dir, max_length=max_length, limit=limit, model=dense.model
        )
    with recording_energy(out_dir, energy.value, device):
        made = run(
            dense, chosen, data, out_dir,
            name=name, pretrained=ancestor, device=device, restart=restart, hardware=device_name(device), say=say,
        )  # fmt: skip
    _show_run(made, json_)


def _show_run(made: Any, json_: bool) -> None:
    if json_:
        show_json({"folder": str(made.folder), "plan": made.plan.to_dict(), "stages": made.stages})
        return
    if made.plan.gemms:
        out.print(made.plan.summary(), highlight=False, markup=False, soft_wrap=True)
    out.print(f"wrote {made.folder}", highlight=False, markup=False, soft_wrap=True)


def _recipe(name: str, *values: Any) -> Any:
    from .compress.recipe import Recipe

    keys = ("epochs", "learning_rate", "batch_size", "seed", "precision", "attention", "permute_channels", "blocks")
    return Recipe.load(name).override(**{k: v for k, v in zip(keys, values) if v is not None})


@command
def sweep(
    model: Model,
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="name or .yaml file, see `squeezoo recipes`")],
    task: Task,
    space: Annotated[Path, typer.Option(help="YAML file: setting -> list of values, or {low, high, log}")],
    out_dir: Out,
    method: Annotated[SearchMethod, typer.Option(help="every combination, or --trials draws")] = SearchMethod.grid,
    trials: Annotated[int | None, typer.Option(help="how many; needed for random", min=1)] = None,
    seed: Annotated[int, typer.Option(help="of the random draws")] = 0,
    storage: Annotated[str | None, typer.Option(help="URL of Optuna's storage; default: SQLite in --out")] = None,
    name: Annotated[str | None, typer.Option(help="of the study; default: recipe and task")] = None,
    pretrained: Annotated[str | None, typer.Option(help="the model before fine-tuning; pkd recipes need it")] = None,
    data_dir: DataDir = None,
    max_length: MaxLength = None,
    limit: TrainRows = None,
    device: Device = "cpu",
    held_out: Annotated[float, typer.Option(help="share of the training rows to choose on")] = 0.1,
    keep_all: Annotated[bool, typer.Option(help="keep every trial's model, not only the best one's")] = False,
    report: Annotated[bool, typer.Option(help="score the best trial on the reported split, once")] = False,
    retry_failed: Annotated[bool, typer.Option(help="try trials that failed again")] = False,
    json_: JsonFlag = False,
) -> None:
    """Try many settings of a recipe; the best is chosen on validation rows alone. Resumes; several can share the work.

    Example: squeezoo sweep runs/minilm-l6.mrpc.dense -r gpusq-gemm-int8 -t glue/mrpc --space lr.yaml --out sweep
    """
    from .sweep import run_sweep

    found = run_sweep(
        model, recipe, task, space, out_dir,
        method=method.value, trials=trials, seed=seed, storage=storage, name=name, pretrained=pretrained,
        data_dir=data_dir, max_length=max_length, limit=limit, device=device, held_out=held_out, keep_all=keep_all,
        report=report, retry_failed=retry_failed, say=say,
    )  # fmt: skip
    if json_:
        show_json(found.to_dict())
        return
    out.print(found.markdown(), highlight=False, markup=False, soft_wrap=True)
    out.print(f"wrote {out_dir / 'sweep.json'}", highlight=False, markup=False, soft_wrap=True)
