"""Commands that time: bench, bench-engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .terminal import Backend, DataDir, Device, JsonFlag, Repeats, command, out, say, show_json


@command
def bench(
    checkpoint: Annotated[str, typer.Argument(help="checkpoint folder or zoo name")],
    batch: Annotated[list[int], typer.Option(help="repeat for several", min=1)] = [1, 8],  # noqa: B006
    length: Annotated[list[int], typer.Option(help="tokens; repeat for several; texts only")] = [128],  # noqa: B006
    seconds: Annotated[list[float], typer.Option(help="of sound; repeat for several; speech only")] = [10.0],  # noqa: B006
    decode: Annotated[int | None, typer.Option(help="also time so many new tokens after each prompt", min=1)] = None,
    loading: Annotated[bool, typer.Option(help="also time loading and read the memory, in fresh processes")] = False,
    dense: Annotated[str | None, typer.Option(help="with --loading: the dense model's folder")] = None,
    explain: Annotated[bool, typer.Option(help="also show which kernel each GEMM runs, and why")] = False,
    backend: Annotated[Backend, typer.Option(help="of the compressed model")] = Backend.auto,
    device: Device = "cpu",
    repeats: Repeats = 30,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's")] = None,
    json_: JsonFlag = False,
) -> None:
    """Time a checkpoint against its dense fp32 self, interleaved in one run: medians and spread.

    Example: squeezoo bench runs/minilm-l6.mrpc.gpusq-gemm-int8 --batch 8 --length 128
    """
    import torch

    from . import measure_tables as tables
    from .compress.checkpoint import load
    from .compress.runtime.select_table import explain_rows, selection_tables
    from .compress.runtime.selection import select_kernels_
    from .eval.decode_speed import benchmark_decode
    from .timings import measure_loadings, measure_speeds, points
    from .zoo_cards.hub import resolve

    if threads is not None:
        torch.set_num_threads(threads)
    folder = resolve(checkpoint)
    plain, squeezed = load(folder, backend="dense"), load(folder, backend=backend.value, device=device)
    conditions = points(plain, batch, length, seconds)
    speeds = measure_speeds(plain, squeezed, conditions, repeats, device=device, say=say)
    decoded = [
        benchmark_decode(
            plain, squeezed, batch=p.batch, prompt=p.sequence, new_tokens=decode, repeats=repeats, device=device
        )
        for p in conditions
        if decode is not None and p.sequence is not None
    ]
    loaded = measure_loadings(folder, dense, conditions[0], backend.value, device, say) if loading else []
    selection = select_kernels_(squeezed) if explain and backend is Backend.auto else None
    if explain and selection is None:
        say("--explain: kernels are selected with --backend auto alone")
    if json_:
        extra = {"decode": [d.to_dict() for d in decoded]} if decoded else {}
        extra |= {"loading": [part.to_dict() for part in loaded]} if loaded else {}
        extra |= {} if selection is None else {"selection": explain_rows(selection)}
        rows = [speed.to_dict() for speed in speeds]
        show_json({"speed": rows} | extra if extra else rows)
        return
    for table in (tables.speeds(speeds), tables.decoding(decoded), tables.loading(loaded)):
        if table is not None:
            out.print(table)
    if selection is not None:
        for chosen in selection_tables(selection):
            out.print(chosen)
        for note in selection.notes:
            say(note)
    out.print(f"{speeds[0].device}, {repeats} interleaved repeats, medians", highlight=False)


@command
def bench_engine(
    part: Annotated[list[str], typer.Option(help="mask, gemm, oneshot, step, loading; repeat; default: all")] = [],  # noqa: B006
    json_file: Annotated[Path | None, typer.Option("--json-file", help="write the record there, part by part")] = None,
    data_dir: DataDir = None,
    threads: Annotated[int, typer.Option(help="CPU threads", min=1)] = 2,
    json_: JsonFlag = False,
) -> None:
    """Time the engine itself: masks, sparse int8 kernels, one-shot pruning, a training step, loading.

    Example: squeezoo bench-engine --part mask
    """
    from .bench_engine import PARTS, engine_table, run_bench_engine

    record = run_bench_engine(part or PARTS, json_file, say, data_dir=data_dir, threads=threads)
    if json_:
        show_json(record)
    else:
        out.print(engine_table(record), highlight=False, markup=False, soft_wrap=True)
