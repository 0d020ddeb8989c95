"""SQuAD 1.1 (Rajpurkar et al. 2016) and 2.0 (Rajpurkar et al. 2018): the answer to a question is a span of a text.

Folder layout: ``DIR/squad-v1.1/{train,dev}-v1.1.json``, ``DIR/squad-v2.0/{train,dev}-v2.0.json``, the same in
``DIR/squad/`` or in ``DIR`` itself, plain or ``.xz``: the official files. On the Hub: rajpurkar/squad and squad_v2.

Tasks: ``squad1`` and ``squad2`` have the official splits. ``squad1-articles`` needs the development set of 1.1 only: of
its 48 articles in alphabetical order the first 38 are the split ``train`` and the last 10 the split ``dev``. Its
scores compare with each other and with no published one.

A text longer than the model's window becomes several windows (`eval.squad_windows`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files
from .squad_metric import Answer, score_squad1, score_squad2
from .squad_windows import answer_windows, encode_windows, read_spans, train_windows
from .task import FinetuneDefaults, Row, Task, nearest

if TYPE_CHECKING:
    from .runner import Runner

HUB_SPLITS = {"train": "train", "dev": "validation"}
TRAIN_ARTICLES = 38  # of the 48 of the development set of 1.1


@dataclass(frozen=True)
class SquadFiles:
    """Where one version's rows stand.

    Args:
        version: of the official files, ``1.1`` or ``2.0``; in 2.0 a question may have no answer.
        hub: the repository on the Hub.
        by_article: the development set is both splits, see the module's docstring.
    """

    task: str
    version: str
    hub: str
    by_article: bool = False

    def rows(self, split: str, data_dir: str | Path | None = None) -> list[Row]:
        """``[{"id", "title", "question", "context", "answers": (text, ...), "answer_starts": (character, ...)}]``.

        Raises:
            ValueError: unknown split.
            DataError: with file, line and question for a broken one; with both ways out when the data is not found.
        """
        if split not in HUB_SPLITS:
            raise ValueError(f"{self.task}: " + nearest("split", split, HUB_SPLITS))
        source = "dev" if self.by_article else split
        folder = files.resolve_data_dir(data_dir)
        if folder is None:
            table = files.load_from_hub(self.task, self.hub, None, HUB_SPLITS[source])
            rows = [self._hub_row(row, f"{self.hub} {HUB_SPLITS[source]} row {i}") for i, row in enumerate(table)]
        else:
            name = f"{source}-v{self.version}.json"
            candidates = (f"squad-v{self.version}/{name}", f"squad/{name}", name)
            path = files.find_file(f"{self.task}, split {split},", folder, candidates)
            rows = list(self._official_rows(path, files.read_text(path)))
            if not rows:
                raise files.DataError(f"{path}:1: expected questions, found none")
        return _of_split(rows, split) if self.by_article else rows

    def _official_rows(self, path: Path, text: str) -> Iterator[Row]:
        try:
            articles = json.loads(text)["data"]
        except json.JSONDecodeError as error:
            raise files.DataError(f"{path}:{error.lineno}: expected JSON, {error.msg}") from error
        except (KeyError, TypeError) as error:
            raise files.DataError(
                f"{path}:1: expected an object with the key 'data', as in the official file"
            ) from error
        place, asked, line_of = "its beginning", "", ""
        try:
            for number, article in enumerate(articles, start=1):
                place, asked = f"article {number}", ""
                for inside, paragraph in enumerate(article["paragraphs"], start=1):
                    place, asked = f"article {number}, paragraph {inside}", ""
                    context = paragraph["context"]
                    for question in paragraph["qas"]:
                        asked = ""
                        asked = line_of = str(question["id"])
                        answers = [(answer["text"], answer["answer_start"]) for answer in question["answers"]]
                        none = self.version == "2.0" and bool(question["is_impossible"])
                        yield _row(
                            asked, article["title"], question["question"], context, [] if none else answers, none
                        )
        except (KeyError, TypeError, _RowError) as error:
            where = f"{path}:{_line(text, line_of)}: {place}" + (f", question {asked}" if asked else "")
            if isinstance(error, _RowError):
                raise files.DataError(f"{where}: {error}") from error
            found = f"the key {error} is missing" if isinstance(error, KeyError) else f"found another ({error})"
            raise files.DataError(
                f"{where}: expected the official layout data > paragraphs > context, qas > id, question, answers > "
                f"text, answer_start{', and is_impossible' if self.version == '2.0' else ''}; {found}"
            ) from error

    def _hub_row(self, row: dict[str, Any], where: str) -> Row:
        answers = list(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True))
        none = self.version == "2.0" and not answers
        try:
            return _row(row["id"], row["title"], row["question"], row["context"], answers, none)
        except _RowError as error:
            raise files.DataError(f"{where}: {error}") from error


class _RowError(ValueError):
    """What is wrong with a question."""


def _row(
    identity: str, title: str, question: str, context: str, answers: Sequence[tuple[str, int]], impossible: bool
) -> Row:
    for name, value in (("question", question), ("context", context)):
        if not isinstance(value, str) or not value.strip():
            raise _RowError(f"the {name} is empty")
    if not answers and not impossible:
        raise _RowError("expected at least one answer, found none")
    for text, start in answers:
        if not isinstance(text, str) or not text.strip():
            raise _RowError("an answer is empty")
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise _RowError(f"answer_start of {text!r}: expected the number of a character, from 0, found {start!r}")
        if context[start : start + len(text)] != text:
            found = context[start : start + len(text)]
            raise _RowError(f"expected the answer {text!r} at character {start} of the context, found {found!r}")
    return {
        "id": identity,
        "title": title,
        "question": question.strip(),  # some official ones are padded with dozens of spaces
        "context": context,
        "answers": tuple(text for text, _ in answers),
        "answer_starts": tuple(start for _, start in answers),
    }


def _line(text: str, identity: str) -> int:
    """The line of the file that holds this question's id; 1 before the first."""
    return text.count("\n", 0, max(text.find(f'"{identity}"'), 0)) + 1


def _of_split(rows: Sequence[Row], split: str) -> list[Row]:
    titles = sorted({row["title"] for row in rows})
    if len(titles) <= TRAIN_ARTICLES:
        raise files.DataError(
            f"squad1-articles: expected the 48 articles of SQuAD 1.1's development set, found {len(titles)} titles"
        )
    chosen = set(titles[:TRAIN_ARTICLES] if split == "train" else titles[TRAIN_ARTICLES:])
    return [row for row in rows if row["title"] in chosen]


def _answers(runner: Runner, rows: Sequence[Row]) -> list[Any]:
    windows = answer_windows(rows, runner.processor, runner.max_length, int(runner.settings["stride"]))
    return read_spans(runner, rows, windows)


def predict_squad1(runner: Runner, rows: Sequence[Row]) -> list[str]:
    """The best span of each question, as text. Raises ValueError: no fast tokenizer, or a window that is too short."""
    return [span.text for span in _answers(runner, rows)]


def predict_squad2(runner: Runner, rows: Sequence[Row]) -> list[Answer]:
    """The best span of each question, or none where no answer scores higher by more than ``null_threshold``."""
    threshold = float(runner.settings["null_threshold"])
    return [
        Answer("" if span.null_margin > threshold else span.text, span.text, span.null_margin)
        for span in _answers(runner, rows)
    ]


_FINETUNE = FinetuneDefaults(
    epochs=4,
    learning_rate=3e-5,
    batch_size=3,
    devices=8,
    max_length=384,
    source="GPUSQ-TLM, table 6: BERT on SQuAD; windows of 384 tokens: Devlin et al. 2019's code",
)
_SETTINGS = {"stride": 128, "n_best": 20, "max_answer_length": 30}


def _task(name: str, source: str, reader: SquadFiles, sizes: tuple[int, int], second: bool = False) -> Task:
    return Task(
        name=name,
        version=1,
        source=source,
        kind="question-answering",
        num_labels=None,
        splits=("train", "dev"),
        sizes=sizes,
        metric="f1",
        higher_is_better=True,
        rows=reader.rows,
        encode=encode_windows,
        score=score_squad2 if second else score_squad1,
        predict=predict_squad2 if second else predict_squad1,
        reference=itemgetter("answers"),
        train_encode=train_windows,
        max_length=384,
        settings={**_SETTINGS, "null_threshold": 0.0} if second else _SETTINGS,
        finetune=_FINETUNE,
    )


_RAJPURKAR = "Rajpurkar et al. 2016 (SQuAD 1.1); metrics: its official scorer's rules"
SQUAD1 = _task("squad1", _RAJPURKAR, SquadFiles("squad1", "1.1", "rajpurkar/squad"), (87_599, 10_570))
SQUAD1_ARTICLES = _task(
    "squad1-articles",
    f"{_RAJPURKAR}. Not an official split: both splits are articles of its development set",
    SquadFiles("squad1-articles", "1.1", "rajpurkar/squad", by_article=True),
    (7_836, 2_734),
)
SQUAD2 = _task(
    "squad2",
    "Rajpurkar et al. 2018 (SQuAD 2.0); metrics: its official scorer's rules",
    SquadFiles("squad2", "2.0", "rajpurkar/squad_v2"),
    (130_319, 11_873),
    second=True,
)
SQUAD = (SQUAD1, SQUAD1_ARTICLES, SQUAD2)
