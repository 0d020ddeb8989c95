"""Search spaces, the storage of trials with several and with killed workers, held-out rows, the report of a sweep."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezoo.eval import get_task
from squeezoo.eval.expected import expected_validation_performance
from squeezoo.eval.held_out import HELD_OUT, with_validation
from squeezoo.eval.search_space import SearchSpace, SearchSpaceError
from squeezoo.eval.trial_store import SweepError, TrialStore, sqlite_url
from squeezoo.eval.trials import SweepReport, Trial, plot_expected

PLANNED = [{"x": x, "mode": mode} for x in (1.0, 2.0, 4.0) for mode in ("a", "b")]
# A worker as a process of its own: appends "pid index" when it begins a trial, then takes a moment.
WORKER = """
import os, sys, time
from squeezoo.eval.trial_store import TrialStore
url, log, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
planned = [{"x": x, "mode": mode} for x in (1.0, 2.0, 4.0) for mode in ("a", "b")]
def objective(index, settings):
    with open(log, "a") as file:
        file.write(f"{os.getpid()} {index}\\n")
    time.sleep(seconds)
    return {"value": settings["x"] + (settings["mode"] == "b") * 0.5, "seconds": seconds}
TrialStore(url, "s", planned, True, {"task": "t"}).work(objective, poll_seconds=0.1)
"""


def _worker(folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, sqlite_url(folder / "s.db"), str(folder / "log"), str(seconds)]
    )


def _begun(folder: Path) -> list[list[int]]:
    log = folder / "log"
    return [[int(word) for word in line.split()] for line in log.read_text().splitlines()] if log.exists() else []


def _store(folder: Path, plan: dict[str, Any] | None = None, planned: list[dict[str, Any]] = PLANNED) -> TrialStore:
    return TrialStore(sqlite_url(folder / "s.db"), "s", planned, True, plan or {"task": "t"})


def _value(index: int, chosen: dict[str, Any]) -> dict[str, Any]:
    return {"value": chosen["x"] + (chosen["mode"] == "b") * 0.5, "seconds": 1.0}


def test_two_workers_share_the_trials(tmp_path: Path) -> None:
    """Started at once on a storage that does not exist yet: every trial is run once, and both workers end well."""
    workers = [_worker(tmp_path, 0.3) for _ in range(2)]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    begun = _begun(tmp_path)
    assert sorted(index for _, index in begun) == list(range(6))
    trials = _store(tmp_path).trials()
    assert [trial.value for trial in trials] == [1.0, 1.5, 2.0, 2.5, 4.0, 4.5]
    assert {trial.state for trial in trials} == {"complete"}


def test_a_killed_worker_is_replaced(tmp_path: Path) -> None:
    """SIGKILL in the second trial; the next call repeats that one, keeps the first, and does the others once."""
    worker = _worker(tmp_path, 2.0)
    deadline = time.monotonic() + 60
    while len(_begun(tmp_path)) < 2:
        assert worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    first, second = (index for _, index in _begun(tmp_path))
    seen: list[int] = []
    store = _store(tmp_path)
    store.work(lambda index, chosen: (seen.append(index), _value(index, chosen))[1])
    assert sorted(seen) == sorted(set(range(6)) - {first})
    assert second in seen
    assert [trial.value for trial in store.trials()] == [1.0, 1.5, 2.0, 2.5, 4.0, 4.5]


def test_twins_are_run_once(tmp_path: Path) -> None:
    """What two workers do that add the missing trials at the same moment: the younger twin is left."""
    store = _store(tmp_path)
    for _ in range(2):
        for index, chosen in enumerate(PLANNED):
            store.study.enqueue_trial(chosen, user_attrs={"index": index})
    seen: Counter[int] = Counter()
    store.work(lambda index, chosen: (seen.update([index]), _value(index, chosen))[1])
    assert seen == Counter(range(6))


def test_an_error_fails_its_trial_only(tmp_path: Path) -> None:
    """The others are done; the failed one says why, is not repeated by itself, and is when asked for; NaN fails too."""

    def broken(index: int, chosen: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            raise RuntimeError("out of memory")
        return {"value": float("nan")} if index == 2 else _value(index, chosen)

    store = _store(tmp_path)
    store.work(broken)
    assert [trial.state for trial in store.trials()] == ["complete", "failed", "failed", *["complete"] * 3]
    assert store.trials()[1].error == "RuntimeError: out of memory"
    assert "nan" in str(store.trials()[2].error)
    store.work(lambda *_: pytest.fail("nothing is left to do"))
    seen: list[int] = []
    _store(tmp_path).work(lambda i, c: (seen.append(i), _value(i, c))[1], retry_failed=True)
    assert sorted(seen) == [1, 2]
    assert all(trial.state == "complete" for trial in store.trials())


def test_control_c_leaves_the_trial_for_the_next_call(tmp_path: Path) -> None:
    def interrupted(index: int, chosen: dict[str, Any]) -> dict[str, Any]:
        if index == 3:
            raise KeyboardInterrupt
        return _value(index, chosen)

    store = _store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.work(interrupted)
    assert store.trials()[3].state == "waiting"
    seen: list[int] = []
    _store(tmp_path).work(lambda i, c: (seen.append(i), _value(i, c))[1])
    assert sorted(seen) == [3, 4, 5]


def test_another_plan_is_refused(tmp_path: Path) -> None:
    """The message names what differs; a storage that cannot be opened is named without its password."""
    _store(tmp_path)
    with pytest.raises(SweepError, match=r"begun with other task, trials"):
        _store(tmp_path, {"task": "u"}, PLANNED[:2])
    with pytest.raises(SweepError, match="cannot be opened") as caught:
        TrialStore("nonsense://me:secret@there/db", "s", PLANNED, True, {})
    assert "secret@" not in str(caught.value).split(" cannot be opened")[0]


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"squeezoo\[eval\]"):
        _store(tmp_path)


SPACE = {"learning_rate": [1e-5, "3e-5"], "rho": {"low": 1e-4, "high": 1e-2, "log": True}, "seed": {"low": 0, "high": 3, "integer": True}}  # fmt: skip  # noqa: E501


def test_a_grid_is_every_combination_in_order() -> None:
    """By hand; 1e-5 without a point is a text in YAML 1.1 and means the number."""
    space = SearchSpace.parse({"a": [1, 2], "b": ["1e-5", "x"]})
    assert space.trials("grid") == [{"a": a, "b": b} for a in (1, 2) for b in (1e-5, "x")]
    assert SearchSpace.parse(space.to_dict()) == space


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_random_draws_stay_inside_and_repeat(seed: int, count: int) -> None:
    """The list is a function of space, count and seed, so that all workers have the same; more trials only add."""
    space = SearchSpace.parse(SPACE)
    drawn = space.trials("random", count, seed)
    assert drawn == SearchSpace.parse(SPACE).trials("random", count, seed)
    assert drawn == space.trials("random", count + 3, seed)[:count]
    for chosen in drawn:
        assert chosen["learning_rate"] in (1e-5, 3e-5)
        assert 1e-4 <= chosen["rho"] <= 1e-2
        assert chosen["seed"] in (0, 1, 2, 3)
        assert isinstance(chosen["seed"], int)


def test_a_logarithmic_range_is_even_in_the_logarithm() -> None:
    """A third of 1e-4..1e-1 lies below 1e-3: 333 of 1000 draws, with a standard deviation of 15."""
    space = SearchSpace.parse({"rho": {"low": 1e-4, "high": 1e-1, "log": True}})
    below = sum(chosen["rho"] < 1e-3 for chosen in space.trials("random", 1000))
    assert abs(below - 333) < 75


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": []}, "a: expected at least one value"),
        ({"a": [1, 1]}, "none twice"),
        ({"a": {"low": 2, "high": 1}}, "low must be below high"),
        ({"a": {"low": 0, "high": 1, "log": True}}, "starts above 0"),
        ({"a": {"low": 0.5, "high": 1, "integer": True}}, "integer ends"),
        ({"a": {"low": 0, "hihg": 1}}, r"a\.(high|hihg)"),
        ({"a": 3}, "write a list of values"),
        ([], "expected `setting"),
    ],
)
def test_a_broken_space_names_the_key(data: Any, message: str) -> None:
    with pytest.raises(SearchSpaceError, match=message):
        SearchSpace.parse(data)


def test_space_files(tmp_path: Path) -> None:
    """A file of the docstring's form; one that is missing, and one that is no YAML."""
    path = tmp_path / "space.yaml"
    path.write_text("learning_rate: [1e-5, 3.0e-5]\nseed: {low: 0, high: 9, integer: true}\n")
    space = SearchSpace.load(path)
    assert space.to_dict()["learning_rate"] == [1e-5, 3e-5]
    with pytest.raises(SearchSpaceError, match="seed is a range"):
        space.trials("grid")
    with pytest.raises(SearchSpaceError, match="number of trials"):
        space.trials("random")
    with pytest.raises(SearchSpaceError, match="4 points"):
        SearchSpace.parse({"a": [1, 2], "b": [1, 2]}).trials("grid", 3)
    with pytest.raises(SearchSpaceError, match="cannot be read"):
        SearchSpace.load(tmp_path / "none.yaml")
    path.write_text("a: [1")
    with pytest.raises(SearchSpaceError, match="readable as YAML"):
        SearchSpace.load(path)


def test_held_out_rows_are_apart_and_fixed() -> None:
    """The digits have a split of their own; without it, a tenth of the training rows is cut off, always the same."""
    digits = get_task("digits")
    own = with_validation(digits)
    assert (own.task, own.split) == (digits, "validation")
    from dataclasses import replace

    two = replace(digits, splits=("train", "test"), sizes=(digits.size("train"), digits.size("test")))
    cut = with_validation(two)
    size = digits.size("train")
    assert cut.task.splits == ("train", HELD_OUT, "test")
    train, held, whole = (task.rows(split, None) for task, split in ((cut.task, "train"), (cut.task, HELD_OUT), (two, "train")))  # fmt: skip  # noqa: E501
    assert (len(held), len(train)) == (round(size / 10), size - round(size / 10))
    assert (cut.task.size(HELD_OUT), cut.task.size("train")) == (len(held), len(train))

    def key(row: Any) -> Any:
        return id(row) if not hasattr(row, "items") else tuple((k, getattr(v, "tobytes", lambda v=v: v)()) for k, v in row.items())  # fmt: skip  # noqa: E501

    assert Counter(map(key, [*train, *held])) == Counter(map(key, whole))
    assert [key(r) for r in with_validation(two).task.rows(HELD_OUT, None)] == [key(r) for r in held]
    assert [key(r) for r in with_validation(two, seed=1).task.rows(HELD_OUT, None)] != [key(r) for r in held]
    assert "not trained on" in cut.note
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            with_validation(two, share)
    with pytest.raises(ValueError, match="only the split"):
        with_validation(replace(two, splits=("test",), sizes=(2,)))


def _report(values: list[float | None], higher: bool = True) -> SweepReport:
    trials = tuple(
        Trial(i, {"learning_rate": 1e-5 * (i + 1)}, "complete", value, 60.0)
        if value is not None
        else Trial(i, {"learning_rate": 1e-5 * (i + 1)}, "failed", None, None, error="RuntimeError: diverged")
        for i, value in enumerate(values)
    )
    return SweepReport(
        model="minilm-l6", recipe="dense", task="glue/mrpc", split=HELD_OUT, metric="f1", higher_is_better=higher,
        validation="held out", search_space={"learning_rate": [1e-5, 2e-5]}, method="grid", seed=0, trials=trials,
        reported=(), libraries={"torch": "2.13"}, device="a CPU (1 thread)",
    )  # fmt: skip


def test_the_best_trial_and_the_curve() -> None:
    """Values of the vector's first example; the failed trial counts neither as best nor in the curve."""
    report = _report([0.91, 0.874, None, 0.938, 0.902])
    assert report.best.index == 3
    assert report.expected == expected_validation_performance([0.91, 0.874, 0.938, 0.902])
    assert report.mean_seconds == 60
    assert _report([0.91, 0.874, 0.938], higher=False).best.index == 1
    assert _report([0.5, 0.7, 0.7]).best.index == 1
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["best"]["value"] == 0.938
    assert data["search_space"]
    text = report.markdown()
    assert "| 3 | 4e-05 | 0.9380 | 60.0 |" in text
    assert "| 2 | 3e-05 | failed |" in text
    assert "| 4 | 0.9285 | 0.0142 |" in text  # the vector's mean1[3], std1[3]
    with pytest.raises(ValueError, match="diverged"):
        _ = _report([None]).best
    with pytest.raises(ValueError, match="finite value"):
        Trial(0, {}, "complete", None, None)


def test_the_plot_is_a_png_with_the_curve(tmp_path: Path) -> None:
    """A picture of the stated size whose pixels are not all alike; the same report gives the same bytes."""
    import numpy as np
    from matplotlib.image import imread

    report = _report([0.91, 0.874, 0.938, 0.902])
    path = plot_expected(report, tmp_path / "a" / "e.png")
    pixels = imread(path)
    assert pixels.shape[:2] == (600, 900)
    assert len(np.unique(pixels[..., 0])) > 10
    assert plot_expected(report, tmp_path / "b.png").read_bytes() == path.read_bytes()
