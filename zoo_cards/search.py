"""`Search`: what a reported score was chosen from. A test score without its trials and search space says little.

Source: Dodge et al. 2019 (expected validation performance); ALGORITHMS E.5 and E.7.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..eval.expected import expected_validation_performance
from .strict import record_from

SWEEP = "sweep.json"


@dataclass(frozen=True)
class Search:
    """The trials behind a card.

    Args:
        model, recipe: what every trial started from, as a name without a folder, and how it was trained; None where the
            record is older than these fields.
        task, metric, higher_is_better: what the trials were chosen by. split: of validation.
        validation: where the validation rows come from, in words.
        method, seed, space: how the settings were drawn and from what.
        planned, failed: numbers of trials. values: validation value of every complete trial, in their order.
        best: settings of the trial that the card reports, the best one of ``values``.
        mean_seconds: mean training time of a complete trial; None where it was not recorded.
        device: where they were trained.
    """

    task: str
    metric: str
    higher_is_better: bool
    split: str
    validation: str
    method: str
    seed: int
    space: Mapping[str, Any]
    planned: int
    failed: int
    values: tuple[float, ...]
    best: Mapping[str, Any]
    mean_seconds: float | None
    device: str
    model: str | None = None
    recipe: str | None = None

    def __post_init__(self) -> None:
        if not self.values or not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"Search: expected finite validation values of complete trials, got {self.values!r}")
        if not self.space:
            raise ValueError("Search: the search space is empty; a best value means nothing without it")
        if self.failed < 0 or self.planned < len(self.values) + self.failed:
            raise ValueError(
                f"Search: {len(self.values)} complete and {self.failed} failed trials of {self.planned} planned"
            )

    @property
    def best_value(self) -> float:
        """Validation value of the reported trial."""
        return max(self.values) if self.higher_is_better else min(self.values)

    @property
    def expected(self) -> tuple[list[float], list[float]]:
        """(E_n, sd_n) of the best of n trials, n = 1 .. their number."""
        return expected_validation_performance(self.values, self.higher_is_better)

    @classmethod
    def load(cls, path: str | Path) -> Search:
        """From ``sweep.json`` as `squeezoo sweep` writes it, or the folder that holds it.

        Raises:
            FileNotFoundError: no such file. ValueError: not a sweep, or one without a complete trial; names the file.
        """
        path = Path(path)
        path = path / SWEEP if path.is_dir() else path
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no report of a sweep: {type(error).__name__} {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Search:
        """From ``SweepReport.to_dict()``; the best value and the curve are computed anew from the trials."""
        done = [trial for trial in report["trials"] if trial["state"] == "complete"]
        if not done:
            raise ValueError(f"no trial of {len(report['trials'])} is complete, so nothing was chosen")
        sign = 1 if report["higher_is_better"] else -1
        best = max(done, key=lambda trial: (sign * trial["value"], -trial["index"]))
        seconds = [trial["seconds"] for trial in done if trial["seconds"] is not None]
        return cls(
            task=report["task"], metric=report["metric"], higher_is_better=report["higher_is_better"],
            split=report["split"], validation=report["validation"], method=report["method"], seed=report["seed"],
            space=report["search_space"], planned=len(report["trials"]),
            failed=sum(trial["state"] == "failed" for trial in report["trials"]),
            values=tuple(float(trial["value"]) for trial in done), best=best["settings"],
            mean_seconds=statistics.fmean(seconds) if seconds else None, device=report["device"],
            model=_name(report.get("model")), recipe=report.get("recipe"),
        )  # fmt: skip

    @classmethod
    def from_dict(cls, data: Any) -> Search:
        """From a card's JSON data; cards written before ``model`` and ``recipe`` were recorded have neither."""
        older = {"model": None, "recipe": None}
        return record_from(cls, {**older, **data} if isinstance(data, Mapping) else data)

    def check_chose(self, *, model: str, recipe: str, task: str) -> None:
        """Whether these trials are of this model, recipe and task; what an older record does not say is not checked.

        Args:
            model: a name or a folder.

        Raises:
            ValueError: they are of another; names all that differ.
        """
        mine = {"recipe": self.recipe, "model": self.model, "task": self.task}
        wanted = {"recipe": recipe, "model": _name(model), "task": task}
        other = [f"{key} {mine[key]}, expected {wanted[key]}" for key in mine if mine[key] not in (None, wanted[key])]
        if other:
            raise ValueError(f"the sweep is of another run: {'; '.join(other)}")


def _name(model: str | None) -> str | None:
    """A model's folder without the way to it: cards hold no path of a machine."""
    return None if model is None else Path(model).name
