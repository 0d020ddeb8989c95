"""Interleaved timing of many engines, and the file that keeps its cells."""

from __future__ import annotations

import json
from collections import Counter
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from squeezoo.eval.environment import environment
from squeezoo.eval.grid import Cell, Grid, cells_table, environment_slug
from squeezoo.eval.rounds import MAX_ROUNDS, MIN_ROUNDS, Measured, measure, order_of, rounds_within


def test_every_engine_comes_at_each_place_equally_often() -> None:
    names = ("a", "b", "c", "d")
    orders = [order_of(names, number) for number in range(2 * len(names))]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert set(Counter((name, order.index(name)) for order in orders for name in names).values()) == {2}
    neighbours = {pair for order in orders for pair in pairwise(order)}
    assert {("a", "b"), ("b", "a")} <= neighbours  # also in the other order


def test_the_number_of_rounds_follows_the_time() -> None:
    assert [rounds_within(10, seconds) for seconds in (0.001, 1.0, 100.0)] == [MAX_ROUNDS, 10, MIN_ROUNDS]


def test_medians_ratios_and_warm_up() -> None:
    """Engines that report what the test tells them: the first calls (warm-up, estimate) do not count."""
    calls: dict[str, list[float]] = {"base": [], "fast": []}

    def engine(name: str, ms: float) -> float:
        calls[name].append(ms if len(calls[name]) >= 2 else 900.0)
        return calls[name][-1]

    ticks: list[tuple[int, int]] = []
    found = measure(
        {"base": lambda: engine("base", 8.0), "fast": lambda: engine("fast", 2.0)}, "base",
        seconds=12.6, pause_s=0, tick=lambda done, total: ticks.append((done, total)),
    )  # fmt: skip
    assert found["base"].timing.median_ms == 8.0
    assert found["base"].speedup == 1.0
    assert found["fast"].speedup == 4.0
    assert found["fast"].spread == (4.0, 4.0)
    assert found["fast"].repeats == 7 == len(calls["fast"]) - 2  # 12.6 s in rounds of 1.8 s
    assert ticks[-1] == (7, 7)
    assert Measured.from_dict(json.loads(json.dumps(found["fast"].to_dict()))) == found["fast"]


def cell(model: str = "m", batch: int = 1, stamp: str = "s", **changes: object) -> Cell:
    fields = {"base": 8.0, "ours": 2.0, "peer": 4.0}
    engines = measure({name: lambda ms=ms: ms for name, ms in fields.items()}, "base", seconds=0, pause_s=0)  # type: ignore[misc]
    return Cell(model, batch, "128", stamp, **{"engines": engines, "failed": {"other": "no"}, **changes})  # type: ignore[arg-type]


def test_cells_survive_in_the_file_and_stale_ones_are_known(tmp_path: Path) -> None:
    grid = Grid(tmp_path / "new" / "cpu.json", {"cpu": 1})
    grid.add_(cell())
    grid.add_(cell("m", 8))
    read = Grid(tmp_path / "new" / "cpu.json", {"cpu": 1})
    assert read.cells == grid.cells
    assert read.has("m/8/128", "s")
    assert not read.has("m/8/128", "another")
    assert not read.has("m/8/384", "s")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cpu.json"]
    assert read.cells["m/1/128"].ratio("ours", "peer") == 2.0
    assert read.cells["m/1/128"].ratio("ours", "other") is None


@pytest.mark.parametrize("text", ["", "[]", '{"format": 9, "cells": []}', '{"format": 1, "cells": [{"model": "m"}]}'])
def test_another_file_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="move it away"):
        Grid(path, {})
    assert path.read_text() == text


def test_the_table_names_the_best_peer() -> None:
    cells = [cell(), cell(batch=8, engines={}, failed={}, skipped="skipped: 90 s a call")]
    console = Console(file=StringIO(), width=200)
    console.print(cells_table(cells, "base", "ours", ("peer", "absent")))
    lines = [line for line in console.file.getvalue().splitlines() if "│ m" in line]  # type: ignore[attr-defined]
    assert "4.00x" in lines[0]
    assert "2.00x" in lines[0]
    assert lines[0].rstrip("│ ").endswith("2.00")
    assert "skipped" in lines[1]


def test_the_file_name_says_what_was_measured_on() -> None:
    found = {**environment(), "gpus": [{"name": "NVIDIA H200"}]}
    found["libraries"] = {"torch": "2.13.0+cpu"}
    found["cpu"] = {"name": "AMD EPYC(TM) 9554", "threads": 2}
    assert environment_slug(found, "cpu") == "cpu-amd-epyc-tm-9554-2t-torch2.13.0"
    assert environment_slug(found, "cuda") == "gpu-nvidia-h200-torch2.13.0"
