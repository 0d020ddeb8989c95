"""The training progress bar, and the clock that asks the Trainer for a checkpoint."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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
