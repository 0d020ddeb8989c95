"""The Trainer callbacks of a stage: progress bar, the clock that asks for a checkpoint, and the hooks of mask policy,
dropout schedule and evaluation."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .attached import quantizers
from .dropout import ScheduledDropout
from .journal import Journal
from .objective import Objective, TrainingError
from .policies import Policy


class TrainingProgress(TrainerCallback):
    """Bar with loss and time left on the error stream, silent when that is no terminal; saves by wall clock.

    Args:
        title: shown left of the bar. total: optimizer steps. save_seconds: at least this long between checkpoints.
    """

    def __init__(self, title: str, total: int, save_seconds: float) -> None:
        self.title, self.total, self.save_seconds = title, total, save_seconds
        self.last_loss = float("nan")
        self._saved_at = 0.0
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self._saved_at = time.monotonic()
        self._task = self._bar.add_task(self.title, total=self.total, completed=state.global_step, loss="-")
        self._bar.start()
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self._bar.update(self._task, completed=state.global_step)
        if time.monotonic() - self._saved_at >= self.save_seconds and state.global_step < self.total:
            control.should_save = True
            self._saved_at = time.monotonic()
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self.last_loss = float(logs["loss"])
            self._bar.update(self._task, loss=f"{self.last_loss:.4f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.stop()


class StageHooks(TrainerCallback):
    """Calls the mask policy and the dropout schedule, keeps scales positive, evaluates each epoch, and logs.

    Everything happens before the Trainer may save after a step, so that a checkpoint holds all of that step.
    """

    def __init__(
        self,
        objective: Objective,
        policy: Policy,
        dropout: ScheduledDropout | None,
        journal: Journal,
        steps_per_epoch: int,
        evaluate: Callable[[nn.Module], Mapping[str, Any]] | None,
        say: Callable[[str], None],
    ) -> None:
        self.student, self.policy, self.dropout, self.journal = objective.student, policy, dropout, journal
        self.running, self.stop_at_loss = objective.running, objective.stage.stop_at_loss
        self.steps_per_epoch, self.evaluate, self.say = steps_per_epoch, evaluate, say
        self._learned = [quantizer for _, quantizer in quantizers(self.student) if list(quantizer.parameters())]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.journal.resume_(state.global_step)
        for record in self.policy.start_(state.global_step):
            self.journal.write(state.global_step, record)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.dropout is not None:
            self.dropout.set_(state.global_step)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        step = state.global_step + 1  # the Trainer counts it only after this event
        for quantizer in self._learned:
            quantizer.clamp_()
        try:
            records = self.policy.after_step_(step, optimizer, self._epoch_ends(step))
        except ValueError as error:
            cure = "lower the learning rate" + (" or rho" if self.policy.method == "admm" else "")
            raise TrainingError(
                f"policy {self.policy.method} cannot rank the weights after step {step}: {error}; {cure}"
            ) from error
        for record in records:
            self.journal.write(step, record)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step = state.global_step
        stops = self.running is not None and self.running.value <= self.stop_at_loss and step < self.policy.total
        if self.running is not None and stops:
            control.should_training_stop = True
            control.should_save = False  # a run that goes on from a checkpoint makes another step
            self.journal.write(step, {"kind": "stopped", "loss": self.running.value})
            self.say(f"stops after {step} of {self.policy.total} steps, the running loss is {self.running.value:.4f}")
        if self.evaluate is None or not (stops or self._epoch_ends(step)):
            return
        with self.policy.pruned(), same_random_state(), torch.no_grad():
            self.student.eval()  # the Trainer's next step switches back
            found = self.evaluate(self.student)
        epoch = step / self.steps_per_epoch
        self.journal.write(step, {"kind": "evaluation", "epoch": epoch, **found})
        values = [
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
        ]
        self.say(f"epoch {epoch:g}: {', '.join(values)}")  # a bar on the same terminal stays below it

    def _epoch_ends(self, step: int) -> bool:
        return step % self.steps_per_epoch == 0 or step == self.policy.total


@contextmanager
def same_random_state() -> Iterator[None]:
    """Whatever draws random numbers inside, training goes on as if it had not."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
