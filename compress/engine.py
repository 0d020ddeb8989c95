"""The engine: plan, stages in list order, checkpoint. It never names an architecture.

Beside the output folder stands ``<out>.work`` while the run lasts: the state after each finished stage and the
Trainer's checkpoints of the running one. A run killed at any step and started again with the same arguments goes on
from there and ends with the same weights as an uninterrupted one (same hardware, same seed).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..models import adapter_for, find_sites
from ..models.dense import Dense, library_of, load_dense, save_dense
from .attach import CompressedWeight, attach_, fold_, inherit_masks_, magnitude_masks_, quantizers, requantize_
from .attention_map import activate_attention_
from .calibrate import calibrate_
from .checkpoint import save_checkpoint
from .count_progress import count_progress
from .finetune import finetune_
from .heads import Batch
from .oneshot import prune_oneshot_
from .permute import Permuted, describe_permuted, permute_
from .plan import Plan, make_plan
from .provenance import PROVENANCE, is_trained, read_provenance, write_provenance
from .recipe import Recipe, RecipeError
from .sparsegpt import QuantizeColumn
from .stages import Calibrate, Finetune, Prune
from .start import refuse_unstorable, student_base
from .teacher_cache import TeacherCache, cache_teacher
from .train_data import EpochSampler, TrainData
from .work import RunError, Work, fingerprint

TRAINING_LOG = "training_log.jsonl"  # what policies did and what was scored after each epoch, where there is any
ONE_SHOT_BATCH = 8  # sequences a calibration batch of wanda and sparsegpt
Evaluate = Callable[[nn.Module], dict[str, float]]

__all__ = [
    "PROVENANCE",
    "Compressed",
    "Evaluate",
    "RunError",
    "compress",
    "is_trained",
    "read_provenance",
    "train_dense",
]


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
    pretrained: Dense | None = None,
    evaluate: Evaluate | None = None,
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
        pretrained: the model before its fine-tuning, with a head for the task; for recipes whose student starts from
            its first blocks.
        evaluate: model -> metrics; called after every epoch on the model as it would be saved then, and logged.
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
    base = student_base(dense, recipe, pretrained)
    plan = make_plan(base.model, recipe)
    refuse_unstorable(plan)
    run = _Run(dense, base, recipe, data, device, restart, save_seconds, hardware, evaluate, say)
    student, work = run.stages(Path(out))
    folder = save_checkpoint(
        student, plan, recipe, out,
        name=name or Path(out).name, base={"name": dense.name, "revision": dense.revision},
        processor=dense.processor, training=tuple(work.records),
    )  # fmt: skip
    work.write_log(Path(folder) / TRAINING_LOG)
    work.remove()
    return Compressed(folder, plan, tuple(work.records))


def train_dense(
    dense: Dense,
    recipe: Recipe | str,
    data: TrainData,
    out: str | Path,
    *,
    evaluate: Evaluate | None = None,
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
    run = _Run(dense, dense, recipe, data, device, restart, save_seconds, hardware, evaluate, say)
    student, work = run.stages(Path(out))
    save_dense(student.to("cpu"), dense.processor, Path(out))
    write_provenance(dense, recipe, work, Path(out))
    work.write_log(Path(out) / TRAINING_LOG)
    work.remove()
    return Compressed(Path(out), plan, tuple(work.records))


def _as_dense(model: Dense | nn.Module | str) -> Dense:
    if isinstance(model, Dense):
        return model
    if isinstance(model, nn.Module):
        return Dense(model.eval(), None, type(model).__name__, None, library_of(model))
    return load_dense(model, kind="auto")


@dataclass(frozen=True)
class _Run:
    """One run: ``dense`` is the teacher of ``teacher: dense``, ``base`` the dense form of the student."""

    dense: Dense
    base: Dense
    recipe: Recipe
    data: TrainData | None
    device: str
    restart: bool
    save_seconds: float
    hardware: str | None
    evaluate: Evaluate | None
    say: Callable[[str], None]

    def plan_at(self, index: int) -> Plan:
        """The plan with the quantizers that are in force during a stage."""
        return make_plan(self.base.model, self.recipe.at(index))

    def stages(self, out: Path) -> tuple[nn.Module, Work]:
        """All stages on an attached copy of the base; finished ones are taken from the work folder."""
        recipe = self.recipe
        if self.data is None and recipe.needs_data:
            raise RecipeError(
                f"recipe {recipe.name} trains or calibrates and needs data: pass a task with training data"
            )
        if self.data is not None and not len(self.data.features):
            raise RecipeError("the training data is empty: expected at least one sample")
        student = deepcopy(self.base.model)
        permuted = self._permute(student)
        attach_(student.to(self.device), self.plan_at(0))
        work = Work(Path(f"{out}.work"), fingerprint(self.dense, self.base, recipe, self.data), self.restart)
        if work.done:
            requantize_(student, self.plan_at(work.done - 1))
            work.load_(student, work.done - 1)
            self.say(f"resuming after stage {work.done} of {len(recipe.stages)}")
        for index, stage in enumerate(recipe.stages):
            if index < work.done:
                continue
            started = time.monotonic()
            title = f"stage {index + 1}/{len(recipe.stages)} {stage.stage}"
            record: dict[str, Any] = {"stage": stage.stage} | self._run(student, index, work, title)
            if permuted and index == 0:
                record["permuted"] = [asdict(gemm) for gemm in permuted]
            record.setdefault("seconds", round(time.monotonic() - started, 1))
            work.finish(student, index, record)
            self.say(f"{title}: {record['seconds']:.0f} s")
        return student, work

    def _permute(self, student: nn.Module) -> tuple[Permuted, ...]:
        """Channels in the order that N:M keeps most of; the same each time, so a resumed run finds its own again."""
        if not self.recipe.permute_channels:
            return ()
        patterns = {gemm.name: gemm.pattern for gemm in self.plan_at(0).gemms if gemm.pattern is not None}
        with count_progress("permute: GEMMs") as tell:
            permuted = permute_(find_sites(student, adapter_for(student)), patterns, progress=tell)
        self.say(describe_permuted(permuted))
        return permuted

    def _run(self, student: nn.Module, index: int, work: Work, title: str) -> dict[str, Any]:
        stage = self.recipe.stages[index]
        if isinstance(stage, Prune):
            return self._prune(student, stage, work.folder)
        if isinstance(stage, Calibrate):
            requantize_(student, self.plan_at(index))
            rounded = any(isinstance(s, Prune) and s.quantize for s in self.recipe.stages[:index])
            calibrate_(student, self._calibration_batches(stage), stage.percentile, keep_weights=rounded)
            return {}
        assert self.data is not None
        teacher: nn.Module | TeacherCache | None = self._teacher(stage, index, work)
        if stage.distill is not None and stage.distill.cache and isinstance(teacher, nn.Module):
            teacher = cache_teacher(
                teacher, student, stage.distill, self.data.features, self.data.collate, work.folder / "teacher",
                device=self.device, precision=stage.precision, say=self.say,
                key=f"{stage.distill.teacher} {json.dumps(self.plan_at(index).to_dict())}",
            )  # fmt: skip
        record: dict[str, Any] = finetune_(
            student, stage, self.data, work.folder / f"stage-{index}",
            teacher=teacher, seed=self.recipe.seed + index, device=self.device,
            save_seconds=self.save_seconds, title=title, evaluate=self.evaluate,
        )  # fmt: skip
        work.keep_log(index, record.pop("history"))
        record |= {"epochs": stage.epochs, "learning_rate": stage.learning_rate, "batch_size": stage.batch_size}
        return record | {"samples": len(self.data.features), "device": self.device, "hardware": self.hardware}

    def _prune(self, student: nn.Module, stage: Prune, folder: Path) -> dict[str, Any]:
        record: dict[str, Any] = {"method": stage.method}
        if stage.method == "magnitude":
            magnitude_masks_(student, stage.scope)
        elif stage.method == "inherit":
            inherit_masks_(student)
        else:
            assert self.data is not None
            record["samples"] = min(stage.samples, len(self.data.features))
            with count_progress(f"{stage.method}: GEMMs") as tell:
                prune_oneshot_(
                    student, stage.method, self._batches(stage.samples, ONE_SHOT_BATCH), progress=tell,
                    block_size=stage.block_size, damping=stage.damping, quantize=_rounder if stage.quantize else None,
                    offload=folder if stage.offload else None,
                )  # fmt: skip
        activate_attention_(student)
        return record

    def _calibration_batches(self, stage: Calibrate) -> Iterator[Batch]:
        size = next((s.batch_size for s in self.recipe.stages if isinstance(s, Finetune)), 16)
        return self._batches(stage.batches * size, size)

    def _batches(self, samples: int, size: int) -> Iterator[Batch]:
        """The first ``samples`` samples of a fixed shuffle in batches of ``size``."""
        if self.data is None:
            return
        order = list(EpochSampler([1] * len(self.data.features), size, self.recipe.seed))[:samples]
        for start in range(0, len(order), size):
            batch = self.data.collate([self.data.features[i] for i in order[start : start + size]])
            yield {name: tensor.to(self.device) for name, tensor in batch.items()}

    def _teacher(self, stage: Finetune, index: int, work: Work) -> nn.Module | None:
        """The frozen teacher of a stage: the dense model, or the student as the last fine-tuning stage left it."""
        if stage.distill is None:
            return None
        if stage.distill.teacher == "dense":
            return deepcopy(self.dense.model)
        teacher = deepcopy(self.base.model)
        last = max(k for k in range(index) if isinstance(self.recipe.stages[k], Finetune))
        plan = self.plan_at(last)
        attach_(teacher, plan)
        work.load_(teacher, last)
        if not plan.attention and not any(quantizer.active for _, quantizer in quantizers(teacher)):
            fold_(teacher)
        return teacher


def _rounder(parametrization: CompressedWeight, w_OI: Tensor) -> QuantizeColumn | None:
    """SparseGPT's joint quantization: columns rounded to the rule's levels, scales from the dense weight."""
    if parametrization.quantizer is None:
        return None
    rounder: QuantizeColumn = parametrization.quantizer.rounder(w_OI)
    return rounder
