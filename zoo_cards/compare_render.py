"""A comparison as text, Markdown and HTML, with its plots."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from html import escape
from io import StringIO
from pathlib import Path
from typing import Literal

from ..eval.results import atomic_write_text
from .compare import Comparison
from .compare_grids import common, grids, unmeasured
from .plots import PLOTS, write_plot
from .plots_compare import comparison_plots
from .tables import Grid

Format = Literal["text", "markdown", "html"]
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1a1a1a; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th { border-bottom: 2px solid #999; font-weight: 600; } .word { text-align: left; } img { max-width: 100%; }
figcaption, .note { color: #555; font-size: .9em; } figure { margin: 1.5rem 0; }
"""


def to_text(comparison: Comparison, width: int = 120) -> str:
    """Tables for a terminal of ``width`` columns, without colours."""
    from rich.console import Console

    console = Console(file=StringIO(), width=width, force_terminal=False, color_system=None)
    for title, grid in grids(comparison).items():
        console.print(grid.rich(f"{comparison.base}: {title.lower()}"))
    for note in (*comparison.notes, _said(comparison)):
        console.print(note.replace("**", ""), markup=False, highlight=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def to_markdown(comparison: Comparison, plots: Mapping[str, str] | None = None) -> str:
    """Markdown; ``plots`` are paths of PNG files, as the document refers to them, by the names of `plots.PLOTS`."""
    parts = [f"# Variants of {comparison.base}", *comparison.notes]
    for title, grid in grids(comparison).items():
        parts += [f"## {title}", grid.markdown()]
    for name, path in (plots or {}).items():
        parts.append(f"![{PLOTS[name]}]({path})\n\n{PLOTS[name]}")
    return "\n\n".join([*parts, _said(comparison)]) + "\n"


def to_html(comparison: Comparison, plots: Mapping[str, bytes] | None = None) -> str:
    """One HTML page that needs nothing else: style inside, ``plots`` (PNG by the names of `plots.PLOTS`) as data."""
    title = escape(f"Variants of {comparison.base}")
    parts = [f"<h1>{title}</h1>", *(f"<p>{_strong(note)}</p>" for note in comparison.notes)]
    for name, grid in grids(comparison).items():
        parts.append(f'<h2>{escape(name)}</h2>\n<div class="wide">{_table(grid)}</div>')
    for name, png in (plots or {}).items():
        data = base64.b64encode(png).decode("ascii")
        caption = escape(PLOTS[name])
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    parts.append(f'<p class="note">{escape(_said(comparison))}</p>')
    head = f'<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n<title>{title}</title>'
    head = f"<head>\n{head}\n<style>{_STYLE}</style>\n</head>"
    body = "\n".join(["<body>", *parts, "</body>"])
    return f'<!doctype html>\n<html lang="en">\n{head}\n{body}\n</html>\n'


def write_comparison(comparison: Comparison, out: str | Path, format: Format, plots: bool = False) -> list[Path]:
    """Write one document, whole or not at all; plots go inside (HTML) or into ``<out without suffix>_plots/``.

    Returns:
        The files, the document last.
    """
    out = Path(out)
    drawn = comparison_plots(comparison) if plots else {}
    folder = out.with_name(f"{out.stem}_plots")
    written = [] if format == "html" else [write_plot(png, folder / name) for name, png in drawn.items()]
    if format == "html":
        text = to_html(comparison, drawn)
    elif format == "markdown":
        text = to_markdown(comparison, {name: f"{folder.name}/{name}" for name in drawn})
    else:
        text = to_text(comparison)
    atomic_write_text(out, text)
    return [*written, out]


def _said(comparison: Comparison) -> str:
    """How to read the tables, and what nobody measured."""
    parts = ["Difference: variant minus its dense model."] if comparison.columns else []
    parts += ["Ranks go by the first column alone."] if any(row.rank for row in comparison.rows) else []
    if comparison.timed:
        parts.append(
            f"Speed{common(comparison)}: every variant was timed beside its dense model in an interleaved run of its "
            "own; median milliseconds per batch, ratio to dense, and the ratio's 10th to 90th percentile."
        )
    missing = unmeasured(comparison)
    return " ".join([*parts, *([f"Not measured for any of them: {', '.join(missing)}."] if missing else [])])


def _table(grid: Grid) -> str:
    def line(cells: list[str], tag: str) -> str:
        words = [' class="word"' if column < grid.left else "" for column in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{w}>{escape(c)}</{tag}>" for w, c in zip(words, cells)) + "</tr>"

    body = "\n".join(line(list(row), "td") for row in grid.rows)
    return f"<table>\n<thead>{line(list(grid.header), 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _strong(note: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(note))
