"""``make tables``: the tables of results/README.md and README.md, made from the files in results/.

A file in results/eval is what ``squeezoo eval --json FILE`` wrote, called MODEL.TASK.METHOD.sSEED (of one run alone
without the seed); results/cpu-*.json is what ``make bench-cpu`` wrote.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
EVALUATIONS = ROOT / "results" / "eval"
_SEEDED = re.compile(r"minilm-l6\.mrpc\.(?P<method>.+)\.s(?P<seed>\d+)")

# Method: how it was trained, and the published change of MRPC against the dense BERT-base.
METHODS: dict[str, tuple[str, str]] = {
    "dense": ("dense, 5 epochs", ""),
    "asp-2-4": ("`asp-2-4`, 12 epochs", ""),
    "asp-2-4-short": ("`asp-2-4`, 4 epochs", ""),
    "asp-2-4-pretrained": ("`asp-2-4` of the pre-trained model, 5 epochs", "-3.6 (N)"),
    "sr-ste-2-4-short": ("`sr-ste-2-4`, 4 epochs", ""),
    "nxm-admm": ("`nxm-admm`, 10 epochs", "-0.9 (N)"),
    "gpusq-gemm-int8-1e-4": ("`gpusq-gemm-int8`, 6 + 6 epochs, rate 1e-4", "+0.2 (G)"),
    "gpusq-gemm-int8": ("`gpusq-gemm-int8`, 6 + 6 epochs, rate 5e-5", "+0.2 (G)"),
    "gpusq-gemm-int8-short": ("`gpusq-gemm-int8`, 2 + 2 epochs", "+0.2 (G)"),
    "deepcomp-sparse-int8": ("`deepcomp-sparse-int8`, 4 epochs", "-0.99 on SQuAD (D)"),
    "deepcomp-sparse-int4-short": ("`deepcomp-sparse-int4`, 2 + 2 epochs", "-1.62 on SQuAD (D)"),
    "squeezoo-best": ("`squeezoo-best`, 4 epochs", ""),
    "dq": ("`dq`, no training", "-1.0 on sentiment (T)"),
    "pkd-3": ("`pkd-6 --blocks 3`, 4 epochs", "-3.9, to 6 blocks (P)"),
}


def read_scores(folder: Path = EVALUATIONS) -> dict[str, list[dict[str, Any]]]:
    """File name without ending: its scores."""
    return {
        path.stem: scores_in(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))
    }


def scores_in(data: Any) -> list[dict[str, Any]]:
    """The scores in what ``squeezoo eval --json`` wrote; its first form was the list of scores alone."""
    scores: list[dict[str, Any]] = data if isinstance(data, list) else data["scores"]
    return scores


def score_table(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Every score, one a row."""
    lines = ["| file | task | split | rows | metric | value |", "| --- | --- | --- | ---: | --- | ---: |"]
    for name, found in scores.items():
        for score in found:
            perplexity = "perplexity" in score["metric"]
            value = f"{score['value']:,.2f}" if perplexity else f"{100 * score['value']:.2f} %"
            rows = f"{score['samples']:,}" + ("" if score["complete"] else " (sample)")
            cells = (name, score["task"], score["split"], rows, score["metric"], value)
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def method_table(scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """MiniLM-L6 on MRPC: F1 of each method by seed, mean, standard deviation, and the change against the dense model of
    the same seed; beside it what the papers print.

    Raises:
        ValueError: a method that `METHODS` does not know.
    """
    f1: dict[str, dict[int, float]] = {}
    for name, found in scores.items():
        if matched := _SEEDED.fullmatch(name):
            value = next(100 * score["value"] for score in found if score["metric"] == "f1")
            f1.setdefault(matched["method"], {})[int(matched["seed"])] = value
    if unknown := set(f1) - set(METHODS):
        raise ValueError(f"no label for the methods {', '.join(sorted(unknown))}: give them one in METHODS")
    lines = [
        "| method | F1 of seeds 0, 1, 2 | mean | standard deviation | change, paired by seed | published change |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for method, (label, published) in METHODS.items():
        if method not in f1:
            continue
        by_seed = dict(sorted(f1[method].items()))
        changes = [value - f1["dense"][seed] for seed, value in by_seed.items() if seed in f1["dense"]]
        cells = [
            label,
            ", ".join(f"{by_seed[seed]:.2f}" if seed in by_seed else "-" for seed in range(max(by_seed) + 1)),
            f"{statistics.mean(by_seed.values()):.2f}",
            f"{statistics.stdev(by_seed.values()):.2f}" if len(by_seed) > 1 else "",
            f"{statistics.mean(changes):+.2f}" if changes and method != "dense" else "",
            published,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


EAGER, OURS = "eager fp32", "squeezoo"
PEERS = {
    "OpenVINO (NNCF int8)": "OpenVINO",
    "ONNX Runtime int8": "ONNX Runtime",
    "PyTorch dynamic int8": "torch dynamic",
}


def read_cells(root: Path = ROOT) -> list[dict[str, Any]]:
    """All cells that were measured on CPUs."""
    files = sorted((root / "results").glob("cpu-*.json"))
    return [cell for path in files for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def race_table(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells in which an engine that is not PyTorch's took part; of an engine's modes the better one."""
    lines = [
        f"| model | batch x tokens | float32 ms | squeezoo | {' | '.join(PEERS)} | ours / best peer |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in _in_order(cells):
        found = [
            max((e["speedup"] for name, e in cell["engines"].items() if name.startswith(start)), default=None)
            for start in PEERS.values()
        ]
        if found[0] is None or found[1] is None:
            continue
        ours, best = cell["engines"][OURS]["speedup"], max(speed for speed in found if speed is not None)
        peers = ["-" if speed is None else f"{speed:.2f}x" for speed in found]
        lines.append(f"| {_what(cell)} | **{ours:.2f}x** | {' | '.join(peers)} | {ours / best:.2f} |")
    return lines


def cell_table(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every cell: float32 milliseconds, our speed-up with its spread, PyTorch's own int8 in its better mode."""
    lines = ["| model | batch x size | float32 ms | squeezoo | p10 to p90 | PyTorch dynamic int8 |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for cell in _in_order(cells, skipped=True):
        if cell["skipped"]:
            lines.append(f"| {cell['model']} | {cell['batch']} x {cell['size']} | {cell['skipped']} |  |  |  |")
            continue
        ours, start = cell["engines"][OURS], PEERS["PyTorch dynamic int8"]
        own = max((e["speedup"] for name, e in cell["engines"].items() if name.startswith(start)), default=None)
        low, high = ours["spread"]
        cells_ = (
            _what(cell),
            f"{ours['speedup']:.2f}x",
            f"{low:.2f} to {high:.2f}",
            "-" if own is None else f"{own:.2f}x",
        )
        lines.append(f"| {' | '.join(cells_)} |")
    return lines


def _in_order(cells: Sequence[Mapping[str, Any]], skipped: bool = False) -> list[Mapping[str, Any]]:
    """By model, batch and size, numbers as numbers."""
    kept = [cell for cell in cells if skipped or not cell["skipped"]]
    return sorted(kept, key=lambda c: (c["model"], c["batch"], int(re.match(r"\d+", c["size"])[0])))  # type: ignore[index]


def _what(cell: Mapping[str, Any]) -> str:
    ms = cell["engines"][EAGER]["timing"]["median_ms"]
    return f"{cell['model']} | {cell['batch']} x {cell['size']} | {ms:.1f}"


def with_table(text: str, name: str, lines: Sequence[str]) -> str:
    """``text`` with the table between its two marks replaced.

    Raises:
        ValueError: the marks are not there.
    """
    begin, end = f"<!-- {name}: made by `make tables`, do not edit -->", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise ValueError(
            f"expected the marks {begin!r} and {end!r}, found {'one' if begin in text else 'none'} of them"
        )
    before, after = text.split(begin)[0], text.split(end)[1]
    return "\n".join([before + begin, *lines, end + after])


def tables(root: Path = ROOT) -> dict[Path, str]:
    """The two files as they should be."""
    scores, cells = read_scores(root / "results" / "eval"), read_cells(root)
    made = {
        "results/README.md": {"scores": score_table(scores), "CPU cells": cell_table(cells)},
        "README.md": {"MRPC table": method_table(scores), "CPU race": race_table(cells)},
    }
    found = {}
    for path, named in made.items():
        text = (root / path).read_text(encoding="utf-8")
        for name, lines in named.items():
            text = with_table(text, name, lines)
        found[root / path] = text
    return found


if __name__ == "__main__":
    for path, text in tables().items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
