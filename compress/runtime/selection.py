"""Selection: every layer runs the kernel that was measured to be the fastest on this device for its number of rows.

Each distinct workload of a model is measured once per device; the table lies in the user's cache (``select_cache.py``),
and what it says is all that a later load needs. Dense float32 is among the kernels, so where it wins, it runs. Decided
is by the fastest call of each kernel; what was measured while other processes took the CPU is not kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from .candidates import Named, units_of
from .choice import Choice, Unit, Workload, winner
from .select_cache import Times, device_identity, last_level_cache, read_times, table_path, write_times
from .select_timing import Sample, compare, is_busy, steady

VARIABLE = "SQUEEZOO_SELECT"
ROWS = (1, 256, 16, 1024, 64, 4)  # in the order of measuring: whatever the budget, the ends are known
COLD_ROWS = 64  # with more, reading the weights is a small part of a call
BUDGET_S = 10.0  # for one model on a new device; what does not fit is measured at a later load
_TOO_LONG_S = 0.4  # a call that takes longer says all that more rows would say

Measure = Literal["auto", "off", "again"]


@dataclass(frozen=True)
class Chosen:
    """What was decided for one workload.

    Args:
        names: modules of the model with this workload. choice: None where the built-in rule stays.
        times: by number of rows and kernel. source: ``measured`` now, ``table``, or why there is no choice.
    """

    workload: Workload
    names: tuple[str, ...]
    choice: Choice | None
    times: Mapping[int, Mapping[str, Sample]]
    source: str


@dataclass(frozen=True)
class Selection:
    """Of one model: where its table lies, the seconds that measuring took, what could not be done."""

    chosen: tuple[Chosen, ...]
    device: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def select_kernels_(
    model: nn.Module,
    *,
    measure: Measure | None = None,
    rows: Sequence[int] = ROWS,
    budget_s: float = BUDGET_S,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Selection:
    """Let every unit of a loaded model run its fastest kernel; the model's numbers stay those of its kernels.

    Args:
        model: after ``use_int8_`` or ``use_cuda_``.
        measure: ``auto`` measures what the table lacks; ``again`` everything; ``off`` measures nothing and reads no
            table: the built-in rules stay. None: what $SQUEEZOO_SELECT says, else ``auto``.
        rows: numbers of rows to measure at. budget_s: no measurement begins after so many seconds.
        tick: called before each measurement with how many are done and how many there are.

    Raises:
        ValueError: another word for ``measure``.
    """
    measure = measuring(measure)
    if measure == "off":
        return Selection(())
    groups = _by_workload(units_of(model))
    if not groups:
        return Selection(())
    device = _device_of(model)
    identity = device_identity(device)
    known = {} if measure == "again" else read_times(identity)
    cold = device.type == "cpu" and _weight_bytes(groups) > last_level_cache() // 2
    session = _Session(device, known, cold, tuple(dict.fromkeys(rows)), time.perf_counter() + budget_s, tick)
    session.patient = measure == "again"
    start = time.perf_counter()
    blocks = session.chosen({workload: found for workload, found in groups.items() if workload.kind == "block"})
    inside = _never_alone(blocks)
    others = {workload: found for workload, found in groups.items() if workload.kind != "block"}
    outside = {workload: found for workload, found in others.items() if not _all_inside(found, inside)}
    skipped = tuple(
        Chosen(workload, _names(found), None, {}, "inside blocks that run as one call")
        for workload, found in others.items()
        if workload not in outside
    )
    chosen = (*blocks, *session.chosen(outside), *skipped)
    notes = []
    if session.new and (why := write_times(identity, session.new)):
        notes.append(f"the table could not be written: {why}")
    if session.late:
        notes.append(f"{session.late} measurements did not fit into {budget_s:g} s; a later load makes them")
    if session.disturbed:
        notes.append(
            f"other processes disturbed {session.disturbed} measurements; a load on an idle machine makes them"
        )
    return Selection(chosen, identity, str(table_path(identity)), time.perf_counter() - start, tuple(notes))


@dataclass
class _Session:
    """The measuring of one model. ``patient``: even when other processes run."""

    device: torch.device
    known: Times
    cold: bool
    rows: tuple[int, ...]
    deadline: float
    tick: Callable[[int, int], None]
    new: Times = field(default_factory=dict)
    late: int = 0
    disturbed: int = 0
    patient: bool = False

    def chosen(self, groups: Mapping[Workload, list[Named]]) -> tuple[Chosen, ...]:
        """Measure what is missing, decide, and tell the units."""
        units = {workload: found[0].unit for workload, found in groups.items()}
        kernels = {workload: unit.kernels() for workload, unit in units.items()}
        times = {workload: self._known_times(workload, kernels[workload]) for workload in groups}
        measured = self._measure({w: unit for w, unit in units.items() if len(kernels[w]) > 1}, times)
        results = []
        for workload, found in groups.items():
            names, known = _names(found), dict(sorted(times[workload].items()))
            if len(kernels[workload]) < 2:
                why = f"only {kernels[workload][0]} runs here" if kernels[workload] else "no kernel runs here"
                results.append(Chosen(workload, names, None, {}, why))
            elif not known:
                results.append(Chosen(workload, names, None, {}, "not measured yet: the built-in rule"))
            else:
                choice = decide(known, units[workload].choose)
                for named in found:
                    named.unit.choose = choice
                    named.unit.prepare_(choice.kernels)
                results.append(Chosen(workload, names, choice, known, "measured" if workload in measured else "table"))
        return tuple(results)

    def _known_times(self, workload: Workload, kernels: Sequence[str]) -> dict[int, dict[str, Sample]]:
        """Those of the table that say something about these kernels."""
        found = self.known.get(self._key(workload), {})
        return {rows: t for rows, t in found.items() if rows in self.rows and set(t) <= set(kernels) and t}

    def _measure(
        self, units: Mapping[Workload, Unit], times: dict[Workload, dict[int, dict[str, Sample]]]
    ) -> set[Workload]:
        """Fill ``times``, all workloads at one number of rows before the next one, so that a used up budget leaves none
        without; the workloads that were measured."""
        missing = [(rows, workload) for rows in self.rows for workload in units if rows not in times[workload]]
        measured: set[Workload] = set()
        if missing and not self.patient and is_busy(self.device):
            self.disturbed += len(missing)
            return measured
        for done, (rows, workload) in enumerate(missing):
            if any(fewer < rows and _too_long(samples) for fewer, samples in times[workload].items()):
                continue
            if time.perf_counter() > self.deadline:
                self.late += 1
                continue
            self.tick(done, len(missing))
            unit, inputs = units[workload], units[workload].example(rows)
            calls = {kernel: _call(unit, kernel, inputs) for kernel in unit.kernels()}
            samples = compare(calls, self.device, cold=self.cold and rows <= COLD_ROWS)
            if samples and not steady(samples):
                self.disturbed += 1
            elif samples:
                times[workload][rows] = samples
                self.new.setdefault(self._key(workload), {})[rows] = samples
                measured.add(workload)
        return measured

    def _key(self, workload: Workload) -> str:
        return workload.key + (" cold" if self.cold else "")


def decide(times: Mapping[int, Mapping[str, Sample]], preferred: Callable[[int], str]) -> Choice:
    """The choice that a table makes: the same for the same table. ``preferred`` is the built-in rule."""
    fastest = {rows: {kernel: sample.fastest for kernel, sample in by.items()} for rows, by in times.items()}
    return Choice.of({rows: winner(seconds, preferred(rows)) for rows, seconds in fastest.items()})


def _too_long(samples: Mapping[str, Sample]) -> bool:
    return max(sample.fastest for sample in samples.values()) > _TOO_LONG_S


def _names(found: Iterable[Named]) -> tuple[str, ...]:
    return tuple(name for named in found for name in named.names)


def _call(unit: Unit, kernel: str, inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    return lambda: unit.run(kernel, *inputs)


def measuring(measure: Measure | None = None) -> Measure:
    """What is to be measured: as said, else by the environment.

    Raises:
        ValueError: another word than those of `select_kernels_`.
    """
    found = os.environ.get(VARIABLE, "auto") if measure is None else measure
    if found not in ("auto", "off", "again"):
        where = f"${VARIABLE}" if measure is None else "measure"
        raise ValueError(f"{where} is {found!r}; allowed: auto, off, again")
    return found  # type: ignore[return-value]


def _by_workload(found: Iterable[Named]) -> dict[Workload, list[Named]]:
    groups: dict[Workload, list[Named]] = {}
    for named in found:
        groups.setdefault(named.unit.workload(), []).append(named)
    return groups


def _never_alone(blocks: Iterable[Chosen]) -> tuple[str, ...]:
    """Blocks that always run as one call: the matrices inside are not chosen."""
    return tuple(
        name
        for chosen in blocks
        if chosen.choice is not None and chosen.choice.kernels == ("block",)
        for name in chosen.names
    )


def _all_inside(found: Iterable[Named], blocks: tuple[str, ...]) -> bool:
    return all(any(name.startswith(f"{block}.") for block in blocks) for named in found for name in named.names)


def _weight_bytes(groups: Mapping[Workload, list[Named]]) -> int:
    """Of all linears and FFNs as int8."""
    total = 0
    for workload, found in groups.items():
        if workload.kind != "block":
            first, second = workload.sizes[:2]
            total += len(found) * first * second * (2 if workload.kind == "ffn" else 1)
    return total


def _device_of(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")
