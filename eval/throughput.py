"""What evaluation costs beside the model: whole evaluations against a bare loop of forward passes, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import torch
from torch import nn

from .environment import device_name, library_versions
from .fields import checked_fields, require_count, require_libraries, require_text
from .run import evaluate
from .runner import evaluating
from .task import Score, Task
from .timing import turns

MIN_ROUNDS = 3
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Throughput:
    """Seconds of a bare loop of forward passes and of the whole evaluation on the same batches.

    Args:
        task, split: of the scores. samples: rows. complete: whether these are the official split.
        batches: calls of the model. batch_size: most rows of one.
        device: the hardware, with its threads.
        bare_seconds, evaluate_seconds: of each round; a round measures both, in alternating order.
    """

    task: str
    split: str
    samples: int
    complete: bool
    batches: int
    batch_size: int
    device: str
    bare_seconds: tuple[float, ...]
    evaluate_seconds: tuple[float, ...]
    libraries: Mapping[str, str]

    def __post_init__(self) -> None:
        require_text(self, "task", "split", "device")
        require_count(self, "samples", "batches", "batch_size")
        require_libraries(self)
        if len(self.bare_seconds) != len(self.evaluate_seconds) or len(self.bare_seconds) < MIN_ROUNDS:
            raise ValueError(f"Throughput needs both times of at least {MIN_ROUNDS} rounds, got {self.bare_seconds!r}")
        if not all(seconds > 0 for seconds in (*self.bare_seconds, *self.evaluate_seconds)):
            raise ValueError("Throughput: seconds must be above 0")
        for name in ("bare_seconds", "evaluate_seconds"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))

    @property
    def shares(self) -> list[float]:
        """Of each round: how fast the evaluation is, where the bare loop is 1."""
        return [bare / whole for bare, whole in zip(self.bare_seconds, self.evaluate_seconds, strict=True)]

    @property
    def share(self) -> float:
        """Median over the rounds."""
        return median(self.shares)

    @property
    def best_share(self) -> float:
        """The fastest bare loop over the fastest evaluation: other processes only ever add time."""
        return min(self.bare_seconds) / min(self.evaluate_seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Throughput:
        """Build a record from `to_dict`'s data. Raises ValueError naming unknown or missing keys."""
        return cls(**checked_fields(cls, data))


def measure_throughput(
    model: nn.Module,
    task: Task | str,
    processor: Any,
    *,
    rounds: int = 5,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    **how: Any,
) -> Throughput:
    """Time `evaluate`, reading, preparing, decoding and scoring included, beside the forward passes alone.

    One evaluation first notes what the model is called with, and warms up; the bare loop makes the same calls again.

    Args:
        rounds: measurements of both, in alternating order.
        how: further arguments of `evaluate`: split, data_dir, limit, max_length, settings.

    Raises:
        ValueError: fewer than 3 rounds; a task whose calls keep state (text that is written token by token), so that
            they cannot be made again; or what `evaluate` raises.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(f"throughput needs at least {MIN_ROUNDS} rounds, got {rounds}")

    def whole() -> Sequence[Score]:
        return evaluate(model, task, processor, batch_size=batch_size, device=device, progress=False, **how)

    calls, (score, *_) = _recorded(model, whole)

    def bare() -> None:
        with evaluating(model):
            for arguments, named in calls:
                model(*arguments, **named)

    bare()
    seconds: tuple[list[float], list[float]] = ([], [])
    sides: tuple[Callable[[], Any], ...] = (bare, whole)
    for order in turns(rounds):
        for side in order:
            seconds[side].append(_seconds(sides[side], torch.device(device)))
    return Throughput(
        score.task, score.split, score.samples, score.complete, len(calls), batch_size, device_name(device),
        tuple(seconds[0]), tuple(seconds[1]), library_versions(),
    )  # fmt: skip


def _recorded(model: nn.Module, run: Callable[[], Sequence[Score]]) -> tuple[list[Call], Sequence[Score]]:
    """The calls of the model while ``run`` runs, and what that gives."""
    calls: list[Call] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        for value in (*arguments, *named.values()):
            if not (value is None or isinstance(value, torch.Tensor | bool | int | float | str)):
                raise ValueError(
                    f"{type(module).__name__} keeps state between its calls (a {type(value).__name__}): there is no "
                    "bare loop for a task that writes text; take one with a forward pass per row"
                )
        calls.append((arguments, dict(named)))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        return calls, run()
    finally:
        handle.remove()


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time, with everything that was sent to the device done."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start
