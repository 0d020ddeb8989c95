"""GLUE (Wang et al. 2019): nine tasks on sentences and pairs of sentences, from the official files or the Hub.

Folder layout, in ``DIR/glue`` or ``DIR``, each file plain or ``.xz``; the second where the first is absent:

========  ===========================================  =====================================================
CoLA      ``CoLA/{train,dev}.tsv``                     no header: source, label, mark, sentence
SST-2     ``SST-2/{train,dev}.tsv``
MRPC      ``MRPC/{train,dev}.tsv``
STS-B     ``STS-B/{train,dev}.tsv``                    ``STS-B/sts-{train,dev}.csv``, tabs, without header
QQP       ``QQP/{train,dev}.tsv``                      lines with too few fields (three of train) are skipped
MNLI      ``MNLI/{train,dev_matched,dev_mismatched}.tsv``  ``MNLI/mnli_{matched,mismatched}.txt``, see below
QNLI      ``QNLI/{train,dev}.tsv``
RTE       ``RTE/{train,dev}.tsv``
WNLI      ``WNLI/{train,dev}.tsv``
========  ===========================================  =====================================================

``mnli_*.txt`` (label, premise, hypothesis, no header) are 1,000 tokenised rows of each dev set as TextFooler uses them;
a score on them says ``text: tokenised`` and is a sample. The test splits have no public labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import files, metrics
from .task import FinetuneDefaults, Row, Score, Task, nearest
from .text import encode_texts, score_with

HUB = "nyu-mll/glue"
HUB_SPLITS = {
    "train": "train",
    "dev": "validation",
    "dev_matched": "validation_matched",
    "dev_mismatched": "validation_mismatched",
}


@dataclass(frozen=True)
class Layout:
    """One form of a task's files.

    Args:
        path: with ``{split}``, and ``{part}`` for the split without ``dev_``.
        texts, label: columns.
        header: the columns of files that have no header line.
        fields: how strictly lines are counted, see `files.read_tsv`.
        settings: recorded in the scores on these files.
    """

    path: str
    texts: tuple[str, ...]
    label: str = "label"
    header: tuple[str, ...] | None = None
    fields: Literal["exact", "more", "skip-short"] = "exact"
    settings: Mapping[str, str] = field(default_factory=dict)

    def paths(self, split: str) -> list[str]:
        name = self.path.format(split=split, part=split.removeprefix("dev_"))
        return [f"glue/{name}", name]


@dataclass(frozen=True)
class GlueFiles:
    """Where one GLUE task's rows stand.

    Args:
        labels: names of the classes, in the Hub's order; none for similarity, a number from 0 to 5.
        layouts: forms of the official files, the usual one first.
        hub_name, hub_texts: configuration and columns on the Hub.
    """

    task: str
    splits: tuple[str, ...]
    labels: tuple[str, ...]
    layouts: tuple[Layout, ...]
    hub_name: str
    hub_texts: tuple[str, ...]

    def rows(self, split: str, data_dir: str | Path | None = None) -> list[Row]:
        """``[{"texts": (sentence,) or (first, second), "label": int or float}]`` in file order.

        Raises:
            ValueError: unknown split.
            DataError: with file and line for a broken row; with both ways out when the data is not found.
        """
        if split not in self.splits:
            raise ValueError(f"{self.task}: " + nearest("split", split, self.splits))
        folder = files.resolve_data_dir(data_dir)
        if folder is None:
            return self._from_hub(HUB_SPLITS[split])
        paths = [path for layout in self.layouts for path in layout.paths(split)]
        found = files.find_file(f"{self.task}, split {split},", folder, paths)
        name = found.relative_to(folder).as_posix().removesuffix(".xz")
        layout = next(layout for layout in self.layouts if name in layout.paths(split))
        columns = (*layout.texts, layout.label)
        return [
            self._row([row.values[name] for name in layout.texts], row.values[layout.label], row.where, layout.settings)
            for row in files.read_tsv(found, columns, header=layout.header, fields=layout.fields)
        ]

    def _from_hub(self, split: str) -> list[Row]:
        table = files.load_from_hub(self.task, HUB, self.hub_name, split)
        return [
            self._row([row[name] for name in self.hub_texts], row["label"], f"{HUB} {self.hub_name} {split} row {i}")
            for i, row in enumerate(table)
        ]

    def _row(self, texts: Iterable[str], label: Any, where: str, settings: Mapping[str, str] | None = None) -> Row:
        value: float
        if self.labels:
            value = files.parse_label(label, len(self.labels), where, self.labels)
        else:
            value = files.parse_number(label, 0, 5, where)
        # SST-2's sentences end in a space, which byte-level tokenizers would turn into a token of its own.
        row: dict[str, Any] = {"texts": tuple(text.rstrip() for text in texts), "label": value}
        return {**row, "settings": dict(settings)} if settings else row


_PAIR = ("sentence1", "sentence2")
_ENTAILS = ("entailment", "not_entailment")
_STS_COLUMNS = ("genre", "file", "year", "id", "score", *_PAIR)
_MNLI_SAMPLE = Layout(
    "MNLI/mnli_{part}.txt", ("premise", "hypothesis"), header=("label", "premise", "hypothesis"),
    settings={"text": "tokenised"},
)  # fmt: skip
# Epochs and rate are the paper's for all of GLUE; it names no length.
_DEFAULTS = FinetuneDefaults(6, 2.4e-5, 16, 128, "GPUSQ-TLM, table 6: BERT on GLUE; the length is ours", devices=8)


def _task(
    name: str,
    citation: str,
    sizes: tuple[int, int],
    labels: tuple[str, ...],
    score: Mapping[str, Any],
    *layouts: Layout,
    hub: str | None = None,
    hub_texts: tuple[str, ...] = _PAIR,
    dev: str = "dev",
) -> Task:
    splits = ("train", dev)
    table = GlueFiles(f"glue/{name}", splits, labels, layouts, hub or name, hub_texts)
    return Task(
        name=table.task,
        version=1,
        source=f"{citation}; metric: Wang et al. 2019 (GLUE)",
        kind="text-classification" if labels else "text-regression",
        num_labels=len(labels) or 1,
        splits=splits,
        sizes=sizes,
        metric=next(iter(score)),
        higher_is_better=True,
        rows=table.rows,
        encode=encode_texts,
        score=score_with(**score),
        max_length=128,
        unlabelled=(dev.replace("dev", "test"),),
        finetune=_DEFAULTS,
        label_names=labels,
        label_aliases={label: _ALIASES[label] for label in labels if label in _ALIASES},
    )


# classes under the names of other copies of the data, whose models carry them
_ALIASES = {
    "negative": ("neg",), "positive": ("pos",),
    "not_equivalent": ("not_paraphrase",), "equivalent": ("paraphrase",),
    "not_duplicate": ("not_paraphrase",), "duplicate": ("paraphrase",),
}  # fmt: skip
_ACCURACY = {"accuracy": metrics.accuracy}
_F1 = {"f1": metrics.f1, "accuracy": metrics.accuracy}

COLA = _task(
    "cola", "Warstadt et al. 2018 (CoLA)", (8_551, 1_043), ("unacceptable", "acceptable"),
    {"matthews": metrics.matthews, "accuracy": metrics.accuracy},
    Layout("CoLA/{split}.tsv", ("sentence",), header=("source", "label", "mark", "sentence")), hub_texts=("sentence",),
)  # fmt: skip
SST2 = _task(
    "sst2", "Socher et al. 2013 (Stanford Sentiment Treebank)", (67_349, 872), ("negative", "positive"), _ACCURACY,
    Layout("SST-2/{split}.tsv", ("sentence",)), hub_texts=("sentence",),
)  # fmt: skip
MRPC = _task(
    "mrpc", "Dolan and Brockett 2005 (Microsoft Research Paraphrase Corpus)", (3_668, 408),
    ("not_equivalent", "equivalent"), _F1, Layout("MRPC/{split}.tsv", ("#1 String", "#2 String"), "Quality"),
)  # fmt: skip
STSB = _task(
    "stsb", "Cer et al. 2017 (STS Benchmark)", (5_749, 1_500), (),
    {"spearman": metrics.spearman, "pearson": metrics.pearson},
    Layout("STS-B/{split}.tsv", _PAIR, "score"),
    Layout("STS-B/sts-{split}.csv", _PAIR, "score", header=_STS_COLUMNS, fields="more"),
)  # fmt: skip
QQP = _task(
    "qqp", "Quora Question Pairs (Iyer et al. 2017)", (363_846, 40_430), ("not_duplicate", "duplicate"), _F1,
    Layout("QQP/{split}.tsv", ("question1", "question2"), "is_duplicate", fields="skip-short"),
    hub_texts=("question1", "question2"),
)  # fmt: skip
MNLI_LABELS = ("entailment", "neutral", "contradiction")
MNLI, MNLI_MM = (
    _task(
        name, "Williams et al. 2018 (MultiNLI)", (392_702, size), MNLI_LABELS, _ACCURACY,
        Layout("MNLI/{split}.tsv", _PAIR, "gold_label"), _MNLI_SAMPLE,
        hub="mnli", hub_texts=("premise", "hypothesis"), dev=dev,
    )
    for name, size, dev in (("mnli", 9_815, "dev_matched"), ("mnli-mm", 9_832, "dev_mismatched"))
)  # fmt: skip
QNLI = _task(
    "qnli", "Rajpurkar et al. 2016, recast by Wang et al. 2019 (QNLI)", (104_743, 5_463), _ENTAILS, _ACCURACY,
    Layout("QNLI/{split}.tsv", ("question", "sentence")), hub_texts=("question", "sentence"),
)  # fmt: skip
RTE = _task(
    "rte", "Dagan et al. 2006 and the later RTE papers", (2_490, 277), _ENTAILS, _ACCURACY,
    Layout("RTE/{split}.tsv", _PAIR),
)  # fmt: skip
WNLI = _task(
    "wnli", "Levesque et al. 2012 (Winograd schemas)", (635, 71), ("not_entailment", "entailment"), _ACCURACY,
    Layout("WNLI/{split}.tsv", _PAIR),
)  # fmt: skip

GLUE: tuple[Task, ...] = (COLA, SST2, MRPC, STSB, QQP, MNLI, MNLI_MM, QNLI, RTE, WNLI)


@dataclass(frozen=True)
class GlueMeans:
    """Both means over the primary metric of several GLUE tasks; MNLI's two dev sets count as two, as in NxMTransformer.

    Args:
        tasks: names of the tasks that are in it; means over different tasks cannot be compared.
        complete: every score is over its whole official split.
        geometric: None when a score is negative (a correlation may be).
    """

    tasks: tuple[str, ...]
    arithmetic: float
    geometric: float | None
    complete: bool


def glue_means(scores: Iterable[Score]) -> GlueMeans:
    """The means over the primary metrics among ``scores``; scores of other tasks and other metrics are left out.

    Raises:
        ValueError: no GLUE score, or two of one task.
    """
    primary = {task.name: task.metric for task in GLUE}
    chosen = [score for score in scores if primary.get(score.task) == score.metric]
    names = [score.task for score in chosen]
    if not chosen or len(set(names)) != len(names):
        raise ValueError(f"expected the scores of one model on GLUE tasks, one of each, found {names or 'none'}")
    values = [score.value for score in chosen]
    return GlueMeans(
        tasks=tuple(sorted(names)),
        arithmetic=sum(values) / len(values),
        geometric=metrics.geometric_mean(values) if min(values) >= 0 else None,
        complete=all(score.complete for score in chosen),
    )
