"""The engine: plan, stages in list order, checkpoint. It never names an architecture.

Beside the output folder stands ``<out>.work`` while the run lasts: the state after each finished stage and the
Trainer's checkpoints of the running one. A run killed at any step and started again with the same arguments goes on
from there and ends with the same weights as an uninterrupted one (same hardware, same seed).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..models.dense import Dense, describe, library_of, load_dense, save_dense
from .attach import attach_, fold_, prune_, quantizers
from .calibrate import calibrate_
from .checkpoint import save_checkpoint
from .finetune import Batch, EpochSampler, TrainData, finetune_
from .plan import Plan, make_plan
from .recipe import Recipe, RecipeError
from .stages import Calibrate, Finetune, Prune

PROGRESS = "progress.json"
PROVENANCE = "squeezoo_training.json"


class RunError(RuntimeError):
    """A run that cannot start or go on."""


@dataclass(frozen=True)
class Compressed:
    """What ``compress`` made: the folder, the plan, one record per stage (name, steps, seconds, loss)."""

    folder: Path
    plan: Plan
    stages: tuple[dict[str, Any], ...]


def compress(
    model: Dense | nn.Module | str,
    recipe: Recipe | str,
    data: TrainData | None,
    out: str | Path,
    *,
    name: str | None = None,
    device: str = "cpu",
    restart: bool = False,
    save_seconds: float = 120.0,
    hardware: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Compressed:
    """Compress a dense model with a recipe and write a checkpoint folder.

    Args:
        model: the trained dense model, or the source of one (see ``load_dense``). It is not changed, and is the teacher
            of ``teacher: dense``.
        recipe: a recipe, or the name or path of one.
        data: training samples; None for recipes that neither train nor calibrate.
        out: the checkpoint folder to write.
        name: of the checkpoint; default the folder's name.
        restart: throw an unfinished run in ``<out>.work`` away instead of resuming it.
        save_seconds: at least this long between two checkpoints of a training stage.
        hardware: what ``device`` is called, for the training record.
        say: receives one line per stage.

    Raises:
        AdapterError, PlanError, RecipeError: the recipe or model is refused; nothing was written.
        RunError: ``<out>.work`` holds an unfinished run of something else.
    """
    dense = _as_dense(model)
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    plan = make_plan(dense.model, recipe)
    student, work = _run_stages(dense, recipe, plan, data, out, device, restart, save_seconds, hardware, say)
    folder = save_checkpoint(
        student, plan, recipe, out,
        name=name or Path(out).name, base={"name": dense.name, "revision": dense.revision},
        processor=dense.processor, training=tuple(work.records),
    )  # fmt: skip
    work.remove()
    return Compressed(folder, plan, tuple(work.records))


def train_dense(
    dense: Dense,
    recipe: Recipe | str,
    data: TrainData,
    out: str | Path,
    *,
    device: str = "cpu",
    restart: bool = False,
    save_seconds: float = 120.0,
    hardware: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Compressed:
    """Fine-tune the dense baseline with a recipe without rules and write an ordinary transformers / timm folder.

    A file ``squeezoo_training.json`` in it says what it was trained from and how.

    The same stages, seeds, batches and resume as ``compress``, so that dense and compressed compare.

    Raises:
        RecipeError: the recipe compresses something. RunError: as ``compress``.
    """
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    if recipe.rules:
        raise RecipeError(f"recipe {recipe.name} has rules; the dense baseline takes one without, such as `dense`")
    plan = make_plan(dense.model, recipe)
    student, work = _run_stages(dense, recipe, plan, data, out, device, restart, save_seconds, hardware, say)
    save_dense(student.to("cpu"), dense.processor, Path(out))
    provenance = {
        "base": {"name": dense.name, "revision": dense.revision},
        "recipe": recipe.model_dump(mode="json"),
        "training": work.records,
    }
    (Path(out) / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
    work.remove()
    return Compressed(Path(out), plan, tuple(work.records))


def read_provenance(folder: str | Path) -> dict[str, Any] | None:
    """What ``train_dense`` says about its folder: ``base``, ``recipe``, ``training``; None for other folders."""
    path = Path(folder) / PROVENANCE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _as_dense(model: Dense | nn.Module | str) -> Dense:
    if isinstance(model, Dense):
        return model
    if isinstance(model, nn.Module):
        return Dense(model.eval(), None, type(model).__name__, None, library_of(model))
    return load_dense(model)


def _run_stages(
    dense: Dense,
    recipe: Recipe,
    plan: Plan,
    data: TrainData | None,
    out: str | Path,
    device: str,
    restart: bool,
    save_seconds: float,
    hardware: str | None,
    say: Callable[[str], None],
) -> tuple[nn.Module, _Work]:
    """All stages on an attached copy of the dense model; finished ones are taken from the work folder."""
    if data is None and any(isinstance(stage, Calibrate | Finetune) for stage in recipe.stages):
        raise RecipeError(f"recipe {recipe.name} trains or calibrates and needs data: pass a task with training data")
    if data is not None and not len(data.features):
        raise RecipeError("the training data is empty: expected at least one sample")
    student = deepcopy(dense.model).to(device)
    attach_(student, plan)
    work = _Work(Path(f"{out}.work"), _fingerprint(dense, recipe, data), restart)
    if work.done:
        work.load_(student, work.done - 1)
        say(f"resuming after stage {work.done} of {len(recipe.stages)}")
    for index, stage in enumerate(recipe.stages):
        if index < work.done:
            continue
        started = time.monotonic()
        title = f"stage {index + 1}/{len(recipe.stages)} {stage.stage}"
        record: dict[str, Any] = {"stage": stage.stage}
        if isinstance(stage, Prune):
            prune_(student)
        elif isinstance(stage, Calibrate):
            assert data is not None
            calibrate_(student, _calibration_batches(data, stage, recipe, device), stage.percentile)
        else:
            assert data is not None
            teacher = _teacher(dense, plan, stage, recipe, index, work)
            record |= finetune_(
                student, stage, data, work.folder / f"stage-{index}",
                teacher=teacher, seed=recipe.seed + index, device=device, save_seconds=save_seconds, title=title,
            )  # fmt: skip
            record |= {"epochs": stage.epochs, "learning_rate": stage.learning_rate, "batch_size": stage.batch_size}
            record |= {"samples": len(data.features), "device": device, "hardware": hardware}
        record.setdefault("seconds", round(time.monotonic() - started, 1))
        work.finish(student, index, record)
        say(f"{title}: {record['seconds']:.0f} s")
    return student, work


def _calibration_batches(data: TrainData, stage: Calibrate, recipe: Recipe, device: str) -> Iterator[Batch]:
    """The first ``stage.batches`` batches of a fixed shuffle, of the size that training uses."""
    size = next((s.batch_size for s in recipe.stages if isinstance(s, Finetune)), 16)
    order = list(EpochSampler([1] * len(data.features), size, recipe.seed))[: stage.batches * size]
    for start in range(0, len(order), size):
        batch = data.collate([data.features[i] for i in order[start : start + size]])
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _teacher(dense: Dense, plan: Plan, stage: Finetune, recipe: Recipe, index: int, work: _Work) -> nn.Module | None:
    """The frozen teacher of a stage: the dense model, or the model as the last fine-tuning stage left it."""
    if stage.distill is None:
        return None
    teacher = deepcopy(dense.model)
    if stage.distill.teacher == "previous":
        last = max(k for k in range(index) if isinstance(recipe.stages[k], Finetune))
        attach_(teacher, plan)
        work.load_(teacher, last)
        if not any(quantizer.active for _, quantizer in quantizers(teacher)):
            fold_(teacher)
    return teacher


class _Work:
    """The folder of an unfinished run: ``progress.json`` and ``stage-<k>.safetensors`` for every finished stage."""

    def __init__(self, folder: Path, fingerprint: str, restart: bool) -> None:
        self.folder = folder
        self.records: list[dict[str, Any]] = []
        self.fingerprint = fingerprint
        if restart and folder.exists():
            shutil.rmtree(folder)
        if (folder / PROGRESS).is_file():
            progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            if progress["fingerprint"] != fingerprint:
                raise RunError(
                    f"{folder} holds an unfinished run with another recipe, model or data; give --restart to throw it "
                    "away, or choose another output folder"
                )
            self.records = progress["records"]
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._write()

    @property
    def done(self) -> int:
        return len(self.records)

    def _write(self) -> None:
        temporary = self.folder / f"{PROGRESS}.tmp"
        temporary.write_text(json.dumps({"fingerprint": self.fingerprint, "records": self.records}), encoding="utf-8")
        temporary.replace(self.folder / PROGRESS)

    def finish(self, model: nn.Module, index: int, record: dict[str, Any]) -> None:
        """Save the state after a stage, then mark it done, then drop the stage's own checkpoints."""
        state = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        temporary = self.folder / f"stage-{index}.tmp"
        save_file(state, temporary)
        temporary.replace(self.folder / f"stage-{index}.safetensors")
        self.records.append(record)
        self._write()
        shutil.rmtree(self.folder / f"stage-{index}", ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def load_(self, model: nn.Module, index: int) -> None:
        """Put the state after stage ``index`` into an attached model; quantizers know by their scale if they are on."""
        model.load_state_dict(load_file(self.folder / f"stage-{index}.safetensors"))


def _fingerprint(dense: Dense, recipe: Recipe, data: TrainData | None) -> str:
    """Changes when the recipe, the base weights or the data do; a run resumes only what it began."""
    digest = hashlib.sha256(recipe.model_dump_json().encode())
    digest.update(json.dumps(describe(dense.model), sort_keys=True).encode())
    for name, tensor in sorted(dense.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if data is not None:
        digest.update(str(len(data.features)).encode())
        for feature in (data.features[0], data.features[-1]):
            digest.update(repr(sorted((k, str(v)) for k, v in feature.items())).encode())
    return digest.hexdigest()
