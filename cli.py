"""The command line: ``squeezoo --help``. Exit codes: 0 done, 1 refused or failed (one message), 2 wrong usage."""

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
from rich.table import Table

app = typer.Typer(
    name="squeezoo",
    help="Compressed transformers, never slower than dense: squeeze, load, evaluate, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

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
Repeats = Annotated[int, typer.Option(min=1, help="timed repeats of each model")]


class Backend(str, Enum):
    """What runs a checkpoint; see `squeezoo.compress.checkpoint.load`."""

    auto = "auto"
    int8 = "int8"
    reference = "reference"
    dense = "dense"


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


@command
def quickstart(
    out_dir: Annotated[Path, typer.Option("--out", "-o", help="folder to write")] = Path("runs/quickstart"),
    json_: JsonFlag = False,
) -> None:
    """Train a small ViT on real scans of digits, squeeze it, load it, measure it. Three minutes on two cores.

    Example: squeezoo quickstart --out runs/quickstart
    """
    from .quickstart import NAME, run_quickstart

    card = run_quickstart(out_dir, say)
    _show_card(card, out_dir / NAME, json_)


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
    restart: Restart = False,
    json_: JsonFlag = False,
) -> None:
    """Fine-tune the dense baseline; writes an ordinary transformers or timm folder. Resumes when killed.

    Example: squeezoo finetune minilm-l6 --task glue/mrpc --data-dir DATA --epochs 5 --out runs/minilm-l6.mrpc.dense
    """
    from .compress.engine import train_dense
    from .eval import get_task
    from .eval.environment import device_name
    from .pipeline import load_for, training_data

    dense = load_for(model, get_task(task), seed=seed or 0)
    chosen = _recipe(recipe, epochs, learning_rate, batch_size, seed, precision)
    data = training_data(
        task, dense.processor, data_dir=data_dir, max_length=max_length, limit=limit, model=dense.model
    )
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
    data_dir: DataDir = None,
    epochs: Epochs = None,
    learning_rate: LearningRate = None,
    batch_size: TrainBatch = None,
    seed: Seed = None,
    precision: Precision = None,
    max_length: MaxLength = None,
    limit: TrainRows = None,
    device: Device = "cpu",
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
    from .pipeline import load_for, training_data

    chosen = _recipe(recipe, epochs, learning_rate, batch_size, seed, precision, attention)
    of_task = None if task is None else get_task(task)
    dense = load_for(model, of_task, seed=seed or 0)
    ancestor = None if pretrained is None else load_for(pretrained, of_task, seed=seed or 0)
    data = None
    if task is not None:
        data = training_data(
            task, dense.processor, data_dir=data_dir, max_length=max_length, limit=limit, model=dense.model
        )
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

    keys = ("epochs", "learning_rate", "batch_size", "seed", "precision", "attention")
    return Recipe.load(name).override(**{k: v for k, v in zip(keys, values) if v is not None})


@command
def eval_(
    model: Model,
    task: Annotated[str, typer.Option("--task", "-t", help="one or several, separated by commas")],
    data_dir: DataDir = None,
    split: Annotated[str | None, typer.Option(help="default: the split that the task reports")] = None,
    backend: Annotated[Backend, typer.Option(help="for checkpoints")] = Backend.auto,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Annotated[int | None, typer.Option(help="so many rows only; the score is marked as a sample")] = None,
    max_length: MaxLength = None,
    json_: JsonFlag = False,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="write the scores there too")] = None,
) -> None:
    """Score a model, dense or compressed, on standard tasks.

    Example: squeezoo eval runs/minilm-l6.mrpc.dense --task glue/mrpc --data-dir DATA
    """
    from .eval import get_task
    from .eval.results import atomic_write_json
    from .eval.run import evaluate
    from .pipeline import load_any

    tasks = [get_task(name.strip()) for name in task.split(",")]
    loaded = load_any(model, backend.value)
    scores = [
        score
        for one in tasks
        for score in evaluate(
            loaded.model, one, loaded.processor,
            split=split, data_dir=data_dir, batch_size=batch_size, limit=limit, max_length=max_length,
        )
    ]  # fmt: skip
    rows = [score.to_dict() for score in scores]
    if json_file is not None:
        atomic_write_json(json_file, rows)
    if json_:
        show_json(rows)
        return
    table = Table("task", "split", "metric", "value", "samples")
    for score in scores:
        note = "" if score.complete else " (sample)"
        table.add_row(score.task, score.split, score.metric, f"{score.value:.4f}", f"{score.samples:,}{note}")
    out.print(table)


@command
def bench(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder or zoo name")],
    batch: Annotated[list[int], typer.Option(help="repeat for several", min=1)] = [1, 8],  # noqa: B006
    length: Annotated[list[int], typer.Option(help="tokens; repeat for several; ignored for images")] = [128],  # noqa: B006
    backend: Annotated[Backend, typer.Option(help="of the compressed model")] = Backend.auto,
    repeats: Repeats = 30,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's")] = None,
    json_: JsonFlag = False,
) -> None:
    """Time a checkpoint against its dense fp32 self, interleaved in one run: medians and spread.

    Example: squeezoo bench runs/minilm-l6.mrpc.gpusq-gemm-int8 --batch 8 --length 128
    """
    import torch

    from .compress.checkpoint import load
    from .pipeline import measure_speeds, points, resolve

    if threads is not None:
        torch.set_num_threads(threads)
    folder = resolve(checkpoint)
    dense, compressed = load(folder, backend="dense"), load(folder, backend=backend.value)
    speeds = measure_speeds(dense, compressed, points(dense, batch, length), repeats)
    if json_:
        show_json([speed.to_dict() for speed in speeds])
        return
    table = Table("batch", "length", "dense ms", "compressed ms", "speed-up", "p10-p90")
    for speed in speeds:
        low, high = speed.speedup_spread
        table.add_row(
            str(speed.batch), str(speed.sequence or speed.image_size), f"{speed.dense.median_ms:.2f}",
            f"{speed.compressed.median_ms:.2f}", f"{speed.speedup:.2f}x", f"{low:.2f}-{high:.2f}",
        )  # fmt: skip
    out.print(table)
    out.print(f"{speeds[0].device}, {repeats} interleaved repeats, medians", highlight=False)


@command
def verify(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder or zoo name")], json_: JsonFlag = False
) -> None:
    """Prove a checkpoint: every file's SHA-256, then its golden output with each backend this machine has.

    Example: squeezoo verify runs/minilm-l6.mrpc.gpusq-gemm-int8
    """
    from .compress.verify import verify as prove
    from .pipeline import resolve

    found = prove(resolve(checkpoint))
    if json_:
        show_json(found.to_dict())
        return
    integer = found.int8_reason if found.int8_error is None else f"off by {found.int8_error:.1e}"
    out.print(
        f"{found.name}: {found.files} files intact; golden output: reference off by {found.reference_error:.1e}, "
        f"int8 {integer} (relative to the largest output)",
        highlight=False,
    )


app.command("load-check", help="The same as `verify`.")(verify)


@command
def card(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint folder")],
    dense: Annotated[Path | None, typer.Option(help="the dense model's folder: measure anew, then render")] = None,
    task: Annotated[str | None, typer.Option("--task", "-t", help="with --dense: the task to score")] = None,
    also: Annotated[list[str], typer.Option(help="NAME=FOLDER of another checkpoint to put beside it")] = [],  # noqa: B006
    command_: Annotated[list[str], typer.Option("--command", help="shell line that made it; repeat in order")] = [],  # noqa: B006
    note: Annotated[list[str], typer.Option(help="a limit worth telling; repeat")] = [],  # noqa: B006
    data_dir: DataDir = None,
    batch: Annotated[list[int], typer.Option(help="to time; repeat for several", min=1)] = [1, 8],  # noqa: B006
    length: Annotated[list[int], typer.Option(help="tokens to time; ignored for images")] = [128],  # noqa: B006
    max_length: MaxLength = None,
    repeats: Repeats = 30,
    included: Annotated[bool, typer.Option(help="the weights are published with the card")] = False,
    json_: JsonFlag = False,
) -> None:
    """Render README.md from results.json; with --dense and --task, measure scores, sizes and speed first.

    Example: squeezoo card runs/minilm-l6.mrpc.gpusq-gemm-int8 --dense runs/minilm-l6.mrpc.dense --task glue/mrpc
    """
    from .pipeline import measure_card
    from .zoo_cards.card import Card
    from .zoo_cards.render import write_card

    if dense is None:
        made = Card.load(checkpoint)
        write_card(made, checkpoint)
    elif task is None:
        raise ValueError("measuring needs a task: give --task together with --dense")
    else:
        made = measure_card(
            checkpoint, dense, task,
            commands=command_, batches=batch, lengths=length, variants=_variants(also), data_dir=data_dir,
            max_length=max_length, repeats=repeats, included=included, limits=note, say=say,
        )  # fmt: skip
    _show_card(made, checkpoint, json_)


def _variants(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"--also takes NAME=FOLDER, found {pair!r}")
    return {name: folder for name, _, folder in (pair.partition("=") for pair in pairs)}


def _show_card(made: Any, folder: Path, json_: bool) -> None:
    from .zoo_cards.tables import render_terminal

    if json_:
        show_json(made.to_dict())
        return
    for table in render_terminal(made):
        out.print(table)
    out.print(f"card: {folder / 'README.md'}", highlight=False, markup=False, soft_wrap=True)


@command
def publish(
    folder: Annotated[Path, typer.Argument(help="checkpoint folder with results.json")], json_: JsonFlag = False
) -> None:
    """Put a measured checkpoint into this source checkout's zoo: card, small weights, index, README table.

    Example: squeezoo publish runs/quickstart/digits-vit.digits.gpusq-gemm-int8
    """
    from .zoo_cards.publish import publish as run
    from .zoo_cards.publish import update_table

    target = run(folder)
    update_table()
    if json_:
        show_json({"folder": str(target)})
    else:
        out.print(f"published {target}", highlight=False, markup=False, soft_wrap=True)


@command
def list_(
    pattern: Annotated[str, typer.Argument(help="shell wildcard over the names")] = "*", json_: JsonFlag = False
) -> None:
    """The zoo: published compressed models.

    Example: squeezoo list 'minilm*'
    """
    from . import catalog

    _show(catalog.zoo(pattern), json_)


@command
def info(name: Annotated[str, typer.Argument(help="zoo name")], json_: JsonFlag = False) -> None:
    """Everything the index knows about one published model.

    Example: squeezoo info digits-vit.digits.gpusq-gemm-int8
    """
    from . import catalog

    _show(catalog.zoo_entry(name), json_)


@command
def export(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint folder or a zoo name")],
    to: Annotated[str, typer.Option("--to", help="dense or compressed-tensors")],
    out_dir: Out,
    json_: JsonFlag = False,
) -> None:
    """Write a checkpoint as a folder that transformers (dense) or vLLM (compressed-tensors) loads without Squeezoo.

    Example: squeezoo export runs/minilm-l6.mrpc.gpusq-gemm-int8 --to compressed-tensors --out exported
    """
    from .compress.export import export as run
    from .zoo_cards.hub import resolve

    made = run(resolve(checkpoint), to, out_dir)  # type: ignore[arg-type]
    if json_:
        show_json({"folder": str(made.folder), "notes": list(made.notes)})
        return
    for note in made.notes:
        say(f"note: {note}")
    out.print(f"wrote {made.folder}", highlight=False, markup=False, soft_wrap=True)


@command
def adapters(
    show: Annotated[str | None, typer.Option(help="print one adapter's record")] = None,
    check: Annotated[str | None, typer.Option(help="run the self-test on a model: folder, name or Hub id")] = None,
    json_: JsonFlag = False,
) -> None:
    """The architectures that can be squeezed, built in and from installed packages; or what an adapter does to a model.

    Example: squeezoo adapters --check runs/minilm-l6.mrpc.dense
    """
    from . import catalog

    if check is None:
        _show(catalog.adapters() if show is None else catalog.adapter(show), json_)
        return
    data, table = catalog.check(check)
    _show((data, table), json_)
    if any(entry["passed"] is False for entry in data):
        raise typer.Exit(1)


@command
def recipes(
    show: Annotated[str | None, typer.Option(help="print one recipe, all defaults written out")] = None,
    json_: JsonFlag = False,
) -> None:
    """The built-in recipes.

    Example: squeezoo recipes --show gpusq-gemm-int8
    """
    from . import catalog

    _show(catalog.recipes() if show is None else catalog.recipe(show), json_)


@command
def tasks(json_: JsonFlag = False) -> None:
    """The evaluation tasks.

    Example: squeezoo tasks
    """
    from . import catalog

    _show(catalog.tasks(), json_)


@command
def doctor(json_: JsonFlag = False) -> None:
    """Versions, processor and GPU features, and what the runtime can use here.

    Example: squeezoo doctor
    """
    from . import catalog

    _show(catalog.doctor(), json_)


def _show(found: tuple[Any, Any], json_: bool) -> None:
    data, table = found
    if json_:
        show_json(data)
    elif isinstance(table, str):
        out.print(table, markup=False, highlight=False)
    else:
        out.print(table)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
