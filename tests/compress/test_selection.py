"""The choice of kernels: the rule, the table on disk, and whole models that run what was measured."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from gemms import DYNAMIC, TOY, Toy, asymmetric, quantize, random_gemm, symmetric
from hypothesis import given
from hypothesis import strategies as st
from squeezoo.compress.runtime import caches, int8_supported, selection, use_int8_, use_reference_
from squeezoo.compress.runtime.candidates import units_of
from squeezoo.compress.runtime.choice import EVER, MARGIN, Choice, winner
from squeezoo.compress.runtime.int8_gemm import Int8Gemm
from squeezoo.compress.runtime.select_cache import device_identity, read_times, table_path, write_times
from squeezoo.compress.runtime.select_table import explain_rows, selection_tables
from squeezoo.compress.runtime.select_timing import Sample, compare, steady
from squeezoo.compress.runtime.selection import Selection, decide, select_kernels_
from squeezoo.models.adapter import find_sites
from torch import nn

CPU = torch.device("cpu")
needs_int8 = pytest.mark.skipif(not int8_supported()[0], reason=int8_supported()[1])
SAMPLE = Sample(2e-3, 1e-3, 1e-3, 3e-3, 5)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SQUEEZOO_SELECT", "auto")
    monkeypatch.setattr(selection, "is_busy", lambda device: False)
    monkeypatch.setattr(selection, "steady", lambda samples: True)  # this machine may be doing anything


@given(st.dictionaries(st.integers(1, 5000), st.sampled_from("abc"), min_size=1), st.integers(1, 10_000))
def test_a_choice_takes_the_winner_of_the_nearest_measured_rows_in_proportion(
    winners: dict[int, str], rows: int
) -> None:
    """Against the definition, looked up anew for every number of rows: nearest by ratio, the smaller one on a tie."""
    choice = Choice.of(winners)
    below = [known for known in winners if known <= rows]
    above = [known for known in winners if known > rows]
    if not below or not above:
        expected = winners[max(below) if below else min(above)]
    else:
        low, high = max(below), min(above)
        expected = winners[low] if rows <= math.isqrt(low * high) or rows == low else winners[high]
    assert choice(rows) == expected
    kernels = [kernel for _, kernel in choice.segments]
    assert all(a != b for a, b in itertools.pairwise(kernels))
    assert pickle.loads(pickle.dumps(choice)) == choice == copy.deepcopy(choice)


def test_the_built_in_rule_stays_where_another_kernel_is_faster_by_noise_only() -> None:
    assert winner({"a": 1.0, "b": 1.0 + MARGIN * 0.9}, preferred="b") == "b"
    assert winner({"a": 1.0, "b": 1.0 + MARGIN * 1.1}, preferred="b") == "a"
    assert winner({"a": 1.0, "b": 1.0}, preferred="other") == "a"
    times = {4: {"a": SAMPLE, "b": Sample(5e-4, 4e-4, 4e-4, 6e-4, 5)}, 64: {"a": SAMPLE}}
    assert decide(times, lambda rows: "a").segments == ((16, "b"), (EVER, "a"))


@pytest.mark.parametrize("segments", [(), ((5, "a"),), ((9, "a"), (4, "b"), (EVER, "c")), ((EVER, "a"), (EVER, "b"))])
def test_a_choice_covers_all_rows_in_order(segments: tuple[tuple[int, str], ...]) -> None:
    with pytest.raises(ValueError, match="expected ascending segments"):
        Choice(segments)


def test_the_slower_call_measures_slower_and_failing_ones_are_left_out() -> None:
    """A matrix product of 64 times the work; and one kernel that cannot take the input."""
    small, large = torch.ones(32, 128), torch.ones(2048, 128)
    weight = torch.ones(128, 128)

    def fails() -> None:
        raise RuntimeError("no such instruction")

    found = compare({"slow": lambda: large @ weight, "fast": lambda: small @ weight, "fails": fails}, CPU)
    assert set(found) == {"slow", "fast"}
    assert found["fast"].fastest * 3 < found["slow"].fastest
    assert found["fast"].fastest <= found["fast"].p10 <= found["fast"].median <= found["fast"].p90


def test_a_disturbed_measurement_is_told_from_a_steady_one() -> None:
    assert steady({"a": Sample.of([1.0, 1.1, 1.2]), "slow": Sample.of([2.0, 9.0, 9.0])})
    assert not steady({"a": Sample.of([1.0, 1.9, 2.5]), "slow": Sample.of([3.0, 3.0, 3.0])})


def test_the_table_survives_and_merges() -> None:
    identity = device_identity(CPU)
    assert write_times(identity, {"linear 8x8": {1: {"a": SAMPLE}}}) is None
    assert write_times(identity, {"linear 8x8": {4: {"b": SAMPLE}}, "ffn 8x16": {1: {"a": SAMPLE}}}) is None
    assert read_times(identity) == {"linear 8x8": {1: {"a": SAMPLE}, 4: {"b": SAMPLE}}, "ffn 8x16": {1: {"a": SAMPLE}}}
    assert [path.name for path in table_path(identity).parent.iterdir()] == [table_path(identity).name]
    for changed in ({"threads": 77}, {"torch": "0"}, {"kernels": "0"}, {"name": "another CPU"}):
        assert read_times(identity | changed) == {}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: text.replace('"threads"', '"fibres"'),
        lambda text: text.replace("0.001", "-1", 1),
        lambda text: text.replace("0.001", '"x"', 1),
        lambda text: text.replace('"1": {', '"one": {'),
    ],
)
def test_a_damaged_table_counts_as_empty(damage: Any) -> None:
    identity = device_identity(CPU)
    write_times(identity, {"linear 8x8": {1: {"a": SAMPLE}}})
    path = table_path(identity)
    damaged = damage(path.read_text(encoding="utf-8"))
    assert damaged != path.read_text(encoding="utf-8")
    path.write_text(damaged, encoding="utf-8")
    assert read_times(identity) == {}
    write_times(identity, {"linear 8x8": {1: {"a": SAMPLE}}})
    assert read_times(identity) == {"linear 8x8": {1: {"a": SAMPLE}}}


def test_a_cache_that_cannot_be_written_is_told_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file where the cache should be: a private temporary folder keeps the times, and it is said once; where that
    cannot be either, why."""
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    caches._private_root.cache_clear()
    caches._say_private.cache_clear()
    identity = device_identity(CPU)
    for rows in (1, 4):
        assert write_times(identity, {"linear 8x8": {rows: {"a": SAMPLE}}}) is None
    assert read_times(identity) == {"linear 8x8": {1: {"a": SAMPLE}, 4: {"a": SAMPLE}}}
    assert table_path(identity).parent == tmp_path / "tmp" / f"squeezoo-{os.getuid()}" / "kernels"
    assert len(caplog.records) == 1
    assert "so Squeezoo keeps its folder 'kernels' in" in caplog.text
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    caches._private_root.cache_clear()
    assert write_times(identity, {"linear 8x8": {1: {"a": SAMPLE}}}) is not None
    assert read_times(identity) == {}
    caches._private_root.cache_clear()


def test_a_ready_table_that_cannot_be_written_is_read_and_added_to_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image whose cache is read-only: what it holds counts, what is measured later too."""
    identity = device_identity(CPU)
    assert write_times(identity, {"linear 8x8": {1: {"a": SAMPLE}}}) is None
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    caches._private_root.cache_clear()
    real = os.access
    usual = table_path(identity).parent
    monkeypatch.setattr(caches.os, "access", lambda path, mode: Path(path) != usual and real(path, mode))
    assert write_times(identity, {"linear 8x8": {4: {"a": SAMPLE}}}) is None
    assert read_times(identity) == {"linear 8x8": {1: {"a": SAMPLE}, 4: {"a": SAMPLE}}}
    caches._private_root.cache_clear()


def toy(width: int = 20) -> tuple[nn.Module, nn.Module]:
    """The int8 model and its reference."""
    torch.manual_seed(0)
    model = Toy(nn.GELU(), width=width).eval()
    sites = find_sites(model, TOY)
    with torch.no_grad():
        gemms = quantize(model, sites, lambda: model(torch.randn(64, width)))
    slow = copy.deepcopy(model)
    use_reference_(slow, find_sites(slow, TOY), gemms)
    use_int8_(model, sites, gemms)
    return model, slow


def choices(model: nn.Module) -> list[Any]:
    return [getattr(named.unit, "gemms")[0].kernels for named in units_of(model)]  # noqa: B009


@needs_int8
@torch.no_grad()
def test_a_model_runs_what_was_measured_and_the_table_serves_the_next_one() -> None:
    """Whatever wins, the numbers are those of the reference (rounding of floats, 1e-5)."""
    model, slow = toy()
    first = select_kernels_(model, rows=(1, 8), budget_s=60)
    (chosen,) = first.chosen
    assert (chosen.workload.kind, chosen.workload.sizes, chosen.source) == ("ffn", (20, 36), "measured")
    assert set(chosen.times) == {1, 8}
    assert {"packed", "plain", "dense"} <= set(chosen.times[1])
    assert choices(model) == [chosen.choice.segments]  # type: ignore[union-attr]
    again, _ = toy()
    second = select_kernels_(again, rows=(8, 1), budget_s=0)
    assert second.chosen[0].source == "table"
    assert second.chosen[0].choice == chosen.choice
    for rows in (1, 3, 8, 40):
        x = torch.randn(rows, 20)
        torch.testing.assert_close(model(x), slow(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(model(x), again(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize("kernel", ["packed", "plain", "dense", "native"])
def test_the_table_alone_decides(kernel: str) -> None:
    """A table written by hand, in which one kernel is the fastest: that one runs, and agrees with the reference."""
    model, slow = toy()
    (named,) = units_of(model)
    kernels = named.unit.kernels()
    if kernel not in kernels:
        pytest.skip(f"{kernel} does not run here")
    times = {1: {k: Sample(1e-6, 1e-6, 1e-6, 1e-6, 5) if k == kernel else SAMPLE for k in kernels}}
    write_times(device_identity(CPU), {named.unit.workload().key: times})
    found = select_kernels_(model, rows=(1,), budget_s=0)
    assert found.chosen[0].choice == Choice(((EVER, kernel),))
    assert found.chosen[0].source == "table"
    x = torch.randn(7, 20)
    torch.testing.assert_close(model(x), slow(x), rtol=1e-4, atol=1e-4)


@needs_int8
def test_without_time_or_when_switched_off_the_built_in_rule_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = toy()
    late = select_kernels_(model, rows=(1, 8), budget_s=-1)
    assert choices(model) == [None]
    assert late.chosen[0].choice is None
    assert late.notes == ("2 measurements did not fit into -1 s; a later load makes them",)
    assert select_kernels_(model, measure="off") == Selection(())
    monkeypatch.setenv("SQUEEZOO_SELECT", "off")
    assert select_kernels_(model) == Selection(())
    monkeypatch.setenv("SQUEEZOO_SELECT", "sometimes")
    with pytest.raises(ValueError, match=r"\$SQUEEZOO_SELECT is 'sometimes'; allowed: auto, off, again"):
        select_kernels_(model)
    assert choices(model) == [None]
    assert not table_path(device_identity(CPU)).exists()


@needs_int8
def test_on_a_busy_machine_nothing_is_measured_or_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "is_busy", lambda device: True)
    model, _ = toy()
    found = select_kernels_(model, rows=(1, 8))
    assert choices(model) == [None]
    assert found.notes == ("other processes disturbed 2 measurements; a load on an idle machine makes them",)
    asked = select_kernels_(model, rows=(1,), measure="again")
    assert asked.chosen[0].source == "measured"


@needs_int8
def test_the_table_is_explained() -> None:
    model, _ = toy()
    found = select_kernels_(model, rows=(1, 8), budget_s=60)
    (row,) = explain_rows(found)
    assert row["workload"] == "ffn 20x36 static gelu bias"
    assert row["segments"][-1][0] is None
    assert row["times"][8]["chosen"] == found.chosen[0].choice(8)  # type: ignore[misc]
    assert json.loads(json.dumps(row))["break_even"] == row["break_even"]
    (table,) = selection_tables(found)
    assert table.row_count == 2
    assert "ffn 20x36 static gelu bias" in str(table.title)
    assert any("*" in str(cell) for column in table.columns for cell in column.cells)


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize("input", [symmetric(0.0625), asymmetric(0.0625, 100), DYNAMIC, symmetric(0.5, bits=4)])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu"])
def test_the_dense_kernel_agrees_with_the_integer_ones(input: Any, activation: Any) -> None:
    """Scales are powers of two, so the sums are exact in both; GELU's kernels differ by their float rounding."""
    made = random_gemm(24, 40, input=input)
    gemm = Int8Gemm(made.weight_q_OI, made.scale_O, made.bias_O, made.input, activation)
    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(1)) * 4
    x = (x / 0.0625).round() * 0.0625 if input.kind == "static" else x  # no ties between two levels
    dense = gemm.run_with("dense", x)
    assert dense.shape == (9, 24)
    assert gemm.run_with("dense", x[None].double()).dtype == torch.float64
    for kernel in gemm.candidates():
        torch.testing.assert_close(gemm.run_with(kernel, x), dense, rtol=2e-4, atol=2e-3)
    gemm.keep_(("packed",))
    assert gemm._dense_OI is None
    assert gemm._packed is not None
    assert gemm._plain is None
