"""What ``bench_cpu`` and ``bench_gpu`` share: arguments, the loop over cells, the file they are kept in."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .bench_models import MODELS, BenchModel, chosen, make_inputs
from .eval.environment import environment
from .eval.grid import Cell, Grid, cells_table, environment_slug
from .eval.progress import progress_bar
from .eval.rounds import Call, measure

ROOT = Path(__file__).parent
_RATE_SIDE = 1024


class Bench(Protocol):
    """One model made ready on all engines; a context manager that frees them.

    ``failed``: engines that could not be made ready, and why.
    """

    failed: dict[str, str]

    def calls(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Call], dict[str, str]]:
        """What runs each engine once on a batch, and why those that cannot take this batch cannot."""

    def errors(self) -> dict[str, float]:
        """See `Cell.errors`, for the batch of the last `calls`."""


@dataclass(frozen=True)
class Job:
    """One benchmark.

    Args:
        device: ``cpu`` or ``cuda``. baseline, ours, peers: names of engines.
        ready: record of a model -> context with its engines.
    """

    device: str
    baseline: str
    ours: str
    peers: tuple[str, ...]
    ready: Callable[[BenchModel, argparse.Namespace], AbstractContextManager[Bench]]


def parse_arguments(what: str, text: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Of both commands."""
    parser = argparse.ArgumentParser(prog=f"python -m squeezoo.{what}", description=text)
    parser.add_argument("--models", help=f"comma-separated; default all: {','.join(MODELS)}")
    parser.add_argument("--batches", help="comma-separated; default 1,8,32, with --quick 1,8")
    parser.add_argument("--lengths", help="comma-separated tokens, instead of a text model's own (BERT: 128, 384)")
    parser.add_argument("--quick", action="store_true", help="5 s a cell instead of 20")
    parser.add_argument("--again", action="store_true", help="measure cells anew that are in the file")
    parser.add_argument("--no-peers", action="store_true", help="without the int8 peers in their own environment")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's")
    parser.add_argument("--max-call", type=float, default=30.0, help="skip cells whose dense call takes more seconds")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the result files")
    parsed = parser.parse_args(arguments)
    batches = parsed.batches or ("1,8" if parsed.quick else "1,8,32")
    parsed.batch_sizes = [int(batch) for batch in batches.split(",")]
    parsed.tokens = None if parsed.lengths is None else [int(length) for length in parsed.lengths.split(",")]
    parsed.seconds = 5.0 if parsed.quick else 20.0
    return parsed


def run(job: Job, settings: argparse.Namespace) -> list[Cell]:
    """Measure what is missing, print the table, return the cells that were asked for, in order."""
    from rich.console import Console

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    found = environment()
    grid = Grid(settings.results / f"{environment_slug(found, job.device)}.json", found)
    mark = stamp(found)
    keys: list[str] = []
    for model in chosen(settings.models):
        points = [(batch, size) for size in sizes_of(model, settings.tokens) for batch in settings.batch_sizes]
        keys += [_key(model, batch, size) for batch, size in points]
        missing = [p for p in points if settings.again or not _measured(grid, _key(model, *p), mark)]
        if missing:
            say(f"{model.name}: {len(missing)} of {len(points)} cells to measure")
            _measure_model(job, model, missing, settings, grid, mark)
    cells = [grid.cells[key] for key in keys]
    Console(width=None if sys.stdout.isatty() else 200).print(cells_table(cells, job.baseline, job.ours, job.peers))
    say(f"results: {grid.path}")
    return cells


def _measure_model(
    job: Job,
    model: BenchModel,
    points: list[tuple[int, tuple[int, int]]],
    settings: argparse.Namespace,
    grid: Grid,
    mark: str,
) -> None:
    dense = model.dense()
    limit = settings.max_call * dense_rate(job.device)
    fitting = []
    for batch, size in points:
        work = work_of(dense, make_inputs(dense, 1, size)) * batch
        if work > limit:
            guess = work / limit * settings.max_call
            why = f"skipped: some {guess:.0f} s a dense call, the limit is {settings.max_call:g}"
            grid.add_(Cell(model.name, batch, model.label(size), mark, skipped=why))
        else:
            fitting.append((batch, size, make_inputs(dense, batch, size)))
    if not fitting:
        return
    del dense  # the engines make their own, one after the other
    with job.ready(model, settings) as bench:
        for batch, size, inputs in fitting:
            calls, unable = bench.calls(inputs)
            with progress_bar(True, auto_refresh=False) as bar:
                line = bar.add_task(f"{model.name}, batch {batch}, {model.label(size)}", total=None)

                def tick(done: int, total: int, bar=bar, line=line) -> None:  # type: ignore[no-untyped-def]
                    bar.update(line, completed=done, total=total)
                    bar.refresh()

                engines = measure(calls, job.baseline, seconds=settings.seconds, tick=tick)
            failed = {**bench.failed, **unable}
            cell = Cell(model.name, batch, model.label(size), mark, engines, failed, bench.errors())
            grid.add_(cell)
            for name, reason in failed.items():
                say(f"  {cell.key}: {name} failed: {reason}")
            say(f"  {cell.key}: " + ", ".join(f"{n} {m.timing.median_ms:.1f} ms" for n, m in engines.items()))


def _measured(grid: Grid, key: str, mark: str) -> bool:
    """A skipped cell is not: the limit may be another one now."""
    return grid.has(key, mark) and grid.cells[key].skipped is None


def sizes_of(model: BenchModel, tokens: Sequence[int] | None) -> tuple[tuple[int, int], ...]:
    """Those of the model; ``tokens`` replaces what a text model reads, and leaves what it writes, images and sounds."""
    if tokens is None or model.unit != "tokens":
        return model.sizes
    return tuple(dict.fromkeys((count, written) for count in tokens for _, written in model.sizes))


def _key(model: BenchModel, batch: int, size: tuple[int, int]) -> str:
    return f"{model.name}/{batch}/{model.label(size)}"


def say(line: str) -> None:
    """One line on the error stream."""
    print(line, file=sys.stderr, flush=True)


def stamp(found: Mapping[str, object]) -> str:
    """What a measured cell depends on beside its name: the sources of models, engine and benchmark, and the
    libraries."""
    digest = hashlib.sha256()
    sources = [*ROOT.glob("bench_*.py"), *(ROOT / "compress" / "runtime").rglob("*"), *(ROOT / "models").glob("*.py")]
    for path in sorted(path for path in sources if path.suffix in (".py", ".cpp", ".h")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    digest.update(repr(sorted(found["libraries"].items())).encode())  # type: ignore[attr-defined]
    return digest.hexdigest()[:16]


def dense_rate(device: str) -> float:
    """Float32 operations per second of this device on a GEMM of 1024 x 1024 x 1024, for guessing how long a call
    takes."""
    from .eval.timing import clock_for

    a, b = (torch.randn(_RATE_SIDE, _RATE_SIDE, device=device) for _ in range(2))
    clock = clock_for(torch.device(device))
    return 2 * _RATE_SIDE**3 / (min(clock(lambda: a @ b) for _ in range(5)) / 1000)


def work_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Operations of one call, roughly: two per parameter of the linears and token."""
    tokens = max(tensor.shape[1] for tensor in inputs.values() if tensor.ndim == 2) if _is_text(inputs) else 0
    if not tokens:
        tokens = 197 if "pixel_values" in inputs else inputs["input_values"].shape[1] // 320
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return 2.0 * weights * tokens


def _is_text(inputs: Mapping[str, Tensor]) -> bool:
    return "input_ids" in inputs
