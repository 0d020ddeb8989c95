"""Part ``gemm`` of `squeezoo bench-engine`: 2:4 int8 weights against dense int8 ones and float32, on the CPU's kernels.

Both int8 kernels are the native ones, so what differs is that one leaves the zeros out. With one row, as when a
language model writes, so many copies take turns that the weights come from memory and not from a cache.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .bench_engine import Say, in_turn
from .compress.masks import Pattern, magnitude_mask
from .compress.runtime import native
from .compress.runtime.levels import Levels

SHAPES = {"QKV": (2304, 768), "attention output": (768, 768), "FFN1": (3072, 768), "FFN2": (768, 3072)}  # BERT-base
ROWS = (1, 16, 128, 384, 3072)
COLD_BYTES = 160 << 20  # of int8 weights, several times a last-level cache
MANY = 128  # rows from which a GEMM is bound by arithmetic
_LEVELS = Levels(0.05, 128, 1, 255)


def gemm_part(
    repeats: int, say: Say = lambda _: None, *, rows: tuple[int, ...] = ROWS, cold_bytes: int = COLD_BYTES
) -> dict[str, Any]:
    """Milliseconds of each matrix of a BERT-base block, by rows; results of both int8 layouts are checked to be equal.

    Raises:
        ValueError: this machine cannot run the native kernels; says why.
    """
    runs, why = native.available()
    if not runs:
        raise ValueError(f"part gemm times the native kernels: {why}")
    found = [_measured(name, count, repeats, cold_bytes) for name in SHAPES for count in rows]
    for row in found:
        say("  " + _line(row))
    gains = [row["ms"]["dense int8"] / row["ms"]["2:4 int8"] for row in found if row["rows"] >= MANY]
    return {
        "rows": found, "repeats": repeats, "levels": "static, symmetric",
        "targets": {
            f"2:4 int8 faster than dense int8 in every matrix of {MANY} rows and more": min(gains, default=0) > 1,
        },
        "median gain": statistics.median(gains) if gains else None,
    }  # fmt: skip


def _measured(name: str, rows: int, repeats: int, cold_bytes: int) -> dict[str, Any]:
    shape = SHAPES[name]
    seeded = torch.Generator().manual_seed(0)
    q_OI = torch.randint(-127, 128, shape, dtype=torch.int8, generator=seeded)
    q_OI *= magnitude_mask(q_OI.float(), Pattern(2, 4))
    scale_O, bias_O = torch.full((shape[0],), 1e-3), torch.zeros(shape[0])
    w_OI = q_OI.float() * scale_O[:, None]
    x_TI = torch.randn(rows, shape[1], generator=seeded)
    level_TI = native.quantize(x_TI, _LEVELS)
    copies = -(-cold_bytes // q_OI.numel()) if rows == 1 else 1
    sparse = [native.NativeGemm(q_OI, scale_O, bias_O, sparse=True) for _ in range(copies)]
    dense = [native.NativeGemm(q_OI, scale_O, bias_O, sparse=False) for _ in range(copies)]
    floats = [w_OI.clone() for _ in range(-(-copies // 4))]
    if not torch.equal(sparse[0](level_TI, _LEVELS), dense[0](level_TI, _LEVELS)):
        raise AssertionError(f"the int8 layouts of {name} differ at {rows} rows")
    with torch.inference_mode():
        ms = in_turn(
            {
                "float32": _each(floats, lambda w: F.linear(x_TI, w, bias_O)),
                "dense int8": _each(dense, lambda gemm: gemm(level_TI, _LEVELS)),
                "2:4 int8": _each(sparse, lambda gemm: gemm(level_TI, _LEVELS)),
            },
            repeats * min(copies, 8),
        )
    return {"matrix": name, "shape": list(shape), "rows": rows, "copies": copies, "ms": ms}


def _each(matrices: list[Any], call: Callable[[Any], object]) -> Callable[[], object]:
    """Calls that go through the matrices in turn; each is laid out before."""
    for matrix in matrices:
        call(matrix)
    turn = itertools.cycle(matrices)
    return lambda: call(next(turn))


def _line(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {value:.3f} ms" for name, value in row["ms"].items())
    return f"{row['matrix']}, {row['rows']} rows: {times}"


def gemm_lines(part: dict[str, Any]) -> list[str]:
    """The part as Markdown."""
    lines = [
        "| matrix | rows | float32 ms | dense int8 ms | 2:4 int8 ms | 2:4 / dense int8 |",
        "|---|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        ms = row["ms"]
        times = " | ".join(f"{ms[name]:.3f}" for name in ("float32", "dense int8", "2:4 int8"))
        gain = ms["dense int8"] / ms["2:4 int8"]
        cold = " (from memory)" if row["copies"] > 1 else ""
        lines.append(f"| {row['matrix']} | {row['rows']}{cold} | {times} | {gain:.2f}x |")
    return lines
