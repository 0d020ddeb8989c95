"""`squeezoo finetune` takes from a task's paper what the command does not say, and measures only its own energy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from squeezoo.cli import app
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.stages import Finetune
from squeezoo.eval import TASKS, get_task
from squeezoo.models.dense import load_dense, save_dense
from squeezoo.pipeline import recording_energy
from tiny import TIMM_ARGS
from typer.testing import CliRunner


def _stage(task: str) -> Any:
    paper = get_task(task).finetune
    assert paper is not None
    (stage,) = Recipe.load("dense").override(**paper.settings()).stages
    return stage


# ALGORITHMS E.2 (Deep Compression's table of settings)
WAV2VEC2 = {"learning_rate": 3e-4, "epochs": 6, "batch_size": 32, "warmup_steps": 500, "optimizer": "adamw",
            "schedule": "linear"}  # fmt: skip
IMAGENET = {"learning_rate": 0.01, "epochs": 8, "batch_size": 512, "optimizer": "sgd", "schedule": "cosine",
            "max_grad_norm": 1.0}  # fmt: skip


@pytest.mark.parametrize(("task", "wanted"), [("librispeech/clean", WAV2VEC2), ("imagenet", IMAGENET)])
def test_the_whole_setting_of_deep_compression(task: str, wanted: dict[str, Any]) -> None:
    stage = _stage(task)
    assert {name: getattr(stage, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("task", "batch", "devices"),
    [("squad1", 3, 8), ("glue/mrpc", 16, 8), ("cnn_dailymail", 16, 8), ("xsum", 16, 8), ("wikitext103/token", 16, 32)],
)
def test_one_convention_of_batches(task: str, batch: int, devices: int) -> None:
    """GPUSQ-TLM, table 6 (published/gpusq_tlm_table6.csv): batch_size and gpu_num, for BERT, BART and OPT-125M."""
    paper = get_task(task).finetune
    assert paper is not None
    assert (paper.batch_size, paper.devices, paper.step) == (batch, devices, batch * devices)
    assert _stage(task).batch_size == batch
    assert f"on each of {devices} devices, --batch-size {paper.step} on one" in str(paper)


def test_every_default_makes_a_recipe_and_nothing_unsaid_is_changed() -> None:
    (plain,) = Recipe.load("dense").stages
    for task in TASKS.values():
        if task.finetune is None:
            continue
        stage = _stage(task.name)
        assert isinstance(stage, Finetune)
        untouched = set(Finetune.model_fields) - set(task.finetune.settings())
        assert all(getattr(stage, name) == getattr(plain, name) for name in untouched)


def test_the_command_trains_by_the_paper(tmp_path: Path) -> None:
    """SGD with a cosine for ImageNet, as the folder's record says; what the command says wins."""
    random = np.random.default_rng(0)
    for wnid in ("n01440764", "n01443537"):
        (tmp_path / "imagenet/train" / wnid).mkdir(parents=True)
        for index in range(2):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "imagenet/train" / wnid / f"{index}.JPEG")
    dense = load_dense("timm/vit_tiny_patch16_224", model_args=TIMM_ARGS | {"num_classes": 1000, "in_chans": 3})
    save_dense(dense.model, None, tmp_path / "vit")
    options = ["--data-dir", tmp_path, "--epochs", 1, "--batch-size", 4, "--energy", "sensors", "-o", tmp_path / "out"]
    (tmp_path / "out.work").mkdir()  # an old run's, thrown away by --restart: its energy is no part of this one's
    found = CliRunner().invoke(app, [str(a) for a in ("finetune", tmp_path / "vit", "-t", "imagenet", *options,
                                                      "--restart")])  # fmt: skip
    assert found.exit_code == 0, f"{found.output}\n{found.exception!r}"
    assert "optimizer sgd, schedule cosine" in " ".join(found.stderr.split())
    (stage,) = json.loads((tmp_path / "out/squeezoo_training.json").read_text())["recipe"]["stages"]
    said = {"epochs": 1.0, "batch_size": 4}
    assert {name: stage[name] for name in IMAGENET} == IMAGENET | said
    assert json.loads((tmp_path / "out/energy.json").read_text())["resumed"] is False


def test_energy_of_a_run_that_goes_on_says_so(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    for left, restart, resumed in ((False, False, False), (True, False, True), (True, True, False)):
        if left:
            (tmp_path / "made.work").mkdir(exist_ok=True)
        with recording_energy(tmp_path / "made", "sensors", "cpu", restart):
            pass
        assert json.loads((tmp_path / "made/energy.json").read_text())["resumed"] is resumed
