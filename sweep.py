"""A sweep: one recipe with many settings, the best chosen on validation rows alone, and what n trials are worth.

Stop it at any moment and start it again with the same arguments: finished trials stay, a half-trained one goes on from
its last checkpoint. Start it several times, on one machine or on many with one storage URL and one output folder, and
the workers share the trials.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .compress.backends import Backend
from .compress.checkpoint import load
from .compress.engine import Compressed, compress, train_dense
from .compress.recipe import Recipe, RecipeError
from .compress.stages import Finetune
from .compress.train_data import TrainData
from .eval import get_task
from .eval.environment import device_name, library_versions
from .eval.held_out import Validation, with_validation
from .eval.results import atomic_write_json, atomic_write_text
from .eval.run import evaluate
from .eval.search_space import Method, SearchSpace, Settings
from .eval.task import Task
from .eval.trial_store import SweepError, TrialStore, sqlite_url
from .eval.trials import SweepReport, Trial, plot_expected
from .models.dense import Dense, load_dense
from .pipeline import load_for, training_data

__all__ = ["SweepError", "run_sweep", "with_settings"]

_PARTS = ("policy", "distill", "dropout")


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """A copy of a recipe with a trial's settings.

    Args:
        settings: what ``Recipe.override`` takes (``learning_rate``, ``epochs``, ``batch_size``, ``seed``, ...); the
            settings of policies, distillation and dropout by their own name (``rho``, ``decay``, ``temperature``) or
            with their place (``policy.rho``, ``distill.soft``, ``dropout.start``); those of other stages with theirs
            (``prune.damping``, ``calibrate.percentile``). They apply wherever they occur.

    Raises:
        RecipeError: a setting that the recipe does not have, or a value out of range.
    """
    places = {name: _places(recipe, name) for name in settings}
    plain = {name: value for name, value in settings.items() if not places[name]}
    chosen = recipe.override(**plain) if plain else recipe
    data = chosen.model_dump(mode="json")
    for name, found in places.items():
        for index, part, key in found:
            stage = data["stages"][index]
            (stage[part] if part else stage)[key] = settings[name]
    return Recipe.parse(data, where=f"recipe {recipe.name} with {dict(settings)}")


def _places(recipe: Recipe, name: str) -> list[tuple[int, str, str]]:
    """Where a setting that ``Recipe.override`` does not take stands: stage, part of it ("" the stage itself), key."""
    part, _, key = name.rpartition(".")
    if not part and (name in ("seed", "attention") or name in Finetune.model_fields):
        return []
    found = []
    for index, stage in enumerate(recipe.stages):
        if part == stage.stage != "finetune" and key in type(stage).model_fields and key != "stage":
            found.append((index, "", key))
        for one in (part,) if part else _PARTS:
            record = getattr(stage, one, None) if one in _PARTS else None
            if record is not None and key in type(record).model_fields and key != "method":
                found.append((index, one, key))
    if part and not found:
        raise RecipeError(f"recipe {recipe.name} has no setting {name!r} in any stage")
    if len(parts := sorted({one for _, one, _ in found})) > 1:
        raise RecipeError(f"{name!r} stands in {' and '.join(parts)}: write {parts[0]}.{name} or {parts[1]}.{name}")
    return found


@dataclass(frozen=True)
class _Trainer:
    """One trial: train, then score the validation part."""

    model: str
    pretrained: str | None
    recipe: Recipe
    base: Task
    validation: Validation
    data: TrainData | None
    out: Path
    data_dir: str | Path | None
    max_length: int | None
    batch_size: int
    device: str
    backend: Backend
    say: Callable[[str], None]

    def folder(self, index: int) -> Path:
        return self.out / f"trial-{index}"

    def run(self, index: int, settings: Settings) -> dict[str, Any]:
        words = ", ".join(f"{name} {value}" for name, value in settings.items())
        self.say(f"trial {index}: {words}")
        chosen = with_settings(self.recipe, settings)
        made = self._train(chosen, self.folder(index))
        scores = self.score(index, self.validation.split)
        self.say(f"trial {index}: {scores[0]['metric']} {scores[0]['value']:.4f}")
        resumed = any(record.get("resumed_at") for record in made.stages)  # the time before the stop is not known
        seconds = None if resumed else round(sum(float(record["seconds"]) for record in made.stages), 1)
        return {"value": scores[0]["value"], "seconds": seconds, "scores": scores}

    def _train(self, recipe: Recipe, folder: Path) -> Compressed:
        if folder.exists() and not Path(f"{folder}.work").exists():
            shutil.rmtree(folder)  # trained by a worker that died before it was scored
        dense = load_for(self.model, self.base, seed=recipe.seed, retrain=not recipe.rules)
        hardware = device_name(self.device)
        if not recipe.rules and recipe.student is None:
            assert self.data is not None
            return train_dense(dense, recipe, self.data, folder, device=self.device, hardware=hardware)
        ancestor = None if self.pretrained is None else load_for(self.pretrained, self.base, seed=recipe.seed)
        return compress(dense, recipe, self.data, folder, pretrained=ancestor, device=self.device, hardware=hardware)

    def score(self, index: int, split: str) -> list[dict[str, Any]]:
        """The scores of a trial's model on a split, as plain data."""
        folder = self.folder(index)
        if (folder / "squeezoo.json").is_file():
            from .models.folders import load_processor

            model, processor = load(folder, device=self.device, backend=self.backend), load_processor(folder)
        else:
            dense = load_dense(folder, kind="auto")
            model, processor = dense.model, dense.processor
        found = evaluate(
            model, self.validation.task, processor,
            split=split, data_dir=self.data_dir, batch_size=self.batch_size, device=self.device,
            max_length=self.max_length,
        )  # fmt: skip
        return [score.to_dict() for score in found]


def run_sweep(
    model: str,
    recipe: Recipe | str,
    task: Task | str,
    space: SearchSpace | Mapping[str, Any] | str | Path,
    out: str | Path,
    *,
    method: Method = "grid",
    trials: int | None = None,
    seed: int = 0,
    storage: str | None = None,
    name: str | None = None,
    pretrained: str | None = None,
    data_dir: str | Path | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    backend: Backend = "auto",
    held_out: float = 0.1,
    keep_all: bool = False,
    report: bool = False,
    retry_failed: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> SweepReport:
    """Run or continue a sweep; returns when every trial is done, those of other workers included.

    In ``out`` it leaves ``sweep.json``, ``sweep.md`` and ``expected_validation.png``, and the best trial's model.

    Args:
        model: what every trial starts from, see ``load_dense``. recipe: without rules: the dense model is fine-tuned.
        space: a search space, its plain data, or a YAML file; see ``eval.search_space``.
        method: ``grid`` takes every combination, ``random`` ``trials`` draws from ``seed``.
        storage: URL of Optuna's storage; None: SQLite in ``out``. name: of the study; None: recipe and task.
        max_length: tokens, of training and of scoring; None takes the task's own. limit: train on so many rows.
        batch_size: of evaluation.
        held_out: share of the training rows that the trials are chosen on, for tasks without a validation split.
        keep_all: keep every trial's model instead of the best one's.
        report: score the best trial on the split that the task reports: once, whatever the number of workers.
        retry_failed: try trials that failed with an error again.

    Raises:
        SearchSpaceError, RecipeError, SweepError: nothing was run. ValueError: every trial failed.
    """
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    task = get_task(task) if isinstance(task, str) else task
    if isinstance(space, str | Path):
        space = SearchSpace.load(space)
    elif not isinstance(space, SearchSpace):
        space = SearchSpace.parse(space)
    planned = space.trials(method, trials, seed)
    for settings in planned:
        with_settings(recipe, settings)  # every fault of every trial before the first is trained
    validation = with_validation(task, held_out)
    out = Path(out)
    plan = {
        "model": model, "pretrained": pretrained, "recipe": recipe.model_dump(mode="json"), "task": task.name,
        "task version": task.version, "validation": validation.note, "search space": space.to_dict(),
        "method": method, "seed": seed, "limit": limit, "max_length": max_length,
    }  # fmt: skip
    name = name or f"{recipe.name} {task.name}"
    url = storage or sqlite_url(out / "sweep.db")
    store = TrialStore(url, name, planned, task.higher_is_better, plan)
    say(f"validation: {validation.note}")
    dense: Dense = load_for(model, task, seed=recipe.seed, retrain=not recipe.rules)
    data = None
    if recipe.needs_data:
        data = training_data(
            validation.task, dense.processor,
            data_dir=data_dir, max_length=max_length, limit=limit, model=dense.model,
        )  # fmt: skip
    trainer = _Trainer(
        model, pretrained, recipe, task, validation, data, out, data_dir, max_length, batch_size, device, backend, say
    )

    def one(index: int, settings: Settings) -> dict[str, Any]:
        try:
            found = trainer.run(index, settings)
        except Exception as error:
            say(f"trial {index} failed: {error}")
            raise
        if not keep_all:
            _drop_beaten(store, trainer, index, found["value"], task.higher_is_better)
        return found

    store.work(one, retry_failed=retry_failed)

    def state_of(reported: tuple[Mapping[str, Any], ...]) -> SweepReport:
        return SweepReport(
            model=model, recipe=recipe.name, task=task.name, split=validation.split, metric=task.metric,
            higher_is_better=task.higher_is_better, validation=validation.note, search_space=space.to_dict(),
            method=method, seed=seed, trials=store.trials(), reported=reported, libraries=library_versions(),
            device=device_name(device),
        )  # fmt: skip

    found = state_of(())
    best = found.best
    for trial in found.trials if not keep_all else ():
        if trial.index != best.index:
            shutil.rmtree(trainer.folder(trial.index), ignore_errors=True)
    if report:
        found = state_of(_report_once(url, name, trainer, best, task))
    atomic_write_json(out / "sweep.json", found.to_dict())
    atomic_write_text(out / "sweep.md", found.markdown())
    plot_expected(found, out / "expected_validation.png")
    return found


def _drop_beaten(store: TrialStore, trainer: _Trainer, index: int, value: float, higher: bool) -> None:
    """Delete the models of finished trials but the best, this one counted; equal values: the first stays."""
    sign = 1 if higher else -1
    done = {t.index: sign * float(t.value) for t in store.trials() if t.value is not None} | {index: sign * value}
    best = max(done, key=lambda i: (done[i], -i))
    for other in done:
        if other not in (best, index):  # this one is not in the storage yet: another worker's view may differ
            with suppress(OSError):
                shutil.rmtree(trainer.folder(other), ignore_errors=True)


def _report_once(url: str, name: str, trainer: _Trainer, best: Trial, task: Task) -> tuple[Mapping[str, Any], ...]:
    """The best trial's scores on the reported split: a study of one trial, so that only one worker computes them."""
    store = TrialStore(
        url, f"{name} reported", [{"trial": best.index}], task.higher_is_better, {"split": task.report_split}
    )

    def score(index: int, settings: Settings) -> dict[str, Any]:
        scores = trainer.score(settings["trial"], task.report_split)
        return {"value": scores[0]["value"], "scores": scores}

    store.work(score)
    (trial,) = store.trials()
    if trial.error:
        raise SweepError(f"the best trial could not be scored on {task.report_split}: {trial.error}")
    return trial.scores
