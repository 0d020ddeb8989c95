"""Persona-Chat dialogues from the files of ConvAI2 and of Synthetic-Persona-Chat.

A dialogue is one row: ``{"id", "persona": (sentence, ...), "turns": ((speaker, text), ...), "replies": (index, ...),
"distractors": ((text, ...), ...), "candidates_from": "file" or "sampled"}``. The speakers are ``THEM`` and ``YOU``;
``replies`` are the turns of ``YOU``, whose persona it is, and ``distractors`` the wrong candidates of each of them.
"""

from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import files
from .task import Row

THEM, YOU = "them", "you"
DISTRACTORS = 19  # beside the right reply, as ConvAI2 has them
SEED = 0
PERSONA, PARTNER = "your persona:", "partner's persona:"
SILENCE = "__SILENCE__"  # ConvAI2's first utterance of a dialogue that YOU begins
COLUMNS = ("user 1 personas", "user 2 personas", "Best Generated Conversation")
_TURN = re.compile(r"\s*([*\s]*)User ([12]):(.*)")


def read_convai2(path: Path) -> list[Row]:
    """Dialogues of numbered lines: ``1 your persona: ...``, then ``N their text<TAB>your reply``, perhaps followed by
    two tabs and candidates that ``|`` separates, the reply among them. A number that does not go up begins a dialogue.

    Raises:
        DataError: with file and line.
    """
    dialogues: list[dict[str, Any]] = []
    last = 0
    for line_number, line in enumerate(files.read_text(path).split("\n"), start=1):
        where = f"{path}:{line_number}"
        if not line.strip():
            continue
        number, _, rest = line.rstrip("\r").partition(" ")
        if not number.isdigit():
            raise files.DataError(f"{where}: expected a line number and a space, found {line[:40]!r}")
        if int(number) <= last or not dialogues:
            dialogues.append({"where": where, "persona": [], "turns": [], "replies": [], "candidates": []})
        last = int(number)
        if rest.startswith(PERSONA):
            dialogues[-1]["persona"].append(rest.removeprefix(PERSONA).strip())
        elif not rest.startswith(PARTNER):
            _add_exchange_(dialogues[-1], rest, where)
    rows = [_row(f"{index}", found, found["where"]) for index, found in enumerate(dialogues)]
    return _with_distractors(rows, str(path))


def read_synthetic(path: Path) -> list[Row]:
    """The published table: two personas, one sentence a line, and a conversation of ``User 1: ...`` and ``User 2: ...``
    lines; YOU is user 2.

    Lines of nobody belong to the turn before them; two turns of one speaker are one; asterisks around a line go. A
    conversation without speakers has no reply and adds nothing to a score (2 of the 968 official test dialogues).

    Raises:
        DataError: with file and line.
    """
    reader = csv.reader(io.StringIO(files.read_text(path), newline=""))
    rows: list[Row] = []
    header = next(reader, [])
    absent = [name for name in COLUMNS if name not in header]
    if absent:
        raise files.DataError(f"{path}:1: expected the columns {list(COLUMNS)}, found {header}: {absent} missing")
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise files.DataError(f"{where}: {error}") from error
        if not cells:
            continue
        if len(cells) != len(header):
            raise files.DataError(f"{where}: expected {len(header)} cells, found {len(cells)}")
        rows.append(synthetic_row(str(len(rows)), dict(zip(header, cells, strict=True)), where))
    return _with_distractors(rows, str(path))


def synthetic_rows(table: Sequence[Mapping[str, Any]], what: str) -> list[Row]:
    """`read_synthetic` of the same table on the Hub."""
    return _with_distractors([synthetic_row(str(i), row, f"{what} row {i}") for i, row in enumerate(table)], what)


def synthetic_row(identity: str, cells: Mapping[str, Any], where: str) -> Row:
    """One conversation without distractors. Raises DataError for an empty persona."""
    persona = [line.strip() for line in str(cells[COLUMNS[1]]).splitlines() if line.strip()]
    turns: list[tuple[str, str]] = []
    for line in str(cells[COLUMNS[2]] or "").splitlines():
        match = _TURN.match(line)
        speaker = (THEM if match[2] == "1" else YOU) if match else (turns[-1][0] if turns else None)
        text = (match[3] if match else line).strip(" *" if match and match[1] else None)
        if not text or speaker is None:
            continue
        if turns and turns[-1][0] == speaker:
            turns[-1] = (speaker, f"{turns[-1][1]} {text}")
        else:
            turns.append((speaker, text))
    replies = [index for index, (speaker, _) in enumerate(turns) if speaker == YOU]
    return _row(identity, {"persona": persona, "turns": turns, "replies": replies, "candidates": []}, where)


def convai2_rows(table: Sequence[Mapping[str, Any]], what: str) -> list[Row]:
    """The same dialogues as the Hub has them: ``personality`` and ``utterances`` of ``history`` and ``candidates``, the
    last of which is the reply. Raises DataError naming the row."""
    rows = []
    for index, row in enumerate(table):
        where = f"{what} row {index}"
        found: dict[str, Any] = {"persona": list(row["personality"]), "turns": [], "replies": [], "candidates": []}
        for exchange in row["utterances"]:
            *wrong, reply = exchange["candidates"]
            _add_exchange_(found, "\t".join((exchange["history"][-1], reply, "", "|".join([*wrong, reply]))), where)
        rows.append(_row(str(index), found, where))
    return _with_distractors(rows, what)


def _add_exchange_(dialogue: dict[str, Any], text: str, where: str) -> None:
    cells = [cell.strip() for cell in text.split("\t")]
    if len(cells) < 2 or not cells[0] or not cells[1]:
        raise files.DataError(f"{where}: expected their text, a tab and your reply, found {text[:60]!r}")
    if cells[0] != SILENCE:
        dialogue["turns"].append((THEM, cells[0]))
    dialogue["replies"].append(len(dialogue["turns"]))
    dialogue["turns"].append((YOU, cells[1]))
    if len(cells) < 4:
        return
    candidates = [candidate.strip() for candidate in cells[3].split("|")]
    if cells[1] not in candidates:
        raise files.DataError(f"{where}: the reply {cells[1][:60]!r} is not among its {len(candidates)} candidates")
    wrong = dict.fromkeys(candidate for candidate in candidates if candidate and candidate != cells[1])
    dialogue["candidates"].append(tuple(wrong))


def _row(identity: str, found: Mapping[str, Any], where: str) -> Row:
    if not found["persona"] or not all(found["persona"]):
        raise files.DataError(f"{where}: the persona is empty")
    if found["candidates"] and len(found["candidates"]) != len(found["replies"]):
        raise files.DataError(f"{where}: some replies of this dialogue have candidates and some have none")
    return {
        "id": identity,
        "persona": tuple(found["persona"]),
        "turns": tuple(found["turns"]),
        "replies": tuple(found["replies"]),
        "distractors": tuple(found["candidates"]),
        "candidates_from": "file" if found["candidates"] else "sampled",
    }


def _with_distractors(rows: Sequence[Row], what: str) -> list[Row]:
    """Give the rows without candidates theirs: different replies of other dialogues, drawn from the whole split, the
    same for every run and every selection of rows."""
    pool = [(number, row["turns"][index][1]) for number, row in enumerate(rows) for index in row["replies"]]
    if not pool:
        raise files.DataError(f"{what}: expected dialogues with replies, found none")
    return [
        row if row["candidates_from"] == "file" else {**row, "distractors": tuple(_draw(row, number, pool, what))}
        for number, row in enumerate(rows)
    ]


def _draw(row: Row, number: int, pool: Sequence[tuple[int, str]], what: str) -> Iterator[tuple[str, ...]]:
    for index in row["replies"]:
        reply = row["turns"][index][1]
        draw = random.Random(f"{SEED}:{number}:{index}")  # the stream of a text seed is the same everywhere
        chosen: dict[str, None] = {}
        draws = 100 * DISTRACTORS
        while len(chosen) < DISTRACTORS and draws:
            draws -= 1
            origin, text = pool[int(draw.random() * len(pool))]
            if origin != number and text != reply:
                chosen[text] = None
        if len(chosen) < DISTRACTORS:
            raise files.DataError(
                f"{what}: expected {DISTRACTORS} different replies in the other dialogues as candidates for dialogue "
                f"{number}, found {len(chosen)}; give a file with more dialogues"
            )
        yield tuple(chosen)
