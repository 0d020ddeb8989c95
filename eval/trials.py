"""The record of a sweep: its trials, the best one by validation alone, and what n trials are worth.

Sources: Dodge et al. 2019 (expected validation performance); ALGORITHMS E.5 and E.7.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .expected import expected_validation_performance
from .fields import require_bool, require_text

State = Literal["complete", "failed", "running", "waiting"]


@dataclass(frozen=True)
class Trial:
    """One trial: its place in the plan, settings, validation value and seconds of training (None until complete)."""

    index: int
    settings: Mapping[str, Any]
    state: State
    value: float | None
    seconds: float | None
    scores: tuple[Mapping[str, Any], ...] = ()
    error: str | None = None

    def __post_init__(self) -> None:
        if self.state == "complete" and (self.value is None or not math.isfinite(self.value)):
            raise ValueError(f"trial {self.index} is complete, so it has a finite value; got {self.value!r}")


@dataclass(frozen=True)
class SweepReport:
    """All of a sweep.

    Args:
        model, recipe, task, split, metric, higher_is_better: what was trained and what it was chosen by.
        validation: where the validation rows come from.
        search_space, method, seed: what was searched and how.
        trials: every planned trial, by index.
        reported: scores of the best trial on the split that the task reports; empty until asked for.
        libraries, device: where it ran.
    """

    model: str
    recipe: str
    task: str
    split: str
    metric: str
    higher_is_better: bool
    validation: str
    search_space: Mapping[str, Any]
    method: str
    seed: int
    trials: tuple[Trial, ...]
    reported: tuple[Mapping[str, Any], ...]
    libraries: Mapping[str, str]
    device: str

    def __post_init__(self) -> None:
        require_text(self, "model", "recipe", "task", "split", "metric", "validation", "method", "device")
        require_bool(self, "higher_is_better")
        if not self.search_space or not self.trials:
            raise ValueError("SweepReport needs its search space and its trials: a best value means nothing without")

    @property
    def complete(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.trials if trial.state == "complete")

    @property
    def best(self) -> Trial:
        """The trial with the best validation value, the first of equal ones. Raises ValueError when none is done."""
        if not self.complete:
            raise ValueError(f"no trial of {len(self.trials)} is complete: {self._first_error()}")
        sign = 1 if self.higher_is_better else -1
        return max(self.complete, key=lambda trial: (sign * float(trial.value or 0), -trial.index))

    @property
    def mean_seconds(self) -> float | None:
        seconds = [trial.seconds for trial in self.complete if trial.seconds is not None]
        return statistics.fmean(seconds) if seconds else None

    @property
    def expected(self) -> tuple[list[float], list[float]]:
        """(E_n, sd_n) for n = 1 .. the number of complete trials."""
        values = [float(trial.value) for trial in self.complete if trial.value is not None]
        return expected_validation_performance(values, self.higher_is_better)

    def _first_error(self) -> str:
        return next((trial.error for trial in self.trials if trial.error), "none has finished")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, with the best trial and the curve written out."""
        data = asdict(self)
        if self.complete:
            mean, sd = self.expected
            data |= {"best": asdict(self.best), "expected": mean, "expected_sd": sd, "mean_seconds": self.mean_seconds}
        return data

    def markdown(self) -> str:
        """The whole sweep as Markdown: what was searched, the trials from best to worst, the expected performance."""
        names = list(self.search_space)
        direction = "higher" if self.higher_is_better else "lower"
        lines = [
            f"# Sweep of {self.recipe} on {self.task}", "",
            f"Model {self.model}; {self.method} search, {len(self.trials)} trials, seed {self.seed}; {self.device}.",
            f"Chosen by {self.metric} ({direction} is better) on {self.validation}.", "",
            "| searched | values |", "| --- | --- |",
            *(f"| {name} | {_words(values)} |" for name, values in self.search_space.items()), "",
            f"| trial | {' | '.join(names)} | validation {self.metric} | training seconds |",
            "| ---: |" + " ---: |" * (len(names) + 2),
        ]  # fmt: skip
        sign = -1 if self.higher_is_better else 1
        ranked = sorted(self.trials, key=lambda t: (t.value is None, sign * (t.value or 0), t.index))
        for trial in ranked:
            chosen = " | ".join(f"{trial.settings[name]:g}" if isinstance(trial.settings[name], float)
                                else str(trial.settings[name]) for name in names)  # fmt: skip
            value = trial.state if trial.value is None else f"{trial.value:.4f}"
            seconds = "" if trial.seconds is None else f"{trial.seconds:.1f}"
            lines.append(f"| {trial.index} | {chosen} | {value} | {seconds} |")
        if self.complete:
            mean, sd = self.expected
            lines += ["", f"Expected validation {self.metric} of the best of n trials (Dodge et al. 2019):", ""]
            lines += ["| n | mean | sd |", "| ---: | ---: | ---: |"]
            lines += [f"| {n} | {m:.4f} | {s:.4f} |" for n, (m, s) in enumerate(zip(mean, sd, strict=True), 1)]
        if self.reported:
            found = ", ".join(
                f"{s['metric']} {s['value']:.4f} ({s['samples']:,} rows of {s['split']})" for s in self.reported
            )
            lines += ["", f"The best trial ({self.best.index}), scored once: {found}."]
        return "\n".join(lines) + "\n"


def _words(values: Any) -> str:
    if isinstance(values, Mapping):
        scale = " (log)" if values.get("log") else ""
        return f"{values['low']:g} to {values['high']:g}{scale}"
    return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def plot_expected(report: SweepReport, path: str | Path) -> Path:
    """Draw E_n with its spread against the number of trials as PNG, and against training time when that is known.

    Raises:
        ImportError: matplotlib is missing; the message names the extra. ValueError: no trial is complete.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'squeezoo[eval]'") from error
    best = report.best  # refuses a sweep without a complete trial
    mean, sd = report.expected
    budgets = list(range(1, len(mean) + 1))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(budgets, mean, marker="o", color="#1f5fa8")
    low, high = [m - s for m, s in zip(mean, sd)], [m + s for m, s in zip(mean, sd)]
    axes.fill_between(budgets, low, high, alpha=0.2, color="#1f5fa8", linewidth=0)
    axes.set_xlabel("trials")
    axes.set_ylabel(f"expected validation {report.metric}")
    axes.set_title(f"{report.recipe} on {report.task}: best {best.value:.4f} of {len(budgets)} trials", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if report.mean_seconds:
        minutes = report.mean_seconds / 60
        to_minutes, to_trials = partial(np.multiply, minutes), partial(np.multiply, 1 / minutes)
        top = axes.secondary_xaxis("top", functions=(to_minutes, to_trials))
        top.set_xlabel("training time in minutes (n x mean of a trial)")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})
    return path
