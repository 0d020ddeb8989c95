"""The tables of a comparison: scores, sizes, speed, loading and memory, energy; what was not measured says so."""

from __future__ import annotations

from . import numbers
from .compare import Comparison, Variant
from .resource_sections import NOT_MEASURED, energy_cells
from .tables import Grid

COSTS = (
    "first load", "warm load", "tensors", "peak memory", "decoding, tokens a second", "training time", "trials",
)  # fmt: skip


def grids(comparison: Comparison) -> dict[str, Grid]:
    """The tables by title, each with one row per variant; without those that nothing was measured for."""
    made = {
        "Scores": score_grid(comparison), "Size": size_grid(comparison), "Speed": speed_grid(comparison),
        "Cost": cost_grid(comparison), "Energy": energy_grid(comparison),
    }  # fmt: skip
    return {title: grid for title, grid in made.items() if grid is not None}


def score_grid(comparison: Comparison) -> Grid | None:
    """A value and the difference to its dense model per column; the rank by the first column."""
    if not comparison.columns:
        return None
    header = ["variant", "rank"]
    for column in comparison.columns:
        rows = f"{column.samples:,} rows" + ("" if column.complete else ", sample")
        settings = "".join(f", {name} {value}" for name, value in sorted(column.settings.items()))
        more = settings if comparison.mixed else ""
        lower = "" if column.higher_is_better else ", lower is better"
        header += [
            f"{column.task} {column.split}: {numbers.metric_name(column.metric)} ({rows}{lower}{more})", "difference",
        ]  # fmt: skip
    lines = []
    for row in comparison.rows:
        line = [row.name, "-" if row.rank is None else str(row.rank)]
        for column in comparison.columns:
            score, dense = comparison.score(row, column), comparison.score(comparison.dense_of(row), column)
            sample = "" if score is None or score.complete else " (sample)"
            line.append("-" if score is None else numbers.value(score) + sample)
            line.append(
                "-" if score is None or dense is None or row.dense is None else numbers.difference(score, dense)
            )
        lines.append(line)
    return Grid(header, lines)


def size_grid(comparison: Comparison) -> Grid:
    """Bytes on disk and as the papers count, parameters and what is left of them, form of the matrices."""
    header = ["variant", "form", "files", "smaller", "paper size", "of FP16", "parameters", "not zero"]
    lines = []
    for row in comparison.rows:
        size = row.card.size
        if row.dense is None:
            lines.append([
                row.name, size.true_dense_dtype, numbers.size(size.true_dense_bytes), "-",
                f"{numbers.size(size.paper_dense_fp16_bytes)} (FP16)", "1", "-", "-",
            ])  # fmt: skip
            continue
        lines.append([
            row.name, _forms(row), numbers.size(size.true_bytes), f"{size.true_dense_bytes / size.true_bytes:.2f}x",
            numbers.size(size.paper_bytes), f"{size.paper_bytes / size.paper_dense_fp16_bytes:.4g}",
            f"{size.parameters:,}", f"{size.nonzeros:,} ({size.nonzeros / size.parameters:.1%})",
        ])  # fmt: skip
    return Grid(header, lines, left=2)


def speed_grid(comparison: Comparison) -> Grid | None:
    """Milliseconds and speed-up per condition. Every variant was timed beside its dense model, in a run of its own."""
    if not comparison.timed:
        return None
    header = ["variant", *(words.removesuffix(common(comparison)) for words in comparison.timed)]
    lines = []
    for row in comparison.rows:
        line = [row.name]
        for words in comparison.timed:
            speeds = row.speeds.get(words, ())
            if not speeds:
                line.append("-")
            elif row.dense is None:
                medians = [numbers.milliseconds(ms) for ms in sorted(speed.dense.median_ms for speed in speeds)]
                line.append(" to ".join(dict.fromkeys((medians[0], medians[-1]))) + " ms")
            else:
                speed = speeds[0]
                ratio = f"{numbers.speed_up(speed.speedup)} ({numbers.spread(speed.speedup_spread)})"
                line.append(f"{numbers.milliseconds(speed.compressed.median_ms)} ms, {ratio}")
        lines.append(line)
    return Grid(header, lines)


def cost_grid(comparison: Comparison) -> Grid | None:
    """Loading, memory, decoding, training and trials, those of `COSTS` that any card knows; None without any."""
    known = [name for name in COSTS if name not in unmeasured(comparison)]
    lines = [[row.name, *(cell for name, cell in zip(COSTS, _costs(row)) if name in known)] for row in comparison.rows]
    return Grid(["variant", *known], lines) if known else None


def unmeasured(comparison: Comparison) -> list[str]:
    """What no card of the comparison knows."""
    columns = zip(COSTS, zip(*(_costs(row) for row in comparison.rows)))
    missing = [name for name, cells in columns if all(cell in ("-", NOT_MEASURED) for cell in cells)]
    missing += [] if comparison.columns else ["scores"]
    missing += [] if comparison.timed else ["latency"]
    return missing + ([] if any(row.card.resources.energy for row in comparison.rows) else ["energy and CO2"])


def common(comparison: Comparison) -> str:
    """What all conditions of speed end in (``, against float32, AMD EPYC (2 threads)``); empty where they differ."""
    ends = {words.partition(", against ")[2] for words in comparison.timed}
    return f", against {ends.pop()}" if len(ends) == 1 else ""


def _costs(row: Variant) -> list[str]:
    found = row.card.resources
    loading = next((r.loading for r in found.loading if r.variant == row.kind), None)
    memory = next((r.memory for r in found.memory if r.variant == row.kind), None)
    decode = found.decode[0] if found.decode else None
    training, search = row.card.training, row.card.search
    cells = [NOT_MEASURED, NOT_MEASURED] if loading is None else [
        f"{loading.first_seconds:.3g} s", f"{loading.warm.median_ms / 1000:.3g} s",
    ]  # fmt: skip
    cells += [NOT_MEASURED, NOT_MEASURED] if memory is None else [
        numbers.size(memory.tensors), f"{numbers.size(memory.run_peak)} (batch {memory.batch})",
    ]  # fmt: skip
    if decode is None:
        cells.append(NOT_MEASURED)
    else:
        rate = decode.tokens_per_second[0 if row.dense is None else 1]
        cells.append(f"{rate:,.3g} (batch {decode.batch}, {decode.prompt} + {decode.new_tokens})")
    if row.dense is None:
        return [*cells, "-", "-"]
    cells.append("one-shot" if training is None else numbers.duration(training.seconds))
    cells.append(NOT_MEASURED if search is None else f"best of {len(search.values)}, {search.method}")
    return cells


def energy_grid(comparison: Comparison) -> Grid | None:
    """Power, kWh and CO2 of each variant's works; None when no card has any."""
    lines = []
    for row in comparison.rows:
        for found in row.card.resources.energy:
            if found.variant == row.kind:
                constants = f"PUE {found.energy.pue:g}, {found.energy.intensity:g} kg/kWh"
                lines.append([row.name, *energy_cells(found)[1:], constants])
    header = ["variant", "work", "rows", "time", "mean power, W", "joules a row", "kWh", "g CO2", "constants"]
    return Grid(header, lines, left=2) if lines else None


def _forms(row: Variant) -> str:
    """``2:4 int8``: from the file where it is recorded, else from the plan."""
    if row.card.storage:
        return ", ".join(dict.fromkeys(f"{form.form} {form.number}" for form in row.card.storage))
    plan = row.card.plan
    bits = " and ".join(f"int{bits}" for bits in plan.weight_bits)
    return " ".join(filter(None, (" and ".join(plan.patterns), bits))) or "-"
