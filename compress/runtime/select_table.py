"""What the selection decided, and why, for people: ``squeezoo bench --explain``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .choice import EVER
from .selection import Chosen, Selection

if TYPE_CHECKING:
    from rich.table import Table


def explain_rows(selection: Selection) -> list[dict[str, Any]]:
    """One record per workload, as JSON data: ``workload``, ``modules`` (how many, and the first one's name),
    ``segments`` (up to how many rows, None for the last, and the kernel), ``break_even``, ``source``, and ``times``:
    per number of rows the winner, and milliseconds and spread of every kernel."""
    return [
        {
            "workload": chosen.workload.key,
            "modules": len(chosen.names),
            "first": chosen.names[0],
            "segments": []
            if chosen.choice is None
            else [[None if last == EVER else last, kernel] for last, kernel in chosen.choice.segments],
            "break_even": [] if chosen.choice is None else [*chosen.choice.break_even],
            "source": chosen.source,
            "times": {
                rows: {
                    "chosen": None if chosen.choice is None else chosen.choice(rows),
                    "ms": {kernel: sample.median * 1000 for kernel, sample in samples.items()},
                    "p10_p90_ms": {k: [s.p10 * 1000, s.p90 * 1000] for k, s in samples.items()},
                }
                for rows, samples in chosen.times.items()
            },
        }
        for chosen in selection.chosen
    ]


def selection_table(selection: Selection) -> Table:
    """A row per workload and number of rows: milliseconds of each kernel, the chosen one marked, and where the choice
    changes."""
    from rich.table import Table

    kernels = [*dict.fromkeys(k for c in selection.chosen for samples in c.times.values() for k in samples)]
    table = Table(
        "workload", "modules", "rows", *(f"{kernel} ms" for kernel in kernels), "changes after rows", "source"
    )
    for column in table.columns[1 : 3 + len(kernels)]:
        column.justify = "right"
    for chosen in selection.chosen:
        _add_rows(table, chosen, kernels)
    return table


def _add_rows(table: Table, chosen: Chosen, kernels: list[str]) -> None:
    what, count = chosen.workload.key, str(len(chosen.names))
    if chosen.choice is None:
        table.add_row(what, count, *[""] * (1 + len(kernels)), "", chosen.source, end_section=True)
        return
    changes = ", ".join(
        f"{last:,}: {before} to {after}"
        for (last, before), (_, after) in zip(chosen.choice.segments, chosen.choice.segments[1:], strict=False)
    )
    for index, (rows, samples) in enumerate(chosen.times.items()):
        cells = [_cell(samples[k].median if k in samples else None, chosen.choice(rows) == k) for k in kernels]
        first = index == 0
        table.add_row(
            what if first else "", count if first else "", f"{rows:,}", *cells,
            (changes or f"never: {chosen.choice.kernels[0]}") if first else "", chosen.source if first else "",
            end_section=index == len(chosen.times) - 1,
        )  # fmt: skip


def _cell(seconds: float | None, chosen: bool) -> str:
    if seconds is None:
        return ""
    text = f"{seconds * 1000:.3f}"
    return f"[bold]{text} *[/bold]" if chosen else text
