"""Finding and reading the official data files: which folder, which file, which line is broken."""

from __future__ import annotations

import lzma
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

DATA_VARIABLE = "SQUEEZOO_DATA"


class DataError(ValueError):
    """A data file is broken; the message names the file and, where there is one, the line."""


class MissingDataError(DataError):
    """Data was not found; the message says what was looked for, where, and how to provide it."""


@dataclass(frozen=True)
class TsvRow:
    """One line of a table: ``values`` by column name, ``where`` as ``file:line`` for error messages."""

    where: str
    values: dict[str, str]


def resolve_data_dir(explicit: str | Path | None = None) -> Path | None:
    """The folder of data files: the argument, else ``$SQUEEZOO_DATA``, else None (the Hub is asked instead).

    Raises:
        MissingDataError: the folder named by either of them does not exist.
    """
    if explicit is not None:
        origin, folder = "--data-dir", Path(explicit)
    elif os.environ.get(DATA_VARIABLE):
        origin, folder = f"${DATA_VARIABLE}", Path(os.environ[DATA_VARIABLE])
    else:
        return None
    folder = folder.expanduser()
    if not folder.is_dir():
        raise MissingDataError(
            f"data folder {str(folder)!r} (from {origin}) does not exist: give an existing folder with --data-dir "
            f"or {DATA_VARIABLE}, or leave both out to read the data from the Hugging Face Hub"
        )
    return folder


def find_file(what: str, folder: Path, candidates: Sequence[str]) -> Path:
    """The first of ``candidates`` (relative paths), plain or with ``.xz`` added, that exists in ``folder``.

    Raises:
        MissingDataError: none of them exists.
    """
    tried = [name + suffix for name in candidates for suffix in ("", ".xz")]
    for name in tried:
        path = folder / name
        if path.is_file():
            return path
    raise missing(what, f"in {str(folder)!r} for {', '.join(tried)}")


def missing(what: str, looked: str) -> MissingDataError:
    """The one error for data that is nowhere: ``looked`` says where it was looked for."""
    return MissingDataError(
        f"{what} not found: looked {looked}. Provide it in one of two ways: (1) name the folder that holds the "
        f"official files with --data-dir DIR or {DATA_VARIABLE}=DIR; (2) leave both out and go online, to read it "
        "from the Hugging Face Hub"
    )


def read_text(path: Path) -> str:
    """A plain or ``.xz`` file as text: UTF-8, a byte order mark is dropped.

    Raises:
        DataError: not UTF-8 (with the line) or a damaged ``.xz`` file.
    """
    try:
        raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except lzma.LZMAError as error:
        raise DataError(f"{path}: not a complete .xz file ({error}); copy or download it again") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: expected UTF-8, found the byte 0x{raw[error.start]:02x}; convert the file to UTF-8"
        ) from error


def read_tsv(
    path: Path,
    columns: Iterable[str],
    *,
    header: Sequence[str] | None = None,
    fields: Literal["exact", "more", "skip-short"] = "exact",
) -> Iterator[TsvRow]:
    """The lines of a tab-separated file, quoting off (a quotation mark is an ordinary character).

    Only line feeds end a line: published texts hold other Unicode line separators inside sentences.

    Args:
        columns: names that the header must hold; the values of other columns are dropped.
        header: the columns of a file that has no header line; None reads the first line.
        fields: how many fields a line must have: as many as the header; at least as many (``more``); or at least as
            many, and shorter lines are skipped, for official files that are known to hold such.

    Raises:
        DataError: with file and line, for a missing column, a line with too few or too many fields or an empty field,
            a file without rows, or what `read_text` reports.
    """
    wanted = list(columns)
    lines = read_text(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    first = 1 if header is None else 0
    names = list(header or (lines[0].rstrip("\r").split("\t") if lines else []))
    absent = [name for name in wanted if name not in names]
    if absent:
        raise DataError(f"{path}:1: expected the columns {wanted}, found {names}: {absent} missing")
    if len(lines) == first:
        raise DataError(f"{path}:1: expected rows{' after the header' if first else ''}, found none")
    position = {name: names.index(name) for name in wanted}
    for number, line in enumerate(lines[first:], start=first + 1):
        where = f"{path}:{number}"
        cells = line.rstrip("\r").split("\t")
        if len(cells) < len(names) and fields == "skip-short":
            continue
        if len(cells) < len(names) or (fields == "exact" and len(cells) > len(names)):
            raise DataError(f"{where}: expected {len(names)} tab-separated fields {names}, found {len(cells)}")
        values = {name: cells[index] for name, index in position.items()}
        for name, value in values.items():
            if not value.strip():
                raise DataError(f"{where}: column {name!r} is empty")
        yield TsvRow(where, values)


def read_parquet(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a parquet file, with these columns alone.

    Raises:
        DataError: not parquet, a column missing, or no rows.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error
    absent = [name for name in columns if name not in table.column_names]
    if absent:
        raise DataError(f"{path}: expected the columns {list(columns)}, found {table.column_names}: {absent} missing")
    if table.num_rows == 0:
        raise DataError(f"{path}: expected rows, found none")
    rows: list[dict[str, Any]] = table.select(list(columns)).to_pylist()
    return rows


def parse_label(value: str | int, num_labels: int, where: str, names: Sequence[str] = ()) -> int:
    """A class id from a cell that holds the id or one of ``names``. Raises DataError when it is neither."""
    text = str(value).strip()
    if text in names:
        return names.index(text)
    if text.isascii() and text.isdigit() and int(text) < num_labels:
        return int(text)
    also = f" or one of {', '.join(names)}" if names else ""
    raise DataError(f"{where}: expected a label 0 to {num_labels - 1}{also}, found {str(value)!r}")


def parse_number(value: str | float, low: float, high: float, where: str) -> float:
    """A number from a cell. Raises DataError when it is none, or outside ``low`` to ``high``."""
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise DataError(f"{where}: expected a number from {low:g} to {high:g}, found {str(value)!r}")
    return number


def load_from_hub(
    what: str, repository: str, name: str | None, split: str, revision: str | None = None
) -> Sequence[dict]:
    """One split of a Hub dataset through ``datasets`` (its cache is used when offline).

    Args:
        revision: branch or commit; ``refs/convert/parquet`` for data sets whose main branch is a script.

    Raises:
        MissingDataError: it is neither reachable nor cached.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(repository, name, split=split, revision=revision)
    except (OSError, ValueError, DatasetsError) as error:
        place = repository if name is None else f"{repository} ({name})"
        raise missing(
            f"{what}, split {split},",
            f"at {place} on the Hugging Face Hub, because neither --data-dir nor {DATA_VARIABLE} is set "
            f"({type(error).__name__}: {error})",
        ) from error
