"""The command that tries many settings: sweep."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .terminal import (
    DataDir,
    DenseModel,
    Device,
    JsonFlag,
    MaxLength,
    Out,
    Task,
    TrainRows,
    command,
    out,
    say,
    show_json,
)


class SearchMethod(str, Enum):
    """How trials are drawn from a search space."""

    grid = "grid"
    random = "random"


@command
def sweep(
    model: DenseModel,
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
