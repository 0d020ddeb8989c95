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


def selection_tables(selection: Selection) -> list[Table]:
    """A table per workload that was measured: milliseconds of each kernel by rows, the chosen one marked; its title
    says where the choice changes and where the times are from."""
    return [_table(chosen) for chosen in selection.chosen if chosen.choice is not None and chosen.times]


def _table(chosen: Chosen) -> Table:
    from rich.table import Table

    assert chosen.choice is not None
    kernels = [*dict.fromkeys(kernel for samples in chosen.times.values() for kernel in samples)]
    segments = chosen.choice.segments
    parts = [f"{kernel} up to {last:,} rows" for last, kernel in segments[:-1]]
    choice = f"{', '.join(parts)}, then {segments[-1][1]}" if parts else f"{segments[-1][1]} everywhere"
    modules = f"{len(chosen.names)} modules, first {chosen.names[0]}" if len(chosen.names) > 1 else chosen.names[0]
    title = f"{chosen.workload.key} ({modules})\n{choice} ({chosen.source})"
    table = Table("rows", *(f"{kernel} ms" for kernel in kernels), title=title, title_justify="left")
    for column in table.columns:
        column.justify = "right"
    for rows, samples in chosen.times.items():
        cells = (_cell(samples[k].median if k in samples else None, chosen.choice(rows) == k) for k in kernels)
        table.add_row(f"{rows:,}", *cells)
    return table


def _cell(seconds: float | None, chosen: bool) -> str:
    if seconds is None:
        return ""
    text = f"{seconds * 1000:.3f}"
    return f"[bold]{text} *[/bold]" if chosen else text
