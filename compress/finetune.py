"""Fine-tuning of an attached model on ``transformers.Trainer``; ours is only what it lacks.

Added to the Trainer: the distillation loss, mask policies, the dropout schedule, a batch order that depends on seed and
epoch alone (so that a resumed run sees the same batches), augmentation that depends on seed and step alone, no weight
decay on scales, and checkpoints that are only resumed from when they are complete.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..models.torchvision_guard import ensure_torchvision_importable
from .attached import INPUT_QUANTIZER, compressed_weights, latent_OI, parameters_without_decay, quantizers
from .dropout import ScheduledDropout
from .journal import Journal
from .objective import Batch, Objective
from .policies import Policy, make_policy
from .quantizers import LsqQuantizer
from .stages import Finetune
from .teacher_cache import Numbered, TeacherCache, collate_numbered
from .train_data import EpochSampler, Rows, TrainData

__all__ = ["LOG", "Batch", "EpochSampler", "TrainData", "finetune_", "last_complete_checkpoint"]

LOG = "log.jsonl"
Evaluate = Callable[[nn.Module], Mapping[str, Any]]
SGD_MOMENTUM = 0.9  # of ``optimizer: sgd``; the sources that train with SGD do not state theirs


def finetune_(
    student: nn.Module,
    stage: Finetune,
    data: TrainData,
    folder: Path,
    *,
    teacher: nn.Module | TeacherCache | None = None,
    seed: int = 0,
    device: str = "cpu",
    save_seconds: float = 120.0,
    title: str = "finetune",
    evaluate: Evaluate | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train ``student`` in place for one stage; resumes from the last complete checkpoint in ``folder``.

    A resumed run must be given the student as it was at the stage's beginning. ``folder/log.jsonl`` gets one JSON
    object per line: what the mask policy did (``kind`` admm, iterative, sr_ste) and each evaluation.

    Args:
        evaluate: called at the end of each epoch and of the stage with the student in evaluation mode and pruned as it
            would be if training ended there; it must leave the student as it is. What it returns goes to the log.
        say: receives one line per evaluation.

    Returns:
        ``steps``; ``seconds`` of this call and ``resumed_at``, the step it began at; ``loss``, mean of the last tenth;
        ``history``, the lines of the log; ``mask_similarity``, its mean over the policy's records, where there are any.

    Raises:
        TrainingError: the loss is not finite, or the policy does not fit the student. The last checkpoint stays, and so
            does ``student``'s state in it.
    """
    ensure_torchvision_importable()
    from transformers import set_seed

    from .progress import StageHooks, TrainingProgress

    set_seed(seed)
    samples = len(data.features)
    total, steps_per_epoch = stage_steps(stage, samples)
    policy = make_policy(student, stage, total, steps_per_epoch, samples)
    dropout = None if stage.dropout is None else ScheduledDropout(student, stage.dropout)
    objective = Objective(student, stage, teacher, data.augment, seed)
    objective.policy = policy  # its buffers go into every checkpoint
    if isinstance(teacher, nn.Module):
        teacher.to(device)
    progress = TrainingProgress(title, policy.total, save_seconds)
    journal = Journal(folder / LOG, writes=int(os.environ.get("RANK", "0")) == 0)
    hooks = StageHooks(
        objective, policy, dropout, journal, steps_per_epoch, evaluate, lambda text: say(f"{title}: {text}")
    )
    cached = isinstance(teacher, TeacherCache)
    sampler = EpochSampler(data.lengths(), stage.batch_size, seed)
    objective.samples_at = sampler.at_step if _world() == 1 else None
    trainer = _trainer(objective, policy, stage, folder, seed, device)(
        train_dataset=Rows(Numbered(data.features) if cached else data.features),
        data_collator=collate_numbered(data.collate) if cached else data.collate,
        sampler=sampler,
        callbacks=[progress, hooks],
    )
    last = last_complete_checkpoint(folder)
    try:
        result = trainer.train(resume_from_checkpoint=str(last) if last else None)
        policy.finish_()
    finally:
        policy.release_()
        if dropout is not None:
            dropout.restore_()
    student.eval()
    similar = [
        record["similarity"] for record in journal.records if record.get("iteration") != 0 and "similarity" in record
    ]
    return {
        "steps": float(result.global_step),
        "seconds": round(float(result.metrics["train_runtime"]), 1),
        "resumed_at": float(last.name.split("-")[1]) if last else 0.0,
        "loss": round(progress.last_loss, 6),
        "history": journal.records,
        **({"mask_similarity": sum(similar) / len(similar)} if similar else {}),
    }


def stage_steps(stage: Finetune, samples: int) -> tuple[int, int]:
    """Optimizer steps of a stage (0 where its policy knows their number), and those of one epoch."""
    steps_per_epoch = math.ceil(math.ceil(samples / stage.batch_size) / _world())
    if stage.steps is not None:
        return stage.steps, steps_per_epoch
    return 0 if stage.epochs is None else max(1, math.ceil(steps_per_epoch * stage.epochs)), steps_per_epoch


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _trainer(
    objective: Objective, policy: Policy, stage: Finetune, folder: Path, seed: int, device: str
) -> Callable[..., Any]:
    """The Trainer of one stage, to be called with its data and callbacks."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    class StageTrainer(Trainer):
        def __init__(self, *, sampler: EpochSampler, **settings: Any) -> None:
            super().__init__(model=objective, args=arguments, optimizer_cls_and_kwargs=sgd, **settings)
            self.model_accepts_loss_kwargs = False  # our losses are means over a batch
            self.remove_callback(PrinterCallback)
            self.sampler = sampler

        def _get_train_sampler(self, *_: Any, **__: Any) -> EpochSampler:
            return self.sampler

        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            learned = set(parameters_without_decay(model))
            return [name for name in super().get_decay_parameter_names(model) if name not in learned]

        def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
            if stage.optimizer == "adamw":
                give_scales_their_rate_(optimizer, objective.student)
            return optimizer

        def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
            is_new = self.lr_scheduler is None
            scheduler: Any = super().create_scheduler(policy.period, *args, **kwargs)
            if is_new and policy.period < policy.total:
                scheduler.lr_lambdas = [_repeat(factor, policy.period) for factor in scheduler.lr_lambdas]
            return scheduler

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            objective.step = self.state.global_step
            loss = super().training_step(*args, **kwargs)
            if objective.running is not None:
                objective.running.add_(loss)
            if self.accelerator.sync_gradients:
                policy.after_backward_()
            return loss

    sgd = (torch.optim.SGD, {"lr": stage.learning_rate, "momentum": SGD_MOMENTUM}) if stage.optimizer == "sgd" else None
    warmup = stage.warmup_steps if stage.warmup_steps is not None else round(stage.warmup * policy.period)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=policy.total,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(stage.schedule, stage.schedule),
        warmup_steps=warmup,
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        seed=seed,
        use_cpu=device == "cpu",
        bf16=stage.precision == "bfloat16",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        logging_steps=max(1, policy.total // 10),
        save_strategy="no",
        save_total_limit=1,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one GPU: replicas of the student would not share its masks
    # Every process computes the policy's state for itself; sending it around at each step would double the traffic.
    ignored = [f"policy.{name}" for name, _ in policy.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, ignored)
    return StageTrainer


def _repeat(factor: Callable[[int], float], period: int) -> Callable[[int], float]:
    return lambda step: factor(step % period)


def give_scales_their_rate_(optimizer: torch.optim.Optimizer, student: nn.Module) -> None:
    """Give each learned scale s the rate ``lr * s / rms(w)``, w being the weight of its GEMM.

    Adam moves every parameter by about lr a step, whatever the size of its gradient. That is a fraction lr / rms(w) of
    a weight, but 30 times that of a weight's scale, which is max|w| / 127: scales would jump by percents a step.
    With this rate both move by the same fraction, which is what LSQ's gradient factor does for SGD (Esser et al.,
    arXiv:1902.08153, section 2.2).
    """
    rate = optimizer.param_groups[0]["lr"]
    groups, spreads = [], []
    for _, module, parametrization in compressed_weights(student):
        rms = float(latent_OI(module, parametrization).detach().square().mean().sqrt())
        for quantizer in (parametrization.quantizer, module._modules.get(INPUT_QUANTIZER)):
            if isinstance(quantizer, LsqQuantizer) and quantizer.active and rms > 0:
                relative = float(quantizer.scale.detach().mean()) / rms
                groups.append({"params": [quantizer.scale], "weight_decay": 0.0, "lr": rate * relative})
        spreads.append(rms)
    of_gemms = {id(parameter) for group in groups for parameter in group["params"]}
    for _, quantizer in quantizers(student):  # of attention maps: beside no weight, so the mean over the GEMMs
        if isinstance(quantizer, LsqQuantizer) and quantizer.active and id(quantizer.scale) not in of_gemms and spreads:
            relative = float(quantizer.scale.detach().mean()) * len(spreads) / sum(spreads)
            groups.append({"params": [quantizer.scale], "weight_decay": 0.0, "lr": rate * relative})
    own = {id(parameter) for group in groups for parameter in group["params"]}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
    for group in groups:
        optimizer.add_param_group(group)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest ``checkpoint-<step>`` that was written to its end; unfinished ones (a kill while saving) go."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in found:
        if _is_complete(path):
            return path
        shutil.rmtree(path, ignore_errors=True)  # several processes come here at once
    return None


def _is_complete(path: Path) -> bool:
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(path / "model.safetensors", framework="pt") as tensors:
            tensors.keys()
    except (OSError, ValueError, SafetensorError):
        return False
    world = _world()
    random_states = ["rng_state.pth"] if world == 1 else [f"rng_state_{rank}.pth" for rank in range(world)]
    written_last = all((path / name).is_file() for name in ("optimizer.pt", "scheduler.pt", *random_states))
    return written_last and int(state["global_step"]) == int(path.name.split("-")[1])
