"""The log of a training stage: one JSON object per line, each with the step after which it was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Journal:
    """``log.jsonl`` in a stage's folder.

    A run that resumes takes up the lines up to its checkpoint and drops later ones, which it will write again; a line
    cut off by a kill is dropped too.

    Args:
        writes: whether this process writes the file; with several processes, one does.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.records: list[Record] = []

    def resume_(self, step: int) -> None:
        """Keep the lines up to ``step``; 0 begins a new log."""
        self.records = [record for record in read_journal(self.path) if step and record["step"] <= step]
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f"{self.path.name}.tmp")
            temporary.write_text("".join(_line(record) for record in self.records), encoding="utf-8")
            temporary.replace(self.path)

    def write(self, step: int, record: Record) -> None:
        record = {"step": step, **record}
        self.records.append(record)
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(record))


def read_journal(path: Path) -> list[Record]:
    """The records of a log, none where there is no file; reading ends at a line that is not whole."""
    records: list[Record] = []
    if not path.is_file():
        return records
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
