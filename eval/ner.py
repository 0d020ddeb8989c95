"""Named entities in CoNLL's column files: WNUT-2017 and CoNLL-2003.

Folder layout, each file plain or ``.xz``: ``DIR/wnut17/{train,dev,test}.conll``, one token and its tag a line with a
tab between; ``DIR/conll2003/{train,valid,test}.txt`` or ``DIR/conll2003/eng.{train,testa,testb}``, four columns with a
space between, the tag last, lines ``-DOCSTART-`` left out. A line without characters ends a sentence. Tags are IOB2;
the IOB1 of the original CoNLL-2003 is converted.

A word's tag is that of its first sub-token. Words that have no token (cut off by ``max_length``, or characters that the
tokenizer drops) count as predicted O, so every word of the file is scored.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, metrics
from .task import IGNORED, Feature, FinetuneDefaults, Row, Task, nearest
from .text import INPUTS, allowed_length, require_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .runner import Runner

# a byte order mark is no character of a word: WNUT-2017's dev file ends in one
_BLANK = " \t\r\ufeff"


@dataclass(frozen=True)
class ConllFiles:
    """Where a data set's sentences stand.

    Args:
        task, labels: name, and every IOB2 tag in the order of the logits.
        paths: of each split, the names that its file may have.
        separator: between the columns; None is any white space. The token is the first column, its tag the last.
        iob1: the files may be IOB1, whose tags are converted.
        hub, hub_splits: repository on the Hub, read at its parquet branch, with columns ``tokens`` and ``ner_tags``.
        aliases: further names that published models give an entity's type.
    """

    task: str
    labels: tuple[str, ...]
    paths: dict[str, tuple[str, ...]]
    separator: str | None
    iob1: bool
    hub: str
    hub_splits: dict[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def label_aliases(self) -> dict[str, tuple[str, ...]]:
        """Of each tag with such a name, the tag as those models write it."""
        return {tag: (f"{tag[:2]}{self.aliases[tag[2:]]}",) for tag in self.labels if tag[2:] in self.aliases}

    def rows(self, split: str, data_dir: str | Path | None = None) -> list[Row]:
        """``[{"words": tuple of str, "tags": tuple of IOB2 tags}]``, one per sentence.

        Raises:
            ValueError: unknown split.
            DataError: with file and line for a broken line or an unknown tag; with both ways out when nothing is found.
        """
        if split not in self.paths:
            raise ValueError(f"{self.task}: " + nearest("split", split, self.paths))
        folder = files.resolve_data_dir(data_dir)
        if folder is None:
            return self._from_hub(self.hub_splits[split])
        path = files.find_file(f"{self.task}, split {split},", folder, self.paths[split])
        rows = [self._row(sentence, path) for sentence in _sentences(path, self.separator)]
        if not rows:
            raise files.DataError(f"{path}:1: expected sentences, found none")
        return rows

    def _row(self, sentence: Sequence[tuple[int, str, str]], path: Path) -> Row:
        tags = [tag for _, _, tag in sentence]
        tags = to_iob2(tags) if self.iob1 else tags
        for (line, _, given), tag in zip(sentence, tags, strict=True):
            if tag not in self.labels:
                raise files.DataError(f"{path}:{line}: " + nearest("tag", given, self.labels))
        return {"words": tuple(word for _, word, _ in sentence), "tags": tuple(tags)}

    def _from_hub(self, split: str) -> list[Row]:
        table: Any = files.load_from_hub(self.task, self.hub, None, split, revision="refs/convert/parquet")
        names = table.features["ner_tags"].feature.names
        rows: list[Row] = []
        for index, row in enumerate(table):
            tags = [names[tag] for tag in row["ner_tags"]]
            unknown = [tag for tag in tags if tag not in self.labels]
            if unknown or len(tags) != len(row["tokens"]) or not tags:
                raise files.DataError(
                    f"{self.hub} {split} row {index}: expected one of {self.labels} for each token, found {tags}"
                )
            rows.append({"words": tuple(row["tokens"]), "tags": tuple(tags)})
        return rows


def _sentences(path: Path, separator: str | None) -> Iterator[list[tuple[int, str, str]]]:
    """(line number, token, tag) of each sentence."""
    sentence: list[tuple[int, str, str]] = []
    for number, line in enumerate(files.read_text(path).split("\n"), start=1):
        if not line.strip(_BLANK):
            if sentence:
                yield sentence
            sentence = []
            continue
        cells = line.strip("\r\ufeff").split(separator)
        if cells[0] == "-DOCSTART-":
            continue
        if len(cells) < 2 or not cells[0].strip() or not cells[-1].strip():
            raise files.DataError(f"{path}:{number}: expected a token and its tag in columns, found {line!r}")
        sentence.append((number, cells[0], cells[-1].strip()))
    if sentence:
        yield sentence


def to_iob2(tags: Sequence[str]) -> list[str]:
    """Tags in which every entity begins with B-; IOB1 writes I- there unless the word before is of the same type."""
    found: list[str] = []
    before = "O"
    for tag in tags:
        begins = tag.startswith("I-") and before[2:] != tag[2:]
        found.append("B-" + tag[2:] if begins else tag)
        before = tag
    return found


def encode_words(rows: Sequence[Row], processor: Any, max_length: int, *, labels: Sequence[str]) -> list[Feature]:
    """Sentences as features: ``labels`` at the first sub-token of each word, -100 elsewhere.

    The words are joined by spaces, so that every tokenizer cuts them as it cuts ordinary text, and found again by the
    offsets of the tokens.

    Returns:
        Per row the model's inputs, ``labels``, and ``_first``: per word the position of its first token, or None.

    Raises:
        ValueError: no tokenizer, or one without offsets (transformers' slow tokenizers).
    """
    require_tokenizer(processor)
    if not getattr(processor, "is_fast", False):
        raise ValueError(f"named entities need a fast tokenizer, which knows offsets; found {type(processor).__name__}")
    number = {label: index for index, label in enumerate(labels)}
    texts = [" ".join(row["words"]) for row in rows]
    encoded = processor(
        texts, truncation=True, max_length=allowed_length(processor, max_length), return_offsets_mapping=True
    )
    names = [name for name in INPUTS if name in encoded]
    features: list[Feature] = []
    for index, row in enumerate(rows):
        first = first_tokens(row["words"], texts[index], encoded["offset_mapping"][index])
        targets = [IGNORED] * len(encoded["input_ids"][index])
        for position, tag in zip(first, row["tags"], strict=True):
            if position is not None:
                targets[position] = number[tag]
        features.append({**{name: encoded[name][index] for name in names}, "labels": targets, "_first": first})
    return features


def first_tokens(words: Sequence[str], text: str, offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """For each word the position of the first token that holds one of its characters; None where there is none.

    Args:
        text: the words joined by one space.
        offsets: begin and end of each token in ``text``; empty for special tokens. Byte-level tokenizers may count the
            space before a word to its first token.
    """
    begins, at = [], 0
    for word in words:
        begins.append(at)
        at += len(word) + 1
    first: list[int | None] = [None] * len(words)
    for position, (begin, end) in enumerate(offsets):
        while begin < end and text[begin] == " ":
            begin += 1
        if begin == end:
            continue
        number = bisect_right(begins, begin) - 1
        if first[number] is None:
            first[number] = position
    return first


def predict_tags(
    runner: Runner, rows: Sequence[Row], *, labels: Sequence[str], aliases: Mapping[str, tuple[str, ...]]
) -> list[list[str]]:
    """The tag of every word of every sentence.

    Raises:
        ValueError: logits of another width than there are tags, or tags of other names.
    """
    from .labels import column_order, note_order_

    order = column_order(runner.model, labels, aliases)
    columns = labels if order is None else [labels[order.index(column)] for column in range(len(labels))]
    note_order_(runner.settings, runner.model, order)

    def best(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[list[int]]:
        from ..models.dense import logits

        scores_BLC = logits(model, batch)
        if scores_BLC.dim() != 3 or scores_BLC.shape[-1] != len(labels):
            raise ValueError(
                f"the task needs logits [rows, tokens, {len(labels)}], the model gives {list(scores_BLC.shape)}: load "
                f"it with kind='token', num_labels={len(labels)} and fine-tune it on this task"
            )
        if not scores_BLC.isfinite().all():
            raise ValueError("the model gives NaN or infinite logits")
        found: list[list[int]] = scores_BLC.argmax(-1).tolist()
        return found

    features = encode_words(rows, runner.processor, runner.max_length, labels=labels)
    tags = []
    for feature, best_L in zip(features, runner.map(features, best), strict=True):
        tags.append(["O" if position is None else columns[best_L[position]] for position in feature["_first"]])
    return tags


def _tags(row: Row) -> tuple[str, ...]:
    tags: tuple[str, ...] = row["tags"]
    return tags


def iob2_labels(types: Sequence[str]) -> tuple[str, ...]:
    """O, then B- and I- of each type in turn."""
    return ("O", *(f"{prefix}-{name}" for name in types for prefix in "BI"))


def ner_task(table: ConllFiles, sizes: tuple[int, ...], source: str, finetune: FinetuneDefaults) -> Task:
    """The task of a data set in column files; the splits are those of ``table.paths``, in their order."""
    return Task(
        name=table.task,
        version=1,
        source=f"{source}; metric: seqeval, as the script conlleval",
        kind="token-classification",
        num_labels=len(table.labels),
        splits=tuple(table.paths),
        sizes=sizes,
        metric="f1",
        higher_is_better=True,
        rows=table.rows,
        encode=partial(encode_words, labels=table.labels),
        score=metrics_of_tags,
        predict=partial(predict_tags, labels=table.labels, aliases=table.label_aliases),
        reference=_tags,
        max_length=128,
        finetune=finetune,
        label_names=table.labels,
        label_aliases=table.label_aliases,
    )


def metrics_of_tags(predictions: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]) -> dict[str, float]:
    """Entity F1, precision and recall, and token accuracy; see `eval.metrics.entities`."""
    return metrics.entities(predictions, tags)


_DEFAULTS = FinetuneDefaults(
    5, 5e-5, 32, 128, "Antunes 2021 (MSc thesis), table 4.1 (rate: one of its four, 3e-5 to 3e-4); the length is ours"
)
WNUT17 = ner_task(
    ConllFiles(
        "wnut17",
        iob2_labels(("corporation", "creative-work", "group", "location", "person", "product")),
        {split: (f"wnut17/{split}.conll",) for split in ("train", "dev", "test")},
        "\t",
        False,
        "leondz/wnut_17",
        {"train": "train", "dev": "validation", "test": "test"},
    ),
    (3_394, 1_009, 1_287),
    "Derczynski et al. 2017 (WNUT-2017)",
    _DEFAULTS,
)
CONLL2003 = ner_task(
    ConllFiles(
        "conll2003",
        iob2_labels(("PER", "ORG", "LOC", "MISC")),
        {
            split: (f"conll2003/{split}.txt", f"conll2003/{other}")
            for split, other in (("train", "eng.train"), ("valid", "eng.testa"), ("test", "eng.testb"))
        },
        None,
        True,
        "eriktks/conll2003",
        {"train": "train", "valid": "validation", "test": "test"},
        {"PER": "person", "ORG": "organization", "LOC": "location", "MISC": "miscellaneous"},
    ),
    (14_041, 3_250, 3_453),
    "Tjong Kim Sang and De Meulder 2003 (CoNLL-2003)",
    _DEFAULTS,
)
NER: tuple[Task, ...] = (WNUT17, CONLL2003)
