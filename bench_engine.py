"""`squeezoo bench-engine`: how fast and how small the engine itself is, beside the targets set for it.

Five parts. ``mask``: an N:M mask against top-k and against the public search over all patterns. ``gemm``: 2:4 int8
weights against dense int8 ones (`bench_gemm`). ``oneshot``: SparseGPT, Wanda and magnitude 2:4 of SmolLM2-135M in
processes of their own. ``step``: a training step with fake quantization against the dense one (`bench_step`).
``loading``: a packed BERT-base against its dense safetensors, in fresh processes (`bench_loading`). Times are medians,
of calls made in turn.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .bench_oneshot import CALIBRATED, METHODS, Calibration, Job, run_job

PARTS = ("mask", "gemm", "oneshot", "step", "loading")
PATTERNS = ("2:4", "1:4", "2:8", "4:8")
RESULTS = Path(__file__).parent / "results"
Say = Callable[[str], None]


def run_bench_engine(
    parts: Sequence[str] = PARTS,
    out: Path | None = None,
    say: Say = lambda _: None,
    *,
    data_dir: str | Path | None = None,
    threads: int = 2,
    repeats: int = 15,
    size: int = 4096,
    oneshot_model: str = "smollm2-135m",
    methods: Sequence[str] = METHODS,
    calibrations: Sequence[Calibration] = ("first", "even"),
    oneshot: Mapping[str, Any] | None = None,
    step_model: str = "minilm-l6",
    batch: int = 32,
    sequence: int = 128,
    loading_model: str = "bert-base",
) -> dict[str, Any]:
    """Measure ``parts``; the record holds the environment and, per part, figures and which targets they meet.

    Args:
        out: a JSON file, written after each part; default ``results/engine-<environment>.json`` beside the code. Parts
            that are in it from the same environment stay. say: progress.
        data_dir: holds WikiText-2 (part ``oneshot``); default ``$SQUEEZOO_DATA``. threads: of PyTorch.
        repeats: timed calls of each contender. size: rows and columns of the mask's matrix.
        oneshot_model, step_model: sources of `load_dense`. methods: of one-shot pruning.
        calibrations: see `Job`; each is a run of Wanda and of SparseGPT. ``oneshot``: further fields of `Job`.
        batch, sequence: of the training step. loading_model: one of `bench_models.MODELS`.

    Raises:
        ValueError: an unknown part or method, no data folder; nothing was measured.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"expected parts out of {', '.join(PARTS)}, found {', '.join(unknown)}")
    if unknown := [method for method in methods if method not in METHODS]:
        raise ValueError(f"expected methods out of {', '.join(METHODS)}, found {', '.join(unknown)}")
    import torch

    from .eval.environment import device_name, environment
    from .eval.files import resolve_data_dir
    from .eval.grid import environment_slug
    from .eval.results import atomic_write_json

    folder = resolve_data_dir(data_dir) if "oneshot" in parts else None
    if "oneshot" in parts and folder is None:
        raise ValueError("part oneshot needs WikiText-2: give --data-dir, or set SQUEEZOO_DATA")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    record: dict[str, Any] = {"device": device_name(), "environment": environment(), "threads": threads, "parts": {}}
    out = out or RESULTS / f"engine-{environment_slug(record['environment'], 'cpu')}.json"
    earlier = _earlier_parts(out, record)
    try:
        for part in parts:
            say(f"part {part}")
            if part == "mask":
                found: Any = mask_part(size, repeats, say)
            elif part == "gemm":
                from .bench_gemm import gemm_part

                found = gemm_part(repeats, say)
            elif part == "step":
                from .bench_step import step_part

                found = step_part(step_model, batch, sequence, repeats, say)
            elif part == "loading":
                from .bench_loading import loading_part

                found = loading_part(loading_model, threads, say)
            else:
                fields = {"threads": threads, **(oneshot or {})}
                jobs = [
                    Job(
                        method,
                        oneshot_model,
                        str(folder),
                        calibration=calibration,
                        offload=method == "sparsegpt",
                        **fields,
                    )
                    for method in methods
                    for calibration in (calibrations if method in CALIBRATED else calibrations[:1])
                ]
                found = oneshot_part(jobs, say)
            record["parts"][part] = found
            out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(out, {**record, "parts": earlier | record["parts"]})
    finally:
        torch.set_num_threads(before)
    say(f"results: {out}")
    return record


def _earlier_parts(out: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds of the same environment."""
    try:
        earlier = json.loads(out.read_text())
    except (OSError, ValueError):
        return {}
    same = all(earlier.get(name) == record[name] for name in ("device", "environment", "threads"))
    return earlier["parts"] if same else {}


def mask_part(size: int, repeats: int, say: Say = lambda _: None) -> dict[str, Any]:
    """Milliseconds per N:M mask of a random ``size`` x ``size`` matrix, all contenders checked to keep as much."""
    import torch

    from .compress.masks import Pattern, magnitude_mask

    w_OI = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    rows = []
    for text in PATTERNS:
        pattern = Pattern.parse(text)
        patterns_PM = _patterns(pattern.n, pattern.m)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "squeezoo": lambda pattern=pattern: magnitude_mask(w_OI, pattern),  # type: ignore[misc]
            "topk": lambda pattern=pattern: topk_mask(w_OI, pattern.n, pattern.m),  # type: ignore[misc]
            "enumeration": lambda patterns_PM=patterns_PM: enumeration_mask(w_OI, patterns_PM),  # type: ignore[misc]
        }
        kept = [float(w_OI[way()].abs().double().sum()) for way in ways.values()]
        if max(kept) - min(kept) > 1e-7 * max(kept):  # masks may differ where weights of a group are equal
            raise AssertionError(f"the {text} masks keep different sums of |w|: {dict(zip(ways, kept, strict=True))}")
        timed = in_turn(ways, repeats)
        rows.append({"pattern": text, "ms": timed})
        say(f"  {text}: " + ", ".join(f"{name} {value:.1f} ms" for name, value in timed.items()))
    first: Any = rows[0]["ms"]
    ms: dict[str, float] = first
    return {
        "size": size, "repeats": repeats, "rows": rows,
        "targets": {
            "2:4 mask at least 5 times faster than the enumeration": ms["enumeration"] >= 5 * ms["squeezoo"],
            "2:4 mask no slower than topk": ms["squeezoo"] <= ms["topk"],
        },
    }  # fmt: skip


def _patterns(n: int, m: int) -> Any:
    """All ways to keep n of m, [P, M] of 0 and 1."""
    import torch

    kept = [[float(j in chosen) for j in range(m)] for chosen in itertools.combinations(range(m), n)]
    return torch.tensor(kept)


def enumeration_mask(w_OI: Any, patterns_PM: Any) -> Any:
    """The public one-dimensional search (NVIDIA/apex, sparse_masklib): of all patterns the one that keeps most |w|."""
    groups_GM = w_OI.reshape(-1, patterns_PM.shape[1])
    best_G = (groups_GM.abs() @ patterns_PM.t()).argmax(1)
    return patterns_PM.bool()[best_G].view(w_OI.shape)


def topk_mask(w_OI: Any, n: int, m: int) -> Any:
    """``topk`` of each group, scattered into a mask."""
    import torch

    groups_GM = w_OI.abs().view(-1, m)
    kept_GN = groups_GM.topk(n, dim=1, sorted=False).indices
    return torch.zeros(groups_GM.shape, dtype=torch.bool).scatter_(1, kept_GN, True).view(w_OI.shape)


def oneshot_part(jobs: Sequence[Job], say: Say = lambda _: None) -> dict[str, Any]:
    """One process per job; see `bench_oneshot`."""
    rows = []
    for job in jobs:
        rows.append(run_job(job))
        say(f"  {_job_name(rows[-1])}: {_oneshot_line(rows[-1])}")
    targets = {}
    for row in rows:
        peak, ppl = row["memory_mib"]["peak"], row["perplexity"]
        name = _job_name(row)
        if row["method"] == "sparsegpt":
            targets[f"{name} in at most 78 s"] = row["seconds"] <= 78
            targets[f"{name}: peak at most 1.2 GB (1,200 MiB)"] = peak is not None and peak <= 1200
            targets[f"{name}: perplexity at most 46.7"] = ppl is not None and ppl <= 46.7
        if row["method"] == "wanda":
            targets[f"{name} in at most 45 s"] = row["seconds"] <= 45
    return {"rows": rows, "targets": targets}


def in_turn(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each, called in turn after a first call that does not count; the order rotates."""
    import torch

    from .eval.timing import clock_for, no_garbage_collection

    clock, names = clock_for(torch.device("cpu")), list(ways)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        ways[name]()
    with no_garbage_collection():
        for repeat in range(repeats):
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                samples[name].append(clock(ways[name]))
    return {name: statistics.median(values) for name, values in samples.items()}


def _job_name(row: Mapping[str, Any]) -> str:
    method: str = row["method"]
    return f"{method}, {row['job']['calibration']} windows" if method in CALIBRATED else method


def _oneshot_line(row: Mapping[str, Any]) -> str:
    memory = {name: "?" if value is None else f"{value:.0f}" for name, value in row["memory_mib"].items()}
    ppl = "-" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
    return (
        f"{row['seconds']:.1f} s, perplexity {ppl}, peak {memory['peak']} MiB "
        f"(start {memory['start']}, pruning {memory['peak_pruning']})"
    )


def engine_table(record: Mapping[str, Any]) -> str:
    """The record of `run_bench_engine` as Markdown."""
    lines = [f"{record['device']}, torch {record['environment']['libraries']['torch']}"]
    parts = record["parts"]
    if "mask" in parts:
        size = parts["mask"]["size"]
        lines += ["", f"| mask {size} x {size} | squeezoo ms | topk | enumeration |", "|---|---|---|---|"]
        for row in parts["mask"]["rows"]:
            ms, own = row["ms"], row["ms"]["squeezoo"]
            rivals = " | ".join(f"{ms[name]:.1f} ({ms[name] / own:.1f}x)" for name in ("topk", "enumeration"))
            lines.append(f"| {row['pattern']} | {own:.1f} | {rivals} |")
    if "gemm" in parts:
        from .bench_gemm import gemm_lines

        lines += ["", *gemm_lines(parts["gemm"])]
    if "oneshot" in parts:
        lines += ["", "| one-shot 2:4 | seconds | perplexity | peak MiB | loaded | pruning | evaluation |"]
        lines.append("|---|---|---|---|---|---|---|")
        for row in parts["oneshot"]["rows"]:
            names = ("peak", "start", "peak_pruning", "peak_evaluation")
            memory = ["?" if row["memory_mib"][name] is None else f"{row['memory_mib'][name]:.0f}" for name in names]
            ppl = "-" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
            lines.append(f"| {_job_name(row)} | {row['seconds']:.1f} | {ppl} | {' | '.join(memory)} |")
    if "step" in parts:
        step = parts["step"]
        lines += ["", "| training step | dense ms | fake-quantized ms | ratio |", "|---|---|---|---|"]
        what = f"{step['model']}, {step['batch']} x {step['sequence']}"
        lines.append(
            f"| {what} | {step['ms']['dense']:.0f} | {step['ms']['fake-quantized']:.0f} | {step['ratio']:.2f} |"
        )
    if "loading" in parts:
        from .bench_loading import loading_lines

        lines += ["", *loading_lines(parts["loading"])]
    targets = {text: met for part in parts.values() for text, met in part["targets"].items()}
    lines += ["", *(f"- {'met' if met else 'MISSED'}: {text}" for text, met in targets.items())]
    return "\n".join(lines)
