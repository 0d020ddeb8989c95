"""GLUE (Wang et al. 2019): sentence and sentence-pair classification from the official files or the Hub.

Folder layout: ``DIR/glue/SST-2/dev.tsv`` or ``DIR/SST-2/dev.tsv``, plain or ``.xz``; likewise ``train`` and ``MRPC``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files, metrics
from .task import Feature, Row, Task, nearest

HUB = "nyu-mll/glue"
HUB_SPLITS = {"train": "train", "dev": "validation"}


@dataclass(frozen=True)
class GlueFiles:
    """Where one GLUE task's rows stand: official folder and column names, Hub configuration and its column names."""

    task: str
    folder: str
    label: str
    texts: tuple[str, ...]
    hub_name: str
    hub_texts: tuple[str, ...]
    num_labels: int

    def rows(self, split: str, data_dir: str | Path | None = None) -> list[Row]:
        """``[{"texts": (sentence,) or (first, second), "label": int}]`` in file order.

        Raises:
            ValueError: unknown split.
            DataError: with file and line for a broken row; with both ways out when the data is not found.
        """
        if split not in HUB_SPLITS:
            raise ValueError(f"{self.task}: " + nearest("split", split, HUB_SPLITS))
        folder = files.resolve_data_dir(data_dir)
        if folder is None:
            return self._from_hub(HUB_SPLITS[split])
        name = f"{self.folder}/{split}.tsv"
        path = files.find_file(f"{self.task}, split {split},", folder, (f"glue/{name}", name))
        return [
            self._row([row.values[name] for name in self.texts], row.values[self.label], row.where)
            for row in files.read_tsv(path, (*self.texts, self.label))
        ]

    def _from_hub(self, split: str) -> list[Row]:
        table = files.load_from_hub(self.task, HUB, self.hub_name, split)
        return [
            self._row([row[name] for name in self.hub_texts], row["label"], f"{HUB} {self.hub_name} {split} row {i}")
            for i, row in enumerate(table)
        ]

    def _row(self, texts: Sequence[str], label: str | int, where: str) -> Row:
        # SST-2's sentences end in a space, which byte-level tokenizers would turn into a token of its own.
        return {
            "texts": tuple(text.rstrip() for text in texts),
            "label": files.parse_label(label, self.num_labels, where),
        }


def encode_texts(rows: Sequence[Row], processor: Any, max_length: int = 128) -> list[Feature]:
    """Tokenize one text or a pair per row, truncated to ``max_length`` tokens, not padded.

    Returns:
        One dict per row: ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer makes them (lists of
        int of the row's own length), and ``labels`` (int).

    Raises:
        ValueError: there is no tokenizer.
    """
    if processor is None or not callable(processor):
        raise ValueError(
            f"a text task needs the model's tokenizer, got {type(processor).__name__}: "
            "save the tokenizer in the model's folder (tokenizer.save_pretrained)"
        )
    if not rows:
        return []
    columns = [list(column) for column in zip(*(row["texts"] for row in rows))]
    encoded = processor(
        *columns, truncation=True, max_length=min(max_length, getattr(processor, "model_max_length", max_length))
    )
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
    return [{**{name: encoded[name][i] for name in names}, "labels": int(row["label"])} for i, row in enumerate(rows)]


def _scores(**functions: Callable[[Sequence[int], Sequence[int]], float]) -> Callable[..., dict[str, float]]:
    def score(predictions: Sequence[int], labels: Sequence[int]) -> dict[str, float]:
        return {name: function(predictions, labels) for name, function in functions.items()}

    return score


_SST2 = GlueFiles("glue/sst2", "SST-2", "label", ("sentence",), "sst2", ("sentence",), 2)
_MRPC = GlueFiles("glue/mrpc", "MRPC", "Quality", ("#1 String", "#2 String"), "mrpc", ("sentence1", "sentence2"), 2)

SST2 = Task(
    name="glue/sst2",
    version=1,
    source="Socher et al. 2013 (Stanford Sentiment Treebank); metric: Wang et al. 2019 (GLUE)",
    kind="text-classification",
    num_labels=2,
    splits=("train", "dev"),
    sizes=(67_349, 872),
    metric="accuracy",
    higher_is_better=True,
    rows=_SST2.rows,
    encode=encode_texts,
    score=_scores(accuracy=metrics.accuracy),
)
MRPC = Task(
    name="glue/mrpc",
    version=1,
    source="Dolan and Brockett 2005 (Microsoft Research Paraphrase Corpus); metrics: Wang et al. 2019 (GLUE)",
    kind="text-classification",
    num_labels=2,
    splits=("train", "dev"),
    sizes=(3_668, 408),
    metric="f1",
    higher_is_better=True,
    rows=_MRPC.rows,
    encode=encode_texts,
    score=_scores(f1=metrics.f1, accuracy=metrics.accuracy),
)
