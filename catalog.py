"""What there is to choose from, and what this machine can do, as JSON data and as terminal tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

Data = Any


def zoo(pattern: str) -> tuple[Data, Table]:
    """The published models whose names match a shell pattern."""
    from .eval.ratio import speed_up
    from .zoo_cards.hub import info, list_models

    records = [info(name) for name in list_models(pattern)]
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("name", "metric", "dense", "compressed", "speed-up"):
        table.add_column(column, justify="left" if column == "name" else "right", no_wrap=True)
    for r in records:
        scores = ["-" if r[key] is None else f"{r[key]:.4f}" for key in ("dense", "compressed")]
        speed = "-" if r["speed_up"] is None else speed_up(r["speed_up"])
        table.add_row(r["name"], r["metric"] or "-", *scores, speed)
    return records, table


def zoo_entry(name: str) -> tuple[Data, Table]:
    """Everything the index knows about one published model."""
    import json

    from .zoo_cards.hub import info

    record = info(name)
    table = Table("field", "value")
    for key, value in record.items():
        table.add_row(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return record, table


def checkpoint_entry(folder: Path) -> tuple[Data, str]:
    """What a checkpoint folder holds, how many bytes each form takes, and what runs it on this machine."""
    from .compress.backends import resolve_backend
    from .compress.checkpoint import WEIGHTS, load_manifest, load_tensors
    from .compress.explain import runtime_lines, storage_lines

    manifest = load_manifest(folder)
    stored = storage_lines(load_tensors(folder / WEIGHTS), manifest.plan)
    backend = resolve_backend("auto", "cpu", manifest.plan, manifest.recipe.name)
    assert backend != "cuda"
    runs = runtime_lines(manifest.plan, backend)
    data = {"name": manifest.name, "recipe": manifest.recipe.name, "stored": stored, "backend": backend, "runs": runs}
    parts = [manifest.plan.summary(), "stored as", *(f"  {line}" for line in stored)]
    return data, "\n".join([*parts, f"runs here as ({backend})", *(f"  {line}" for line in runs)])


def adapters() -> tuple[Data, Table]:
    """The known architectures."""
    from .models import all_adapters

    found = all_adapters()
    table = Table("adapter", "model types", "checked against", "GEMMs a block")
    for a in found.values():
        table.add_row(a.name, ", ".join(a.model_types), a.library, str(a.per_block))
    return [asdict(a) for a in found.values()], table


def adapter(name: str) -> tuple[Data, str]:
    """One adapter's record. Raises AdapterError naming the known ones."""
    from .models import adapter_named
    from .models.show import show

    found = adapter_named(name)
    return asdict(found), show(found)


def check(model: str) -> tuple[Data, Table]:
    """The self-test of a model and its adapter."""
    from .compress.selftest import self_test

    found = self_test(model)
    table = Table("check", "passed", "detail", title=model)
    for c in found:
        table.add_row(c.name, {True: "yes", False: "NO", None: "not tried"}[c.passed], c.detail)
    return [asdict(c) for c in found], table


def recipes() -> tuple[Data, Table]:
    """The built-in recipes."""
    from .compress.recipe import Recipe, recipe_names

    found = [Recipe.load(name) for name in recipe_names()]
    table = Table("recipe", "what it does", "trains", show_lines=True)
    for r in found:
        table.add_row(r.name, r.description, "yes" if r.needs_training else "no")
    return [r.model_dump(mode="json") for r in found], table


def recipe(name: str) -> tuple[Data, str]:
    """One recipe, fully resolved, as YAML."""
    import yaml

    from .compress.recipe import Recipe

    data = Recipe.load(name).model_dump(mode="json")
    return data, yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110).rstrip()


def tasks() -> tuple[Data, Table]:
    """The evaluation tasks."""
    from .eval import TASKS

    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("task", "version", "kind", "splits", "metric"):
        table.add_column(column, no_wrap=column in ("task", "metric"))
    rows = []
    for t in TASKS.values():
        splits = ", ".join(t.splits)
        table.add_row(t.name, str(t.version), t.kind, splits, t.metric)
        rows.append(
            {"name": t.name, "version": t.version, "kind": t.kind, "splits": t.splits, "metric": t.metric,
             "labels": t.num_labels, "source": t.source}
        )  # fmt: skip
    return rows, table


def doctor() -> tuple[Data, Table]:
    """Versions, processor and GPU features, and what the runtime can use here."""
    from .compress.runtime.diagnosis import runtime_report
    from .eval.environment import environment

    data = environment()
    data["runtime"] = runtime = runtime_report()
    table = Table("what")
    table.add_column("found", overflow="fold")  # paths whole
    cpu = data["cpu"]
    table.add_row("processor", f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads")
    table.add_row("features", ", ".join(cpu["features"]) or "none that matter")
    gpus = [f"{gpu['name']} (compute capability {gpu['capability']})" for gpu in data["gpus"]]
    table.add_row("GPU", ", ".join(gpus) or "none that PyTorch can use")
    for name, version in data["libraries"].items():
        table.add_row(name, version)
    for name in ("int8", "native", "cuda", "triton", "selection", "reference"):
        part = runtime[name]
        table.add_row(_PARTS[name], f"{'yes' if part['supported'] else 'no'}: {part['note']}")
        for key in ("compiler", "library", "instructions", "cusparselt", "folder"):
            if part.get(key):
                table.add_row(f"  {key}", ", ".join(part[key]) if isinstance(part[key], list) else str(part[key]))
        for kernel, found in part.get("kernels", {}).items():
            table.add_row(f"  {kernel}", "yes" if found is True else f"no: {found}")
    return data, table


_PARTS = {
    "int8": "backend int8",
    "native": "native int8 kernels",
    "cuda": "backend cuda",
    "triton": "Triton kernels",
    "selection": "measured times",
    "reference": "backend reference",
}
