"""One model over several tasks: what can be scored is scored, what cannot is named with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .files import MissingDataError
from .fit import Requested, misfit, no_member
from .run import evaluate
from .task import Score, Setting, nearest

ERRORS = (ValueError, RuntimeError, OSError, ImportError)  # of one task; the others go on


@dataclass(frozen=True)
class Skipped:
    """A task without a score.

    Args:
        wrong: it should have been scored: it was asked for by its own name, or it broke, instead of not fitting the
            model or lacking its data.
    """

    task: str
    reason: str
    wrong: bool = True


@dataclass
class Outcome:
    """Scores and skipped tasks so far, in the order of the request; ``stopped`` by Ctrl-C."""

    scores: list[Score] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    stopped: bool = False

    @property
    def complete(self) -> bool:
        """Something was scored, and nothing is missing that should not be."""
        return bool(self.scores) and not self.stopped and not any(one.wrong for one in self.skipped)


def evaluate_several(
    model: nn.Module,
    requested: Sequence[Requested],
    processor: Any,
    *,
    split: str | None = None,
    data_dir: str | Path | None = None,
    settings: Mapping[str, Setting] | None = None,
    after: Callable[[Outcome], None] = lambda _: None,
    skip: Callable[[Skipped], None] = lambda _: None,
    **how: Any,
) -> Outcome:
    """Score a model on every task of a list that it can do.

    One task alone raises what `evaluate` raises. Of several, and of families, those that do not fit the model, or whose
    data is not there, are skipped.

    Args:
        settings: each goes to the tasks that have one of the name.
        after: called with everything so far after each task that was scored; tasks that have not had their turn stand
            among the skipped then.
        skip: called with each skipped task at once.
        how: further arguments of `evaluate`.

    Raises:
        ValueError: a split or a setting that none of the tasks has, a setting's value of the wrong type, or a family
            alone of which the model can do nothing.
    """
    how |= {"split": split, "data_dir": data_dir}
    if len({one.by for one in requested}) == 1:
        by, only = requested[0].by, requested[0].task
        if len(requested) == 1:
            outcome = Outcome(list(evaluate(model, only, processor, settings=settings, **how)))
            after(outcome)
            return outcome
        if all(misfit(model, one.task) for one in requested):
            raise no_member(model, [one.task for one in requested], by)
    chosen = _chosen(requested, split, settings or {})
    outcome, fitting = Outcome(), []
    for one in requested:
        reason = misfit(model, one.task) or _without_split(one, split)
        if reason is None:
            fitting.append(one)
            continue
        outcome.skipped.append(Skipped(one.task.name, reason, wrong=one.explicit))
        skip(outcome.skipped[-1])
    for place, one in enumerate(fitting):
        name = one.task.name
        try:
            outcome.scores += evaluate(model, one.task, processor, settings=chosen[name], **how)
        except KeyboardInterrupt:
            outcome.stopped = True
            outcome.skipped += _waiting(fitting[place:], "interrupted")
            break
        except ERRORS as error:
            missing = isinstance(error, MissingDataError)
            outcome.skipped.append(Skipped(name, str(error), wrong=one.explicit or not missing))
            skip(outcome.skipped[-1])
            if not outcome.scores:
                continue
        after(Outcome(outcome.scores, [*outcome.skipped, *_waiting(fitting[place + 1 :], "not yet scored")]))
    if outcome.stopped and outcome.scores:
        after(outcome)
    return outcome


def _waiting(requested: Sequence[Requested], reason: str) -> list[Skipped]:
    return [Skipped(one.task.name, reason) for one in requested]


def _without_split(one: Requested, split: str | None) -> str | None:
    try:
        one.task.size(one.task.report_split if split is None else split)
    except ValueError as error:
        return str(error)
    return None


def _chosen(
    requested: Sequence[Requested], split: str | None, settings: Mapping[str, Setting]
) -> dict[str, dict[str, Setting]]:
    """Of each task its settings, checked; raises ValueError for a split or a setting that no task has."""
    if all(_without_split(one, split) for one in requested):
        raise ValueError(_without_split(requested[0], split))
    known = dict.fromkeys(name for one in requested for name in one.task.settings)
    for name in settings:
        if name not in known:
            raise ValueError(nearest("setting", name, known or ("none: these tasks have no settings",)))
    chosen = {}
    for one in requested:
        own = {name: value for name, value in settings.items() if name in one.task.settings}
        one.task.resolved(own)
        chosen[one.task.name] = own
    return chosen
