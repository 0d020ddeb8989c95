"""What the papers print beside scores: speed-ups on their hardware, sizes, times, energy and CO2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from .parts import Base
from .published_models import of_nearest_model
from .published_scores import GPUSQ_RECIPES, THESIS_RECIPES, THESIS_TASKS
from .published_tables import Note, PublishedTable, published_table


@dataclass(frozen=True)
class PublishedCost:
    """One published pair of costs, as texts exactly as printed.

    Args:
        model, method, recipes: see `PublishedScore`. tasks: patterns; empty where the paper names none.
        what: quantity, unit, hardware and condition, in words.
    """

    model: str
    method: str
    recipes: tuple[str, ...]
    tasks: tuple[str, ...]
    what: str
    dense: str
    compressed: str
    source: str
    notes: tuple[Note, ...]


@cache
def published_costs() -> tuple[PublishedCost, ...]:
    """Every one of them, by table."""
    return (*_gpusq(), *_decoders(), *_deep_compression(), *_thesis())


def costs_for(base: Base, recipe: str, tasks: Iterable[str]) -> tuple[PublishedCost, ...]:
    """Those of this recipe for the model itself, else for others of its family; of these tasks, or of no task."""
    names = list(tasks)

    def fits(cost: PublishedCost) -> bool:
        return not cost.tasks or any(fnmatchcase(name, task) for name in names for task in cost.tasks)

    return of_nearest_model((cost for cost in published_costs() if recipe in cost.recipes and fits(cost)), base)


def _gpusq() -> Iterator[PublishedCost]:
    table = published_table("gpusq_tlm_table1")
    dense = {row["reference_model"]: row for row in table.rows if row["method"] == row["reference_model"]}
    for row in table.rows:
        model, method = row["reference_model"], row["method"]
        if method != model:
            yield from _speedups(
                table, row, dense[model], model, method, GPUSQ_RECIPES.get(method, ()), f"sequence 384, over {model}"
            )
    table = published_table("gpusq_tlm_table4")
    rows = {row["method"]: row for row in table.rows}
    for model in ("DistilBERT", "TinyBERT", "PKD-BERT"):
        method, both = f"{model}_GPUSQ", ("gpusq-gemm-int8", "gpusq-gemm-mha-int8")
        yield from _speedups(table, rows[method], rows[model], model, method, both, "sequence 384, over BERT-base")
    table = published_table("gpusq_tlm_table3")
    for row in table.rows[1:]:
        method, what = row["method"], "source 1024, target 60, beam 6"
        yield from _speedups(table, row, table.rows[0], "BART", method, GPUSQ_RECIPES[method], what)


def _speedups(
    table: PublishedTable,
    row: Mapping[str, str],
    dense: Mapping[str, str],
    model: str,
    method: str,
    recipes: tuple[str, ...],
    what: str,
) -> Iterator[PublishedCost]:
    for column, batch in (("speedup_bs1", 1), ("speedup_bs32", 32)):
        yield PublishedCost(
            model, method, recipes, (), f"speed-up on A100, batch {batch}, {what}", dense[column], row[column],
            table.source, table.notes_on(column, row),
        )  # fmt: skip


def _decoders() -> Iterator[PublishedCost]:
    table = published_table("gpusq_tlm_table2_speedup")
    columns = {
        "gpusq_tlm_gemm": ("GPUSQ-TLM_GEMM", ("gpusq-gemm-int8",)),
        "gpusq_tlm_gemm_mha": ("GPUSQ-TLM_GEMM-MHA", ("gpusq-gemm-mha-int8",)),
        "sparsegpt": ("SparseGPT", ("sparsegpt-2-4",)),
    }
    for row in table.rows:
        model, _, batch = row["setting"].partition(" BS=")
        for column, (method, recipes) in columns.items():
            yield PublishedCost(
                model, method, recipes, (), f"speed-up on A100, batch {batch}, sequence 2048", row["baseline"],
                row[column], table.source, table.notes_on("setting", row),
            )  # fmt: skip


def _deep_compression() -> Iterator[PublishedCost]:
    """Speed-ups of the paper's own hardware model, against the dense model of the same width."""
    table = published_table("deep_compression_hardware")
    rows = {row["quantity"]: row for row in table.rows}
    models = {"bert_base": "BERT-base", "wav2vec2": "Wav2vec2", "vit": "ViT-base/16"}
    for bits in ("INT8", "INT4"):
        row = rows[f"speed-up sparse {bits} vs dense {bits}"]
        for column, model in models.items():
            yield PublishedCost(
                model, f"{bits}, 50 % sparse", (f"deepcomp-sparse-{bits.lower()}",), (),
                f"modelled speed-up over dense {bits}, systolic array that skips zeros", "1", row[column],
                table.source, table.notes_on(column, row),
            )  # fmt: skip


def _thesis() -> Iterator[PublishedCost]:
    words = {
        "size_mb": "size, MB", "cpu_s_per_example": "seconds per example, Raspberry Pi 4",
        "gpu_s_per_example": "seconds per example, GPU", "avg_train_s": "training seconds, mean of the runs",
        "avg_inference_s": "seconds for the evaluation data", "avg_energy_wh": "energy of a training run, Wh",
        "total_co2_kg": "CO2 of all training runs, kg",
    }  # fmt: skip
    tasks = list(THESIS_TASKS)
    tables = [(f"thesis_table5_{1 + i}", tasks[i % 3]) for i in range(6)]
    for name, task in [*tables, ("thesis_figures5_1c_5_4c", tasks[0])]:
        table = published_table(name)
        baseline, *others = table.rows
        model, pattern, _ = THESIS_TASKS[task]
        for row in others:
            for column in (column for column in words if column in table.columns):
                yield PublishedCost(
                    model, row["model"], THESIS_RECIPES[row["model"]], (pattern,), words[column], baseline[column],
                    row[column], table.source, table.notes_on(column, baseline, row),
                )  # fmt: skip
