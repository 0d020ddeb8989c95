"""Commands that measure: eval, roofline, verify, card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .terminal import (
    Backend,
    DataDir,
    Device,
    JsonFlag,
    JsonOrFile,
    MaxLength,
    Model,
    Repeats,
    app,
    command,
    out,
    say,
    show_card,
    show_json,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .eval.several import Outcome
    from .eval.task import Score, Task
    from .pipeline import Loaded


def eval_(
    model: Model,
    task: Annotated[str, typer.Option("--task", "-t", help="tasks or families (`glue`), separated by commas")],
    data_dir: DataDir = None,
    split: Annotated[str | None, typer.Option(help="default: the split that the task reports")] = None,
    backend: Annotated[Backend, typer.Option(help="for checkpoints")] = Backend.auto,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Annotated[int | None, typer.Option(help="so many rows only; the score is marked as a sample", min=1)] = None,
    max_length: MaxLength = None,
    set_: Annotated[list[str], typer.Option("--set", help="NAME=VALUE of the tasks' settings; repeat")] = [],  # noqa: B006
    device: Device = "cpu",
    throughput: Annotated[
        int | None,
        typer.Option(help="no scores: time so many evaluations, each beside its forward passes alone", min=3),
    ] = None,
    json_: Annotated[
        str | None,
        typer.Option("--json", metavar="[FILE]", help="write FILE after each task; alone: print JSON, no table"),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json-file", help="the same as --json FILE")] = None,
) -> None:
    """Score a model, dense or compressed, on standard tasks.

    Tasks of a family that the model cannot do, or whose data is not there, are named and left out. Exit code 1 where a
    task that was named in full has no score, or none has.

    Example: squeezoo eval runs/minilm-l6.mrpc.dense --task glue/mrpc --data-dir DATA
    """
    from .eval.allocator import keep_freed_memory
    from .eval.fit import requested_tasks, tasks_for
    from .eval.results import atomic_write_json, check_writable
    from .eval.several import evaluate_several
    from .measure_eval import describe_run, load_to_score, record_of, seed_of

    path = Path(json_) if json_ not in (None, "-") else json_file
    if json_file not in (None, path):
        raise ValueError(f"two files for one result: --json {json_} and --json-file {json_file}; give one")
    if path is not None:
        check_writable(path)
    requested = requested_tasks(task)
    settings = _pairs(set_, "--set", "VALUE")
    keep_freed_memory()
    loaded = load_to_score(model, backend.value, device)
    how: dict[str, Any] = dict(
        split=split, data_dir=data_dir, batch_size=batch_size, limit=limit, max_length=max_length, settings=settings,
        device=device,
    )  # fmt: skip
    if throughput is not None:
        _throughput(loaded, tasks_for(loaded.model, task), throughput, how, json_ == "-", path)
        return
    run = describe_run(model, loaded.model, backend.value, device)

    def keep(outcome: Outcome) -> None:
        if path is not None:
            atomic_write_json(path, record_of(run, outcome))

    outcome = evaluate_several(
        loaded.model, requested, loaded.processor,
        after=keep, skip=lambda one: say(f"skipped {one.task}: {one.reason}"), seed=seed_of(model), **how,
    )  # fmt: skip
    if json_ == "-":
        show_json(record_of(run, outcome))
    elif outcome.scores:
        _show_scores(outcome.scores)
    _tell_end(outcome, path)


command(eval_, JsonOrFile)


def _show_scores(scores: Sequence[Score]) -> None:
    from . import measure_tables

    table = Table("task", "split", "metric", "value", "samples")
    for score in scores:
        note = "" if score.complete else " (sample)"
        table.add_row(score.task, score.split, score.metric, f"{score.value:.4f}", f"{score.samples:,}{note}")
    out.print(table)
    means = measure_tables.glue_means_line(scores)
    if means is not None:
        out.print(means, highlight=False, markup=False, soft_wrap=True)


def _tell_end(outcome: Outcome, path: Path | None) -> None:
    """Say what has no score that should have one; raises typer.Exit then."""
    scored = len({score.task for score in outcome.scores})
    if outcome.stopped:
        where = f", in {path}" if path is not None and scored else ""
        say(f"interrupted with {scored} of {scored + len(outcome.skipped)} tasks scored{where}")
        raise typer.Exit(130)
    if not outcome.complete:
        wrong = [one.task for one in outcome.skipped if one.wrong]
        say(f"error: {'no score for ' + ', '.join(wrong) if wrong else 'nothing was scored'}")
        raise typer.Exit(1)


def _throughput(
    loaded: Loaded, tasks: Sequence[Task], rounds: int, how: dict[str, Any], json_: bool, json_file: Path | None
) -> None:
    """What the evaluation costs beside the model, as a table or JSON."""
    from . import measure_tables
    from .eval.results import atomic_write_json
    from .eval.throughput import measure_throughput

    found = [measure_throughput(loaded.model, one, loaded.processor, rounds=rounds, **how) for one in tasks]
    rows = [one.to_dict() for one in found]
    if json_file is not None:
        atomic_write_json(json_file, rows)
    if json_:
        show_json(rows)
        return
    for one in found:
        out.print(measure_tables.throughput_line(one), highlight=False, markup=False, soft_wrap=True)


@command
def roofline(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder or zoo name")],
    hardware: Annotated[str, typer.Option(help="A100-SXM-80GB, H100-SXM, ...; `cpu`: this one, measured first")],
    batch: Annotated[int, typer.Option(min=1)] = 8,
    length: Annotated[int, typer.Option(help="tokens, patches or frames of a row", min=1)] = 128,
    json_: JsonFlag = False,
) -> None:
    """Predict the time of a checkpoint's GEMMs on hardware that is not here. A model, never a measurement.

    Example: squeezoo roofline runs/minilm-l6.mrpc.gpusq-gemm-int8 --hardware H100-SXM --batch 32 --length 384
    """
    from .compress.checkpoint import load_manifest
    from .eval.hardware import get_hardware
    from .eval.roofline import predict_model
    from .eval.roofline_fit import this_cpu
    from .roofline_cpu import int8_kernels
    from .zoo_cards.hub import resolve

    plan = load_manifest(resolve(checkpoint)).plan.to_dict()
    on_cpu = hardware == "cpu"
    machine = this_cpu(int8_kernels()) if on_cpu else get_hardware(hardware)
    found = predict_model(plan["gemms"], batch * length, machine, dense_format="fp32" if on_cpu else "fp16")
    if json_:
        show_json(found.to_dict())
        return
    table = Table("GEMM", "dense us", "compressed us", "limit")
    for gemm in found.to_dict()["gemms"]:
        limit = f"{gemm['compute']}{' 2:4' if gemm['sparse_kernel'] else ''}, {gemm['compressed_bound']}"
        table.add_row(gemm["name"], f"{gemm['dense_us']:.2f}", f"{gemm['compressed_us']:.2f}", limit)
    out.print(table)
    out.print(str(found), highlight=False, markup=False, soft_wrap=True)
    out.print(f"efficiency factors: {found.factors()}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"rates: {machine.source}", highlight=False, markup=False, soft_wrap=True)


@command
def verify(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder or zoo name")], json_: JsonFlag = False
) -> None:
    """Prove a checkpoint: every file's SHA-256, then its golden output with each backend this machine has.

    Example: squeezoo verify runs/minilm-l6.mrpc.gpusq-gemm-int8
    """
    from .compress.verify import verify as prove
    from .zoo_cards.hub import resolve

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
    costs: Annotated[bool, typer.Option("--costs", help="also loading, memory, energy and the roofline model")] = False,
    decode: Annotated[int | None, typer.Option(help="with --costs: new tokens after each prompt", min=1)] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="with --costs: model power without a sensor")] = False,
    sweep: Annotated[Path | None, typer.Option(help="folder of the sweep that the settings come from")] = None,
    plots: Annotated[bool, typer.Option("--plots", help="draw what the card holds")] = False,
    json_: JsonFlag = False,
) -> None:
    """Render README.md from results.json; with --dense and --task, measure scores, sizes and speed first.

    Example: squeezoo card runs/minilm-l6.mrpc.gpusq-gemm-int8 --dense runs/minilm-l6.mrpc.dense --task glue/mrpc
    """
    from .pipeline import measure_card
    from .zoo_cards.card import Card
    from .zoo_cards.plots_card import write_plots
    from .zoo_cards.render import write_card

    if dense is None:
        made = Card.load(checkpoint)
        if plots:
            write_plots(made, checkpoint)
        write_card(made, checkpoint)
    elif task is None:
        raise ValueError("measuring needs a task: give --task together with --dense")
    else:
        made = measure_card(
            checkpoint, dense, task,
            commands=command_, batches=batch, lengths=length, variants=_pairs(also, "--also", "FOLDER"),
            data_dir=data_dir, max_length=max_length, repeats=repeats, included=included, limits=note,
            costs=costs, decode=decode, estimate=estimate, sweep=sweep, plots=plots, say=say,
        )  # fmt: skip
    show_card(made, checkpoint, json_)


def _pairs(pairs: list[str], option: str, what: str) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"{option} takes NAME={what}, found {pair!r}")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
