"""Fine-tuning of an attached model on ``transformers.Trainer``; ours is only what it lacks.

Added to the Trainer: the distillation loss, a batch order that depends on seed and epoch alone (so that a resumed run
sees the same batches), augmentation that depends on seed and step alone, no weight decay on scales, and checkpoints
that are only resumed from when they are complete.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..models.torchvision_guard import ensure_torchvision_importable
from .attach import INPUT_QUANTIZER, compressed_weights, latent_OI, quantizers
from .objective import Batch, Objective
from .quantizers import LsqQuantizer
from .stages import Finetune


@dataclass(frozen=True)
class TrainData:
    """What a recipe trains and calibrates on.

    Args:
        features: one mapping per sample, as ``collate`` takes them.
        collate: list of features -> batch of tensors with ``labels`` [B].
        augment: batch, generator -> batch; training only. It must draw from the generator alone.
    """

    features: Sequence[Mapping[str, Any]]
    collate: Callable[[list[Mapping[str, Any]]], Batch]
    augment: Callable[[Batch, torch.Generator], Batch] | None = None

    def lengths(self) -> list[int]:
        """Tokens per sample, for batches of similar length; all 1 for images."""
        if "input_ids" not in self.features[0]:  # images: not decoded for this
            return [1] * len(self.features)
        return [len(feature["input_ids"]) for feature in self.features]


class EpochSampler(torch.utils.data.Sampler[int]):
    """Shuffled indices with samples of similar length side by side; the order is a function of (seed, epoch) alone."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = torch.tensor(lengths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        # Sort by length inside chunks of 50 batches: little padding, and still a different order each epoch.
        chunks = [c[self.lengths[c].argsort(stable=True)] for c in order.split(self.batch_size * 50)]
        batches = [b for c in chunks for b in c.split(self.batch_size)]
        full = [b for b in batches if len(b) == self.batch_size]
        rest = [b for b in batches if len(b) < self.batch_size]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()] + rest
        return iter(torch.cat(shuffled).tolist())


def finetune_(
    student: nn.Module,
    stage: Finetune,
    data: TrainData,
    folder: Path,
    *,
    teacher: nn.Module | None = None,
    seed: int = 0,
    device: str = "cpu",
    save_seconds: float = 120.0,
    title: str = "finetune",
) -> dict[str, float]:
    """Train ``student`` in place for one stage; resumes from the last complete checkpoint in ``folder``.

    Returns:
        ``steps``; ``seconds`` of this call and ``resumed_at``, the step it began at; ``loss``, mean of the last tenth.

    Raises:
        TrainingError: the loss is not finite. The last checkpoint stays, and so does ``student``'s state in it.
    """
    ensure_torchvision_importable()
    from transformers import Trainer, TrainingArguments, set_seed

    from .progress import TrainingProgress

    set_seed(seed)
    objective = Objective(student, stage, teacher, data.augment, seed)
    if teacher is not None:
        teacher.requires_grad_(False).eval().to(device)
    steps_per_epoch = math.ceil(len(data.features) / stage.batch_size)
    total_steps = max(1, math.ceil(steps_per_epoch * stage.epochs))
    sampler = EpochSampler(data.lengths(), stage.batch_size, seed)

    class StageTrainer(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> EpochSampler:
            return sampler

        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            scales = {f"{name}.scale" for name, _ in quantizers(model)}
            return [name for name in super().get_decay_parameter_names(model) if name not in scales]

        def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
            give_scales_their_rate_(optimizer, student)
            return optimizer

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            objective.step = self.state.global_step
            return super().training_step(*args, **kwargs)

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=total_steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(stage.schedule, stage.schedule),
        warmup_steps=round(stage.warmup * total_steps),
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        seed=seed,
        use_cpu=device == "cpu",
        bf16=stage.precision == "bfloat16",
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        logging_steps=max(1, total_steps // 10),
        save_strategy="no",
        save_total_limit=1,
    )
    progress = TrainingProgress(title, total_steps, save_seconds)
    trainer = StageTrainer(
        model=objective,
        args=arguments,
        train_dataset=_Rows(data.features),
        data_collator=data.collate,
        callbacks=[progress],
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    last = last_complete_checkpoint(folder)
    result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    for _, quantizer in quantizers(student):
        quantizer.clamp_()
    student.eval()
    return {
        "steps": float(result.global_step),
        "seconds": round(float(result.metrics["train_runtime"]), 1),
        "resumed_at": float(last.name.split("-")[1]) if last else 0.0,
        "loss": round(progress.last_loss, 6),
    }


def give_scales_their_rate_(optimizer: torch.optim.Optimizer, student: nn.Module) -> None:
    """Give each learned scale s the rate ``lr * s / rms(w)``, w being the weight of its GEMM.

    Adam moves every parameter by about lr a step, whatever the size of its gradient. That is a fraction lr / rms(w) of
    a weight, but 30 times that of a weight's scale, which is max|w| / 127: scales would jump by percents a step.
    With this rate both move by the same fraction, which is what LSQ's gradient factor does for SGD (Esser et al.,
    arXiv:1902.08153, section 2.2).
    """
    rate = optimizer.param_groups[0]["lr"]
    groups = []
    for _, module, parametrization in compressed_weights(student):
        rms = float(latent_OI(module, parametrization).detach().square().mean().sqrt())
        for quantizer in (parametrization.quantizer, module._modules.get(INPUT_QUANTIZER)):
            if isinstance(quantizer, LsqQuantizer) and quantizer.active and rms > 0:
                relative = float(quantizer.scale.detach().mean()) / rms
                groups.append({"params": [quantizer.scale], "weight_decay": 0.0, "lr": rate * relative})
    own = {id(parameter) for group in groups for parameter in group["params"]}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
    for group in groups:
        optimizer.add_param_group(group)


class _Rows(torch.utils.data.Dataset[Mapping[str, Any]]):
    """The features as the map-style dataset that the Trainer expects."""

    def __init__(self, features: Sequence[Mapping[str, Any]]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.features[index]


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest ``checkpoint-<step>`` that was written to its end; unfinished ones (a kill while saving) go."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in found:
        if _is_complete(path):
            return path
        shutil.rmtree(path)
    return None


def _is_complete(path: Path) -> bool:
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(path / "model.safetensors", framework="pt") as tensors:
            tensors.keys()
    except (OSError, ValueError, SafetensorError):
        return False
    written_last = all((path / name).is_file() for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"))
    return written_last and int(state["global_step"]) == int(path.name.split("-")[1])
