"""One run of a recipe's stages on one model, in list order and resumable."""

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
from ..models.dense import Dense
from .attach import CompressedWeight, attach_, fold_, inherit_masks_, magnitude_masks_, quantizers, requantize_
from .attention_map import activate_attention_
from .calibrate import calibrate_
from .count_progress import count_progress
from .finetune import Evaluate, finetune_
from .fingerprint import run_fingerprint
from .heads import Batch
from .oneshot import prune_oneshot_
from .permute import Permuted, describe_permuted, permute_
from .plan import Plan, make_plan
from .recipe import Recipe, RecipeError
from .sparsegpt import QuantizeColumn
from .stages import Calibrate, Finetune, Prune
from .start import refuse_broken, refuse_unlike_teachers, schedule_notes
from .teacher_cache import TeacherCache, cache_teacher
from .train_data import EpochSampler, TrainData
from .work import Work

ONE_SHOT_BATCH = 8  # sequences a calibration batch of wanda and sparsegpt


@dataclass(frozen=True)
class Run:
    """One run: ``base`` is the dense form of the student, ``teacher`` that of ``teacher: dense``; ``told`` goes into
    the records of the stages that it teaches."""

    base: Dense
    teacher: Dense
    recipe: Recipe
    data: TrainData | None
    device: str
    restart: bool
    save_seconds: float
    hardware: str | None
    evaluate: Evaluate | None
    say: Callable[[str], None]
    told: dict[str, Any] | None = None

    def plan_at(self, index: int) -> Plan:
        """The plan with the quantizers that are in force during a stage."""
        return make_plan(self.base.model, self.recipe.at(index))

    def stages(self, out: Path) -> tuple[nn.Module, Work]:
        """All stages on an attached copy of the base; finished ones are taken from the work folder.

        After an error the work folder stays where it holds something worth keeping.
        """
        self._refuse()
        new = [self.base.new_note] if self.base.new_note else []
        for note in (*new, *self.plan_at(0).notes, *schedule_notes(self.recipe, self.data)):
            self.say(f"note: {note}")
        student = deepcopy(self.base.model)
        permuted = self._permute(student)
        attach_(student.to(self.device), self.plan_at(0))
        models = (self.teacher.model, self.base.model)
        work = Work(Path(f"{out}.work"), run_fingerprint(models, self.recipe, self.data), self.restart)
        try:
            self._go_on_(student, permuted, work)
        except Exception:
            work.remove_if_worthless()
            raise
        return student, work

    def _refuse(self) -> None:
        """Before anything is written: what would end in an error later."""
        recipe, data = self.recipe, self.data
        if data is None and recipe.needs_data:
            raise RecipeError(
                f"recipe {recipe.name} trains or calibrates and needs data: pass a task with training data"
            )
        if data is not None and not len(data.features):
            raise RecipeError("the training data is empty: expected at least one sample")
        for model in {id(dense.model): dense for dense in (self.base, self.teacher)}.values():
            refuse_broken(model)
        refuse_unlike_teachers(self.base.model, self.teacher.model, recipe, data)

    def _go_on_(self, student: nn.Module, permuted: tuple[Permuted, ...], work: Work) -> None:
        recipe = self.recipe
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
            if stage.reextract_mask:
                magnitude_masks_(student)
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
            save_seconds=self.save_seconds, title=title, evaluate=self.evaluate, say=self.say,
        )  # fmt: skip
        work.keep_log(index, record.pop("history"))
        record |= {"epochs": stage.epochs, "learning_rate": stage.learning_rate, "batch_size": stage.batch_size}
        if self.told is not None and stage.distill is not None and stage.distill.teacher == "dense":
            record["teacher"] = self.told
        return record | {"samples": len(self.data.features), "device": self.device, "hardware": self.hardware}

    def _prune(self, student: nn.Module, stage: Prune, folder: Path) -> dict[str, Any]:
        record: dict[str, Any] = {"method": stage.method}
        if stage.method == "magnitude":
            magnitude_masks_(student, stage.scope)
        elif stage.method == "inherit":
            record["without_zeros"] = list(inherit_masks_(student))
            for name in record["without_zeros"]:
                self.say(f"{name} has no zeros to inherit and stays dense")
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
            return deepcopy(self.teacher.model)
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
