"""The result tables of the papers as data, exactly as printed, with their source and the notes on suspected typos.

``published/*.csv`` are the tables, ``published/sources.json`` says what they are. Nothing in them was measured here.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..eval.task import nearest

FOLDER = Path(__file__).parent / "published"
SOURCES = "sources.json"


class PublishedError(ValueError):
    """A table that is not there, or that is not what its source says."""


@dataclass(frozen=True)
class Paper:
    """``short`` for table cells (``Yu et al. 2023``), ``citation`` in full."""

    short: str
    citation: str


@dataclass(frozen=True)
class Note:
    """What a reader must know about some cells: a suspected typo, a contradiction, another protocol.

    Args:
        number: the same note has the same number everywhere.
        tables: where it applies; ``columns`` empty means all columns, ``rows`` the (column, cell) pairs that a
            row must have.
    """

    number: int
    text: str
    tables: tuple[str, ...]
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, str], ...] = ()

    def covers(self, table: str, column: str, row: Mapping[str, str]) -> bool:
        """Whether it is about this cell."""
        here = table in self.tables and (not self.columns or column in self.columns)
        return here and all(row.get(name) == value for name, value in self.rows)


@dataclass(frozen=True)
class PublishedTable:
    """One table: cells are texts as printed, an empty cell was not printed."""

    name: str
    paper: Paper
    table: str
    about: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, str], ...]
    notes: tuple[Note, ...]

    @property
    def source(self) -> str:
        """``Yu et al. 2023, Table 1``."""
        return f"{self.paper.short}, {self.table}"

    def notes_on(self, column: str, *rows: Mapping[str, str]) -> tuple[Note, ...]:
        """Those about this column of the rows, each once, the first row's first."""
        found = (note for row in rows for note in self.notes if note.covers(self.name, column, row))
        return tuple(dict.fromkeys(found))


def number(cell: str) -> float | None:
    """The value of a cell: ``4.20`` is 4.2, ``+0.35`` is 0.35; None for an empty cell and for words."""
    try:
        return float(cell)
    except ValueError:
        return None


def published_table(name: str, folder: str | Path = FOLDER) -> PublishedTable:
    """One table by its name (``gpusq_tlm_table1``).

    Raises:
        PublishedError: unknown name (with the nearest one), or a file that is broken; file and line are named.
    """
    sources = _sources(Path(folder))
    if name not in sources["tables"]:
        raise PublishedError(nearest("published table", name, sources["tables"]))
    entry = sources["tables"][name]
    columns, rows = _read(Path(folder) / f"{name}.csv")
    papers = sources["papers"]
    if entry["paper"] not in papers:
        raise PublishedError(f"{Path(folder) / SOURCES}, {name}: " + nearest("paper", entry["paper"], papers))
    notes = tuple(_note(data) for data in sources["notes"] if name in data["tables"])
    for note in notes:
        unknown = {name for name, _ in note.rows} - {*columns}
        if unknown or (note.columns and not {*note.columns} & {*columns}):
            raise PublishedError(f"{Path(folder) / SOURCES}: note {note.number} names no column of {name}: {columns}")
    return PublishedTable(name, Paper(**papers[entry["paper"]]), entry["table"], entry["about"], columns, rows, notes)


@cache
def published_tables() -> tuple[PublishedTable, ...]:
    """Every table, in the order of ``sources.json``.

    Raises:
        PublishedError: see `published_table`; or a file that ``sources.json`` does not describe.
    """
    names = list(_sources(FOLDER)["tables"])
    stray = sorted({path.stem for path in FOLDER.glob("*.csv")} - {*names})
    if stray:
        raise PublishedError(f"{FOLDER / SOURCES} does not say where {', '.join(stray)} is from")
    return tuple(published_table(name) for name in names)


def _sources(folder: Path) -> dict[str, Any]:
    path = folder / SOURCES
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishedError(f"{path} cannot be read: {error}") from error
    return data


def _note(data: Mapping[str, Any]) -> Note:
    where = tuple(data["tables"]), tuple(data["columns"]), tuple(data["rows"].items())
    return Note(data["number"], data["text"], *where)


def _read(path: Path) -> tuple[tuple[str, ...], tuple[Mapping[str, str], ...]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PublishedError(f"{path} cannot be read: {error}") from error
    header, *lines = csv.reader(io.StringIO(text), strict=True)
    if len({*header}) != len(header) or not all(header) or not lines:
        raise PublishedError(f"{path}, line 1: expected different column names, and rows below, found {header}")
    for place, line in enumerate(lines, 2):
        if len(line) != len(header):
            raise PublishedError(f"{path}, line {place}: expected {len(header)} cells, found {len(line)}: {line}")
    return tuple(header), tuple(dict(zip(header, line)) for line in lines)
