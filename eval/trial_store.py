"""A planned list of trials in an Optuna storage: any number of workers take them one by one, each trial once.

The plan stands in the storage as waiting trials with their place in it (``index``); Optuna hands a waiting trial to one
worker only. A worker that adds trials while another does so may add one twice; whoever takes such a twin sees the older
one, which is always there, and leaves it. A worker that dies (heartbeat, or its process is gone from this machine)
frees its trial for the next.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from .search_space import Settings
from .trials import State, Trial

HEARTBEAT_S, GRACE_S = 10, 90
_PLAN, _INDEX, _WORKER, _ERROR, _RETRY = "plan", "index", "worker", "error", "retry_of"


class SweepError(ValueError):
    """A sweep that cannot go on as asked."""


Objective = Callable[[int, Settings], Mapping[str, Any]]


def sqlite_url(path: str | Path) -> str:
    """The storage URL of a file."""
    return f"sqlite:///{Path(path).absolute().as_posix()}"


class TrialStore:
    """One study.

    Args:
        url: of the storage: ``sqlite:///FILE`` for one machine, ``postgresql://``, ``mysql://`` for many.
        name: of the study in it.
        planned: the settings of every trial; the place in this list is a trial's index.
        plan: what the study is: plain data that every worker must agree on.

    Raises:
        ImportError: Optuna is missing; the message names the extra.
        SweepError: the study is there with another plan, or the storage cannot be opened.
    """

    def __init__(
        self, url: str, name: str, planned: Sequence[Settings], higher_is_better: bool, plan: Mapping[str, Any]
    ) -> None:
        self.optuna = _optuna()
        self.planned = list(planned)
        self.study = self._open(url, name, "maximize" if higher_is_better else "minimize")
        wanted = json.loads(json.dumps({**plan, "trials": self.planned}))
        stored = self.study.user_attrs.get(_PLAN)
        if stored is None:
            self.study.set_user_attr(_PLAN, wanted)
        elif stored != wanted:
            differing = sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key))
            raise SweepError(
                f"the study {name!r} in {_without_password(url)} was begun with other {', '.join(differing)}: repeat "
                "its settings, or choose another name or output folder"
            )

    def _open(self, url: str, name: str, direction: str) -> Any:
        from sqlalchemy.exc import DBAPIError, SQLAlchemyError

        optuna = self.optuna
        if url.startswith("sqlite:///"):
            Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite:") else {"pool_pre_ping": True}
        for attempt in range(6):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    storage = optuna.storages.RDBStorage(
                        url, engine_kwargs=options, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_S
                    )
                return optuna.create_study(
                    storage=storage, study_name=name, direction=direction, load_if_exists=True,
                    sampler=optuna.samplers.RandomSampler(),
                )  # fmt: skip
            except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
                # two workers that create the tables of a new storage at once: the loser tries again
                if attempt == 5:
                    raise SweepError(f"the storage {_without_password(url)} cannot be opened: {error}") from error
                time.sleep(0.2 * 2**attempt)
            except (SQLAlchemyError, ImportError, ValueError) as error:
                raise SweepError(f"the storage {_without_password(url)} cannot be opened: {error}") from error
        raise AssertionError("unreachable")

    def work(self, objective: Objective, *, retry_failed: bool = False, poll_seconds: float = 1.0) -> None:
        """Take trials until all are done, waiting for those of other workers; take over what a dead worker left.

        Args:
            objective: ``objective(index, settings)`` gives ``{"value": finite float, "seconds": ..., "scores": ...}``.
                An exception marks its trial as failed with the text, and the next is taken.
            retry_failed: try the failed trials of earlier calls once more.
        """
        frozen = self.optuna.trial.TrialState
        if retry_failed:
            self._enqueue_failed()
        while True:
            self._free_dead()
            self._enqueue_missing()
            states = {trial.state for trial in self.study.get_trials(deepcopy=False)}
            if frozen.WAITING in states:
                self._take_one(objective)
            elif frozen.RUNNING in states:
                time.sleep(poll_seconds)
            else:
                return

    def _take_one(self, objective: Objective) -> None:
        def run(trial: Any) -> float:
            index = trial.user_attrs.get(_INDEX)
            if index is None or self._has_older_twin(trial.number, index):
                raise self.optuna.TrialPruned
            trial.set_user_attr(_WORKER, _this_worker())
            for name in self.planned[index]:  # so that Optuna's dashboard shows them
                trial.suggest_categorical(name, list(dict.fromkeys(settings[name] for settings in self.planned)))
            try:
                found = dict(objective(index, self.planned[index]))
                value = float(found.pop("value"))
                if not math.isfinite(value):
                    raise ValueError(f"the validation value is {value}")
            except Exception as error:
                trial.set_user_attr(_ERROR, f"{type(error).__name__}: {error}"[:2000])
                raise
            for name, data in found.items():
                trial.set_user_attr(name, data)
            return value

        # a trial that was taken over meanwhile (this machine slept) is finished already: the other's result stands
        taken_over = self.optuna.exceptions.UpdateFinishedTrialError
        try:
            self.study.optimize(run, n_trials=1, catch=(Exception,))
        except taken_over:
            return

    def trials(self) -> tuple[Trial, ...]:
        """Every planned trial as it stands, by index."""
        state = self.optuna.trial.TrialState
        words: dict[Any, State] = {
            state.COMPLETE: "complete", state.RUNNING: "running", state.WAITING: "waiting", state.FAIL: "failed",
        }  # fmt: skip
        found: dict[int, Trial] = {}
        # in order of merit, so that the best known state of an index is written last
        order = [state.FAIL, state.WAITING, state.RUNNING, state.COMPLETE]
        rows = [t for t in self.study.get_trials(deepcopy=False) if t.state in order and _INDEX in t.user_attrs]
        for row in sorted(rows, key=lambda t: (order.index(t.state), -t.number)):
            index, notes = row.user_attrs[_INDEX], row.user_attrs
            if row.state == state.FAIL and _ERROR not in notes:
                continue  # its worker died: it waits to be taken again
            found[index] = Trial(
                index, self.planned[index], words[row.state], row.value if row.state == state.COMPLETE else None,
                notes.get("seconds"), tuple(notes.get("scores", ())), notes.get(_ERROR),
            )  # fmt: skip
        return tuple(
            found.get(index) or Trial(index, settings, "waiting", None, None)
            for index, settings in enumerate(self.planned)
        )

    def _held(self, rows: Sequence[Any]) -> dict[int, list[int]]:
        """Index -> numbers of the trials that stand for it: waiting, running, complete, or failed by an error."""
        state = self.optuna.trial.TrialState
        retried = {row.user_attrs.get(_RETRY) for row in rows}
        held: dict[int, list[int]] = {}
        for row in rows:
            failed = row.state == state.FAIL and _ERROR in row.user_attrs and row.number not in retried
            if _INDEX in row.user_attrs and (failed or row.state in (state.WAITING, state.RUNNING, state.COMPLETE)):
                held.setdefault(row.user_attrs[_INDEX], []).append(row.number)
        return held

    def _has_older_twin(self, number: int, index: int) -> bool:
        return min(self._held(self.study.get_trials(deepcopy=False)).get(index, [number])) < number

    def _enqueue_missing(self) -> None:
        held = self._held(self.study.get_trials(deepcopy=False))
        for index, settings in enumerate(self.planned):
            if index not in held:
                self.study.enqueue_trial(settings, user_attrs={_INDEX: index})

    def _enqueue_failed(self) -> None:
        rows = self.study.get_trials(deepcopy=False)
        standing = {number for numbers in self._held(rows).values() for number in numbers}
        for row in rows:
            if row.number in standing and row.state == self.optuna.trial.TrialState.FAIL:
                index = row.user_attrs[_INDEX]
                self.study.enqueue_trial(self.planned[index], user_attrs={_INDEX: index, _RETRY: row.number})

    def _free_dead(self) -> None:
        """Fail the trials whose worker stopped its heartbeat, or is known to be gone from this machine."""
        optuna = self.optuna
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(self.study)
        for row in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            worker = row.user_attrs.get(_WORKER)
            if _never_began(row) if worker is None else _is_gone(worker):
                try:
                    self.study.tell(row.number, state=optuna.trial.TrialState.FAIL)
                except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    continue  # another worker was faster


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError("a sweep needs Optuna: pip install 'squeezoo[eval]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _this_worker() -> dict[str, Any]:
    import psutil

    return {"machine": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _never_began(row: Any) -> bool:
    """Whether a trial was taken long ago and its worker has not said a word since, not even by a heartbeat."""
    started = row.datetime_start
    return started is not None and (datetime.now() - started).total_seconds() > 10 * GRACE_S


def _is_gone(worker: Mapping[str, Any]) -> bool:
    """Whether a worker ran on this machine and its process has ended; another process may have its number by now."""
    import psutil

    if worker["machine"] != platform.node():
        return False
    try:
        return abs(psutil.Process(worker["pid"]).create_time() - worker["started"]) > 1
    except psutil.NoSuchProcess:
        return True


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.split('://')[0]}://...@{tail}" if at else url
