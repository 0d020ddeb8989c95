"""Folders of recordings with transcripts: the official LibriSpeech layout, and tables of paths and texts.

A row is ``{"audio": Path or encoded bytes, "text": str, "where": "file:line"}``; nothing is decoded here.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import files
from .lazy_rows import LazyRows
from .task import Row

AUDIO = (".flac", ".wav")
TRANSCRIPTS = "*.trans.txt"
TABLES = ("*.tsv", "*.csv")


def chapter_rows(folder: Path) -> list[Row]:
    """All utterances below ``folder`` that a ``*.trans.txt`` lists: a line is ``ID TEXT``, the recording ``ID.flac`` or
    ``ID.wav`` lies beside it. In the order of the paths.

    Raises:
        DataError: with file and line for a line without a text, an identifier twice or without its recording; with the
            file for a recording without a line, and for a folder without transcripts.
    """
    rows: list[Row] = []
    for path in sorted(folder.rglob(TRANSCRIPTS)):
        rows += _chapter(path)
    if not rows:
        raise files.DataError(f"{folder}: expected transcripts {TRANSCRIPTS} in it or below, found none")
    return rows


def _chapter(path: Path) -> Iterator[Row]:
    recordings = {file.stem: file for file in sorted(path.parent.iterdir()) if file.suffix.lower() in AUDIO}
    missing = dict(recordings)
    for number, line in enumerate(files.read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        name, _, text = line.strip().partition(" ")
        if not text.strip():
            raise files.DataError(f"{where}: expected an identifier, a space and a transcript, found {line.strip()!r}")
        if name not in recordings:
            raise files.DataError(f"{where}: expected the recording {name}.flac or {name}.wav beside it, found neither")
        if missing.pop(name, None) is None:
            raise files.DataError(f"{where}: {name} stands there twice")
        yield {"audio": recordings[name], "text": text.strip(), "where": where}
    others = list(path.parent.glob(TRANSCRIPTS))
    if missing and len(others) == 1:
        raise files.DataError(f"{next(iter(missing.values()))}: a recording without a transcript in {path.name}")


def table_rows(path: Path) -> list[Row]:
    """The rows of a table whose header holds ``path`` and ``text``; paths are relative to the table's folder.

    ``.tsv`` is separated by tabs, quoting off; ``.csv`` by commas with double quotes. Other columns are left out.

    Raises:
        DataError: with file and line for a missing column, an empty or missing field, or a recording that is not there.
    """
    rows: list[Row] = []
    for where, values in _tsv(path) if path.suffix == ".tsv" else _csv(path):
        audio = path.parent / values["path"].strip()
        if not audio.is_file():
            raise files.DataError(f"{where}: the recording {str(audio)!r} does not exist")
        rows.append({"audio": audio, "text": values["text"].strip(), "where": where})
    return rows


def _tsv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    for row in files.read_tsv(path, ("path", "text")):
        yield row.where, row.values


def _csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(files.read_text(path), newline=""))
    absent = [name for name in ("path", "text") if name not in (reader.fieldnames or ())]
    if absent:
        raise files.DataError(f"{path}:1: expected the columns ['path', 'text'], found {reader.fieldnames}")
    found = False
    for row in reader:
        found = True
        where = f"{path}:{reader.line_num}"
        for name in ("path", "text"):
            if not (row[name] or "").strip():
                raise files.DataError(f"{where}: column {name!r} is empty")
        if None in row:
            raise files.DataError(f"{where}: more fields than the header; put a text with commas in double quotes")
        yield where, row
    if not found:
        raise files.DataError(f"{path}:1: expected rows after the header, found none")


def folder_rows(folder: Path) -> list[Row]:
    """One table ``*.tsv`` or ``*.csv`` in ``folder``, else the ``*.trans.txt`` in it and below.

    Every row's ``settings`` hold ``data``, a fingerprint of all names, sizes and texts, by which scores of different
    recordings can be told apart.

    Raises:
        DataError: several tables, or what `table_rows` and `chapter_rows` report.
    """
    tables = sorted(path for pattern in TABLES for path in folder.glob(pattern))
    if len(tables) > 1:
        raise files.DataError(f"{folder}: expected one table of transcripts, found {[path.name for path in tables]}")
    rows = table_rows(tables[0]) if tables else chapter_rows(folder)
    digest = hashlib.sha256()
    for line in sorted(f"{r['audio'].name}\t{r['audio'].stat().st_size}\t{r['text']}\n" for r in rows):
        digest.update(line.encode())
    settings = {"data": f"sha256:{digest.hexdigest()[:16]}"}
    return [{**row, "settings": settings} for row in rows]


class HubUtterances(LazyRows[Row]):
    """The rows of a Hub data set with the columns ``audio`` and ``text``, read when they are accessed."""

    def __init__(self, table: Any, place: str) -> None:
        self.table, self.place = table, place

    def __len__(self) -> int:
        return len(self.table)

    def make(self, index: int) -> Row:
        row, where = self.table[index], f"{self.place} row {index}"
        audio = row["audio"]["bytes"]
        if not audio or not (row["text"] or "").strip():
            raise files.DataError(f"{where}: expected a recording and its transcript, one of them is empty")
        return {"audio": audio, "text": row["text"].strip(), "where": where}


def hub_rows(what: str, repository: str, config: str | None, split: str) -> HubUtterances:
    """One split of a Hub data set; ``datasets`` fetches the whole configuration when it is first used.

    Raises:
        MissingDataError: neither reachable nor cached. DataError: a column is missing.
    """
    from datasets import Audio

    table: Any = files.load_from_hub(what, repository, config, split)
    place = f"{repository} {split}"
    absent = [name for name in ("audio", "text") if name not in table.column_names]
    if absent:
        raise files.DataError(f"{place}: expected the columns ['audio', 'text'], found {table.column_names}")
    return HubUtterances(table.cast_column("audio", Audio(decode=False)), place)
