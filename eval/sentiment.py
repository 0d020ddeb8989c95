"""IMDb: the sentiment of film reviews (Maas et al. 2011).

Folder layout: ``DIR/imdb/{train,test}.parquet`` with columns ``text`` and ``label`` (1 positive), or the original
``DIR/aclImdb/{train,test}/{neg,pos}/*.txt``. Both are sorted by label, so training shuffles and ``--limit`` draws.

``imdb`` reports the official test split. ``imdb/halves`` is the split 50/25/25 of Antunes 2021: the official train
split, and the official test split cut in two, alternating rows of each label, into a validation split and a test split.
The thesis does not say which reviews its halves hold.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from . import files, metrics
from .task import FinetuneDefaults, Row, Task, nearest
from .text import encode_texts, score_with

HUB = "stanfordnlp/imdb"
SPLITS = ("train", "test")
LABELS = ("negative", "positive")
_FOLDERS = ("neg", "pos")  # in the order of the labels


def imdb_rows(split: str, data_dir: str | Path | None = None) -> list[Row]:
    """``[{"texts": (review,), "label": 0 or 1}]`` in the order of the files, negative reviews first.

    Raises:
        ValueError: unknown split.
        DataError: not found, a column missing, an empty review, a wrong label, or a review that is not UTF-8.
    """
    if split not in SPLITS:
        raise ValueError("imdb: " + nearest("split", split, SPLITS))
    folder = files.resolve_data_dir(data_dir)
    if folder is None:
        table = files.load_from_hub("imdb", HUB, None, split)
        return [_row(row["text"], row["label"], f"{HUB} {split} row {i}") for i, row in enumerate(table)]
    original = folder / "aclImdb" / split
    if original.is_dir():
        return [
            _row(files.read_text(path), label, str(path))
            for label, name in enumerate(_FOLDERS)
            for path in sorted((original / name).glob("*.txt"), key=_number)
        ] or _none(original)
    path = files.find_file(
        f"imdb, split {split},", folder, (f"imdb/{split}.parquet", f"aclImdb/{split}/neg/*.txt and pos/*.txt")
    )
    return [
        _row(row["text"], row["label"], f"{path} row {i}")
        for i, row in enumerate(files.read_parquet(path, ("text", "label")))
    ]


def halves_rows(split: str, data_dir: str | Path | None = None) -> list[Row]:
    """As `imdb_rows`, with the official test split's even rows of each label as ``validation``, the odd as ``test``."""
    if split == "train":
        return imdb_rows("train", data_dir)
    if split not in ("validation", "test"):
        raise ValueError("imdb/halves: " + nearest("split", split, ("train", "validation", "test")))
    rows = imdb_rows("test", data_dir)
    by_label = [[row for row in rows if row["label"] == label] for label in range(len(LABELS))]
    return [row for part in by_label for row in part[0 if split == "validation" else 1 :: 2]]


def _row(text: str | None, label: int, where: str) -> Row:
    if not text or not text.strip():
        raise files.DataError(f"{where}: the review is empty")
    return {"texts": (text,), "label": files.parse_label(label, len(LABELS), where)}


def _none(folder: Path) -> list[Row]:
    raise files.DataError(f"{folder}: expected reviews neg/*.txt and pos/*.txt, found none")


def _number(path: Path) -> tuple[int, str]:
    """Files are named ``<number>_<rating>.txt``."""
    number = path.stem.partition("_")[0]
    return (int(number) if number.isdigit() else 0, path.name)


_DEFAULTS = FinetuneDefaults(
    5, 3e-5, 8, 512, "Antunes 2021 (MSc thesis), table 4.1 (rate: one of its four, 3e-5 to 3e-4); the length is ours"
)
_IMDB = partial(
    Task,
    version=1,
    source="Maas et al. 2011 (Large Movie Review Dataset)",
    kind="text-classification",
    num_labels=2,
    metric="accuracy",
    higher_is_better=True,
    encode=encode_texts,
    score=score_with(accuracy=metrics.accuracy, precision=metrics.precision, recall=metrics.recall, f1=metrics.f1),
    max_length=512,
    finetune=_DEFAULTS,
    label_names=LABELS,
    label_aliases={"negative": ("neg",), "positive": ("pos",)},
)
IMDB = _IMDB(name="imdb", splits=SPLITS, sizes=(25_000, 25_000), rows=imdb_rows)
IMDB_HALVES = _IMDB(
    name="imdb/halves", splits=("train", "validation", "test"), sizes=(25_000, 12_500, 12_500), rows=halves_rows
)
SENTIMENT: tuple[Task, ...] = (IMDB, IMDB_HALVES)
