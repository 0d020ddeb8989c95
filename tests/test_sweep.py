"""Sweeps over real training of tiny models on the digits: settings, validation only, restart, the best model kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from squeezoo.compress.checkpoint import load
from squeezoo.compress.recipe import Recipe, RecipeError
from squeezoo.eval import get_task
from squeezoo.eval.held_out import HELD_OUT
from squeezoo.eval.run import evaluate
from squeezoo.eval.search_space import SearchSpaceError
from squeezoo.models.dense import save_dense
from squeezoo.models.torchvision_guard import ensure_torchvision_importable
from squeezoo.sweep import SweepError, run_sweep, with_settings
from tiny import TIMM_ARGS

RULE = {"roles": ["block"], "sparsity": "2:4"}
ASP = {
    "name": "tiny-asp", "description": "d", "source": "s", "rules": [RULE],
    "stages": [{"stage": "prune"}, {"stage": "finetune", "epochs": 1, "learning_rate": 1e-3, "batch_size": 16}],
}  # fmt: skip
SPACE = {"learning_rate": [1e-3, 1e-2], "seed": [3]}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random ViT of ten classes as a folder."""
    ensure_torchvision_importable()
    import timm
    import torch

    torch.manual_seed(0)
    args = {**TIMM_ARGS, "num_classes": 10}
    model: Any = timm.create_model("vit_tiny_patch16_224", **args)
    model.squeezoo_model_args = args
    folder = tmp_path_factory.mktemp("dense") / "vit"
    save_dense(model, None, folder)
    return str(folder)


def _sweep(dense: str, out: Path, **how: Any) -> Any:
    chosen = {"recipe": Recipe.parse(ASP), "task": "digits", "space": SPACE, "limit": 320} | how
    return run_sweep(dense, chosen.pop("recipe"), chosen.pop("task"), chosen.pop("space"), out, **chosen)


def test_settings_reach_their_place() -> None:
    """Overrides, policy settings by bare and by full name, distillation, and settings of other stages."""
    found = with_settings(Recipe.load("nxm-admm"), {"rho": 1e-3, "learning_rate": 1e-5, "seed": 4})
    (stage,) = found.stages
    assert (stage.policy.rho, stage.learning_rate, found.seed) == (1e-3, 1e-5, 4)
    assert with_settings(Recipe.load("sr-ste-2-4"), {"policy.decay": 0.5}).stages[0].policy.decay == 0.5
    distilled = with_settings(Recipe.load("gpusq-gemm-int8"), {"temperature": 4, "distill.soft": 1.5})
    assert [s.distill.temperature for s in distilled.stages if s.stage == "finetune"] == [4, 4]
    assert [s.distill.soft for s in distilled.stages if s.stage == "finetune"] == [1.5, 1.5]
    assert with_settings(Recipe.load("sparsegpt-2-4"), {"prune.damping": 0.1}).stages[0].damping == 0.1
    assert with_settings(Recipe.load("dense"), {}) == Recipe.load("dense")


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("dense", {"rho": 1e-3}),
        ("nxm-admm", {"policy.decay": 1e-3}),
        ("nxm-admm", {"policy.method": "fixed"}),
        ("nxm-admm", {"rho": -1}),
        ("dense", {"learning_rate": 0}),
        ("dense", {"nonsense": 1}),
    ],
)
def test_settings_that_a_recipe_lacks_are_refused(recipe: str, settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        with_settings(Recipe.load(recipe), settings)


def test_nothing_is_run_when_one_trial_is_wrong(dense: str, tmp_path: Path) -> None:
    """The last value of the space is out of range, or the space is no grid: the output folder is not even made."""
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="learning_rate"):
        _sweep(dense, out, space={"learning_rate": [1e-3, -1.0]})
    with pytest.raises(SearchSpaceError, match="range"):
        _sweep(dense, out, space={"learning_rate": {"low": 1e-4, "high": 1e-3}})
    assert not out.exists()


def test_a_sweep_trains_scores_and_keeps_the_best(dense: str, tmp_path: Path) -> None:
    """Two trials of an N:M recipe: the stored value is what the kept model scores, on validation scans; the test scans
    are scored once, at the end; a second call trains nothing."""
    told: list[str] = []
    report = _sweep(dense, tmp_path, report=True, say=told.append)
    assert [trial.settings for trial in report.trials] == [
        {"learning_rate": lr, "seed": seed} for lr in (1e-3, 1e-2) for seed in (3,)
    ]
    assert report.split == "validation"
    assert report.best.value == max(trial.value for trial in report.trials)
    assert len({trial.value for trial in report.trials}) > 1  # the settings do something
    assert all(trial.seconds is not None for trial in report.trials)
    folders = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert folders == [f"trial-{report.best.index}"]
    model = load(tmp_path / folders[0])
    task = get_task("digits")
    again = evaluate(model, task, None, split="validation", progress=False)[0]
    assert again.value == pytest.approx(report.best.value)
    assert report.best.scores[0]["split"] == "validation"
    assert [score["split"] for score in report.reported][:1] == ["test"]
    assert report.reported[0]["value"] == pytest.approx(evaluate(model, task, None, progress=False)[0].value)
    data = json.loads((tmp_path / "sweep.json").read_text())
    assert data["best"]["index"] == report.best.index
    assert data["search_space"] == SPACE
    assert "scored once" in (tmp_path / "sweep.md").read_text()
    assert (tmp_path / "expected_validation.png").stat().st_size > 1000
    told.clear()
    assert _sweep(dense, tmp_path, report=True, say=told.append) == report
    assert not [line for line in told if line.startswith("trial")]
    with pytest.raises(SweepError, match="search space"):
        _sweep(dense, tmp_path, space={"learning_rate": [1e-3]})


def test_the_dense_baseline_on_held_out_training_rows(dense: str, tmp_path: Path) -> None:
    """A task of two splits: a recipe without rules, chosen on rows cut from the training split; the reported split is
    not read by the sweep."""
    digits = get_task("digits")

    def rows(split: str, data_dir: Any) -> Any:
        assert split == "train"
        return digits.rows(split, data_dir)

    sizes = (digits.size("train"), digits.size("test"))
    task = replace(digits, name="digits-of-two", splits=("train", "test"), sizes=sizes, rows=rows)
    plain = {k: v for k, v in ASP.items() if k != "rules"} | {"stages": ASP["stages"][1:]}
    report = _sweep(
        dense, tmp_path, recipe=Recipe.parse(plain), task=task, space={"seed": [0, 1]}, keep_all=True,
    )  # fmt: skip
    assert report.split == HELD_OUT
    assert report.best.scores[0]["samples"] == round(sizes[0] / 10)
    assert report.best.scores[0]["complete"] is True
    assert f"{round(sizes[0] / 10)} of {sizes[0]:,}" in report.validation
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["trial-0", "trial-1"]
    assert report.reported == ()


KILLED = """
import sys
from squeezoo.compress.recipe import Recipe
from squeezoo.sweep import run_sweep
import json
def say(line):
    print(line, flush=True)
run_sweep(sys.argv[1], Recipe.parse(json.loads(sys.argv[3])), "digits", json.loads(sys.argv[4]), sys.argv[2],
          limit=320, say=say)
"""


def test_killed_and_restarted_ends_as_uninterrupted(dense: str, tmp_path: Path) -> None:
    """SIGKILL as the second trial begins; the restart ends with the values of a run that nobody stopped."""
    out = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, dense, str(out), json.dumps(ASP), json.dumps(SPACE)],
        stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("trial 1:"):
                time.sleep(0.2)
                os.kill(process.pid, signal.SIGKILL)
                break
    told: list[str] = []
    restarted = _sweep(dense, out, say=told.append)
    whole = _sweep(dense, tmp_path / "whole")
    assert [trial.value for trial in restarted.trials] == [trial.value for trial in whole.trials]
    assert not any(line.startswith("trial 0") for line in told)
    assert any(line.startswith("trial 1") for line in told)
