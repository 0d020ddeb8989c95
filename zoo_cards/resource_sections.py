"""Sections of a model card about costs: storage, decoding, loading, memory, energy, trials, other hardware, machine.

Each is a text made from the card alone. What was not measured is said to be so; nothing unknown becomes 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..eval.energy import TERMS
from . import numbers
from .card import COMPRESSED, Card
from .resources import EnergyRow
from .search import Search
from .tables import Grid, timing

NOT_MEASURED = "not measured"
GENERATORS = ("causal-lm", "summarization", "dialogue")  # kinds of tasks whose models write token by token


def storage(card: Card) -> str:
    """How the matrices lie in the file, one row per form."""
    if not card.storage:
        return ""
    rows = [
        [
            f"{form.form} {form.number}", form.note or "-", f"{form.count:,}", f"{form.weights:,}",
            numbers.size(form.bytes), f"{form.bits:.4g}", numbers.size(form.scale_bytes),
        ]
        for form in card.storage
    ]  # fmt: skip
    header = ["form", "note", "matrices", "weights", "bytes", "bits a weight", "scales"]
    return f"{Grid(header, rows, left=2).markdown()}\n\nBits a weight: values, indices and bitmaps; scales stand apart."


def decode(card: Card) -> str:
    """Prefill and per-token speed of generators."""
    found = card.resources.decode
    if not found:
        writes = any(data.pipeline in GENERATORS for data in card.data)
        return f"Decoding speed: {NOT_MEASURED}." if writes else ""
    rows = [
        [
            f"{d.batch}", f"{d.prompt} + {d.new_tokens}", timing(d.dense_prefill), timing(d.compressed_prefill),
            f"{numbers.speed_up(d.prefill_speedup)} ({numbers.spread(d.prefill_spread)})",
            timing(d.dense_token), timing(d.compressed_token),
            f"{numbers.speed_up(d.token_speedup)} ({numbers.spread(d.token_spread)})",
            " to ".join(f"{rate:,.3g}" for rate in d.tokens_per_second),
        ]
        for d in found
    ]  # fmt: skip
    header = [
        "batch", "prompt + new tokens", "prefill dense, ms", "compressed, ms", "speed-up",
        "token dense, ms", "compressed, ms", "speed-up", "tokens a second",
    ]  # fmt: skip
    where = _distinct(f"{d.device}, dense in {d.dtype}, compressed by {d.backend}, {d.repeats} repeats" for d in found)
    return (
        f"{Grid(header, rows, left=2).markdown()}\n\nDecoding on {where}. Prefill: from the prompt to the first "
        "token's scores; token: one further token for all rows, with the cache of keys and values; tokens a second: "
        "dense to compressed, all rows together, prefill left out."
    )


def loading_and_memory(card: Card) -> str:
    """Two tables, or what is missing of them."""
    return "\n\n".join([_loading(card), _memory(card)])


def _loading(card: Card) -> str:
    found = card.resources.loading
    if not found:
        return f"Loading time: {NOT_MEASURED}."
    rows = [
        [
            row.variant, f"{row.loading.first_seconds:.3g} s", f"{row.loading.warm.median_ms / 1000:.3g} s",
            f"{row.loading.warm.p10_ms / 1000:.3g} to {row.loading.warm.p90_ms / 1000:.3g} s",
            f"{row.loading.import_seconds:.3g} s",
        ]
        for row in found
    ]  # fmt: skip
    header = ["variant", "first load", "warm load", "10th to 90th percentile", "imports before"]
    dropped = all(row.loading.evicted for row in found)
    where = _distinct(f"{row.loading.device}, {row.loading.repeats} warm loads" for row in found)
    return (
        f"{Grid(header, rows).markdown()}\n\nOn {where}, each in a fresh process: first without any cache of kernels "
        f"and compilers, {'read from the disk' if dropped else 'the files perhaps still in memory'}; warm with both."
    )


def _memory(card: Card) -> str:
    found = card.resources.memory
    if not found:
        return f"Memory: {NOT_MEASURED}."
    gpu = any(row.memory.cuda_peak is not None for row in found)
    rows = []
    for row in found:
        m = row.memory
        cells: list[int | None] = [m.tensors, m.baseline, m.loaded, m.load_peak, m.run_peak]
        cells += [m.cuda_loaded, m.cuda_peak] if gpu else []
        size = _size(m.sequence, m.image_size, m.audio_seconds)
        rows.append([
            row.variant, f"batch {m.batch}, {size}", *("-" if cell is None else numbers.size(cell) for cell in cells)
        ])  # fmt: skip
    header = ["variant", "condition", "tensors", "before loading", "loaded", "peak of loading", "peak of running"]
    header += ["GPU loaded", "GPU peak"] if gpu else []
    where = _distinct(row.memory.device for row in found)
    return (
        f"{Grid(header, rows, left=2).markdown()}\n\nOn {where}: resident memory of a fresh process that loads and "
        "runs the model; tensors: all parameters and buffers (weights that a kernel has packed for itself lie "
        "outside); before loading: what Python and the libraries take."
    )


def energy(card: Card) -> str:
    """Mean power, kWh and CO2 with their constants."""
    found = card.resources.energy
    if not found:
        return f"Energy and CO2: {NOT_MEASURED}."
    reasons = _distinct(_sensors(row) for row in found)
    if all(row.energy.kwh is None for row in found):
        return f"Energy and CO2: {NOT_MEASURED} ({reasons})."
    rows = [energy_cells(row) for row in found]
    header = ["variant", "work", "rows", "time", "mean power, W", "joules a row", "kWh", "g CO2"]
    constants = _distinct(f"PUE {row.energy.pue:g}, {row.energy.intensity:g} kg CO2 per kWh" for row in found)
    return (
        f"{Grid(header, rows, left=2).markdown()}\n\nOn {_distinct(row.energy.device for row in found)}. kWh and CO2 "
        f"with {constants}; power and joules without PUE. {reasons}. The sensors count the whole package or board; "
        f"a term without a sensor is {NOT_MEASURED} and in no sum."
    )


def energy_cells(row: EnergyRow) -> list[str]:
    """Variant, work, rows, time, mean power, joules a row, kWh, g CO2; unknown ones say so."""
    e = row.energy
    powers = [
        f"{term} {watts:.3g}" + (" (estimated)" if term in e.estimated else "")
        for term in TERMS if (watts := e.mean_watts(term)) is not None
    ]  # fmt: skip
    joules = [value for value in e.joules.values() if value is not None]
    per_row = f"{sum(joules) / row.rows:.3g}" if joules and row.rows else NOT_MEASURED
    kwh, grams = e.kwh, e.co2_grams
    return [
        row.variant, row.work, "-" if row.rows is None else f"{row.rows:,}", numbers.duration(e.seconds),
        " + ".join(powers) or NOT_MEASURED, per_row,
        NOT_MEASURED if kwh is None else f"{kwh:.3g}", NOT_MEASURED if grams is None else f"{grams:.3g}",
    ]  # fmt: skip


def _sensors(row: EnergyRow) -> str:
    return "; ".join(f"{term}: {row.energy.sensors[term]}" for term in TERMS)


def other_hardware(card: Card) -> str:
    """The roofline model's table; empty without one."""
    found = card.resources.modelled
    if not found:
        return ""
    rows = [
        [
            m.hardware, m.condition, "GEMMs only" if m.scope == "gemms" else "whole model", m.efficiency,
            f"{m.dense_us:,.4g}", f"{m.compressed_us:,.4g}", numbers.speed_up(m.speedup),
        ]
        for m in found
    ]  # fmt: skip
    times = ["model: dense, us", "model: compressed, us", "model: ratio"]
    header = ["hardware", "condition", "scope", "efficiency", *times]
    formats = _distinct(m.dense_format for m in found)
    return (
        "**Model, not measured**: times of a roofline model from datasheet rates; nothing was run on this hardware."
        f"\n\n{Grid(header, rows, left=4).markdown()}\n\nDense in {formats}. Efficiency: the share of the datasheet's "
        "rates that kernels reach, fitted to timed GEMMs or a placeholder."
    )


def trials(card: Card) -> str:
    """Seeds, and what the reported score was chosen from."""
    found = {row.score.seed for row in card.scores if row.variant == COMPRESSED and row.score.seed is not None}
    found |= set() if card.training is None else {card.training.seed}
    seeds = sorted(found)
    said = f"Seed{'s' if len(seeds) > 1 else ''}: {', '.join(map(str, seeds)) if seeds else 'not recorded'}."
    if card.search is None:
        return f"{said} No search is recorded: validation score and expected validation performance are {NOT_MEASURED}."
    search = card.search
    metric = numbers.metric_name(search.metric)
    mean, sd = search.expected
    shown = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < len(mean)] + [len(mean)]
    curve = Grid(
        ["best of n trials", *map(str, shown)],
        [
            [f"expected {metric}", *(f"{numbers.shown(search.metric, mean[n - 1])}" for n in shown)],
            ["standard deviation", *(f"{numbers.deviation(search.metric, sd[n - 1])}" for n in shown)],
        ],
    )
    seconds = search.mean_seconds
    known = search.recipe is not None and search.model is not None
    of = f"of {search.recipe} from {search.model}" if known else "(model and recipe are not in its record)"
    return "\n\n".join([
        f"{said} {search.method.capitalize()} search {of}, {search.planned} trials from seed {search.seed} on "
        f"{search.device}: {len(search.values)} complete, {search.failed} failed; mean training time of a trial "
        f"{NOT_MEASURED if seconds is None else numbers.duration(seconds)}.",
        Grid(["searched", "values", "chosen"], _space(search), left=3).markdown(),
        f"Chosen by {metric} ({'higher' if search.higher_is_better else 'lower'} is better) on {search.validation}: "
        f"best {numbers.shown(search.metric, search.best_value)}{_reported(card, search)}.",
        curve.markdown(),
        "Expected validation performance of the best of n trials (Dodge et al. 2019), over the trials above.",
    ])  # fmt: skip


def _reported(card: Card, search: Search) -> str:
    """The score that the chosen trial then got, beside its validation score."""
    for row in card.scores:
        score = row.score
        if row.variant == COMPRESSED and (score.task, score.metric) == (search.task, search.metric):
            part = "" if score.complete else ", a sample"
            return f"; reported on {score.split} ({score.samples:,} rows{part}): {numbers.value(score)}"
    return ""


def _space(search: Search) -> list[list[str]]:
    def show(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    def values(found: Any) -> str:
        if isinstance(found, Mapping):
            words = [f"{show(found['low'])} to {show(found['high'])}", *(k for k in ("log", "integer") if found.get(k))]
            return ", ".join(words)
        return ", ".join(show(value) for value in found)

    return [[name, values(found), show(search.best.get(name, "-"))] for name, found in search.space.items()]


def machine(card: Card) -> str:
    """One sentence; empty where it was not recorded."""
    found = card.resources.machine
    if found is None:
        return ""
    parts = [f"{found.cpu} ({', '.join(found.features) or 'no features that matter'}), {found.cores} cores"]
    parts += [] if found.memory_bytes is None else [f"{numbers.size(found.memory_bytes)} of memory"]
    parts += [f"GPU {' and '.join(dict.fromkeys(found.gpus))}" if found.gpus else "no GPU"]
    parts += [f"{name} {version}" for name, version in found.cuda.items()] if found.gpus else []
    return f"Machine: {', '.join(parts)}."


def _size(sequence: int | None, image: Sequence[int] | None, seconds: float | None) -> str:
    if image is not None:
        return "{} x {} pixels".format(*image)
    return f"sequence {sequence}" if sequence is not None else f"{seconds:g} s of sound"


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))
