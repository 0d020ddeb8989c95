"""What all commands share: the application, the options of the same meaning, output and errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    name="squeezoo",
    help="Compressed transformers, never slower than dense: squeeze, load, evaluate, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)


class Backend(str, Enum):
    """What runs a checkpoint; see `squeezoo.compress.checkpoint.load`."""

    auto = "auto"
    int8 = "int8"
    cuda = "cuda"
    reference = "reference"
    dense = "dense"


class Energy(str, Enum):
    """How the energy of a run is told; see `squeezoo.eval.energy.measure_energy`."""

    off = "off"
    sensors = "sensors"
    estimate = "estimate"


Model = Annotated[str, typer.Argument(help="folder, zoo name, `minilm-l6`, `timm/<architecture>` or Hub id")]
DataDir = Annotated[Path | None, typer.Option(help="folder of official data files (else $SQUEEZOO_DATA, else the Hub)")]
JsonFlag = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Task = Annotated[str, typer.Option("--task", "-t", help="see `squeezoo tasks`")]
Out = Annotated[Path, typer.Option("--out", "-o", help="folder to write")]
MaxLength = Annotated[int | None, typer.Option(help="truncate to so many tokens; default: the task's own")]
Epochs = Annotated[float | None, typer.Option(help="of each training stage, instead of the recipe's")]
LearningRate = Annotated[float | None, typer.Option(help="instead of the recipe's")]
TrainBatch = Annotated[int | None, typer.Option(help="instead of the recipe's")]
Seed = Annotated[int | None, typer.Option(help="instead of the recipe's")]
Precision = Annotated[str | None, typer.Option(help="float32 or bfloat16 (autocast), instead of the recipe's")]
TrainRows = Annotated[int | None, typer.Option(help="train on so many rows only")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Restart = Annotated[bool, typer.Option(help="throw an unfinished run away instead of resuming it")]
EnergyOption = Annotated[
    Energy, typer.Option(help="write the run's energy.json: sensors (RAPL, NVML), or also a model where none is")
]
Repeats = Annotated[int, typer.Option(min=1, help="timed repeats of each model")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose expected errors become one message on the error stream and exit code 1."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (ValueError, RuntimeError, OSError) as error:
            err.print(f"[bold red]error:[/] {type(error).__name__}: ", end="", highlight=False)
            err.print(str(error), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            err.print("interrupted; the same command goes on from the last checkpoint")
            raise typer.Exit(130) from None

    name = function.__name__.rstrip("_").replace("_", "-")
    app.command(name, help=function.__doc__)(run)
    return run


def say(text: str) -> None:
    err.print(text, highlight=False)


def show_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def show_found(found: tuple[Any, Any], json_: bool) -> None:
    data, table = found
    if json_:
        show_json(data)
    elif isinstance(table, str):
        out.print(table, markup=False, highlight=False)
    else:
        out.print(table)


def show_card(made: Any, folder: Path, json_: bool) -> None:
    from .zoo_cards.tables import render_terminal

    if json_:
        show_json(made.to_dict())
        return
    for table in render_terminal(made):
        out.print(table)
    out.print(f"card: {folder / 'README.md'}", highlight=False, markup=False, soft_wrap=True)
