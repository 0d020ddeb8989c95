"""What all commands share: the application, the options of the same meaning, output and errors."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from enum import Enum
from functools import wraps
from importlib.metadata import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

app = typer.Typer(
    name="squeezoo",
    help="Compressed transformers, never slower than dense: squeeze, load, evaluate, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)
RESUMED = ("quickstart", "finetune", "compress", "sweep")  # commands that keep what they have done


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
DenseModel = Annotated[
    str, typer.Argument(help="dense: folder, `minilm-l6`, `smollm2-135m`, `timm/<architecture>` or Hub id")
]
DataDir = Annotated[Path | None, typer.Option(help="folder of official data files (else $SQUEEZOO_DATA, else the Hub)")]
JsonFlag = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
Task = Annotated[str, typer.Option("--task", "-t", help="see `squeezoo tasks`")]
Out = Annotated[Path, typer.Option("--out", "-o", help="folder to write")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="truncate to so many tokens; default: the task's own")]
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
Repeats = Annotated[int, typer.Option(min=20, help="timed repeats of each model")]


def command(function: Callable[..., None], cls: type[TyperCommand] = TyperCommand) -> Callable[..., None]:
    """Register a command whose expected errors become one message on the error stream and exit code 1."""
    name = function.__name__.rstrip("_").replace("_", "-")

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            if kwargs.get("device", "cpu") != "cpu":
                from .eval.fit import check_device

                check_device(kwargs["device"])
            function(*args, **kwargs)
        except typer.Exit:  # a RuntimeError to Python
            raise
        except (ValueError, RuntimeError, OSError) as error:
            err.print(f"[bold red]error:[/] {type(error).__name__}: ", end="", highlight=False)
            err.print(str(error), markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except ImportError as error:
            hint = missing_extra(error)
            if hint is None:
                raise
            say(f"error: {hint}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt:
            goes_on = "; the same command goes on from the last checkpoint" if name in RESUMED else ""
            say(f"interrupted{goes_on}")
            raise typer.Exit(130) from None

    app.command(name, help=function.__doc__, cls=cls)(run)
    return run


class JsonOrFile(TyperCommand):
    """A command whose ``--json`` may be followed by a file; alone it means ``-``. typer has no such options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        found: list[str] = []
        for place, word in enumerate(args):
            found.append(word)
            following = args[place + 1] if place + 1 < len(args) else "-"
            if word == "--json" and "--" not in args[:place] and following.startswith("-"):
                found += [] if following == "-" and place + 1 < len(args) else ["-"]
        return super().parse_args(ctx, found)


def missing_extra(error: ImportError) -> str | None:
    """What to install for an optional package that is not there, as one line; None for any other failed import."""
    if "pip install" in str(error):
        return str(error)
    package = (error.name or "").partition(".")[0].replace("_", "-")
    for line in metadata("squeezoo").get_all("Requires-Dist") or ():
        found = re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", line)
        if found and isinstance(error, ModuleNotFoundError) and found[1].casefold() == package.casefold() != "":
            return f"this needs {found[1]}, which is not installed: pip install 'squeezoo[{found[2]}]'"
    return None


def say(text: str) -> None:
    err.print(text, highlight=False, markup=False, soft_wrap=True)


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
