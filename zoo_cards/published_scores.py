"""Which published numbers stand beside a card: those of its model (or else its family), method, task and metric.

The tables of the papers, one by one, as records of one form. Nothing here is ever mixed into measured numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from ..eval.task import Score
from .parts import Base
from .published_models import of_nearest_model
from .published_tables import Note, PublishedTable, published_table


@dataclass(frozen=True)
class PublishedScore:
    """One published pair of numbers, dense and compressed, as texts exactly as printed.

    Args:
        model: the paper's name for it. method: the paper's name for what was done.
        recipes: those of this package that rebuild the method; empty for methods that it does not have.
        tasks: patterns of this package's task names. metric: its name for the metric. split: what was scored.
        scale: the printed number is so many times this package's (percent: 100).
        source: paper and table. notes: what a reader must know about these cells.
    """

    model: str
    method: str
    recipes: tuple[str, ...]
    tasks: tuple[str, ...]
    metric: str
    split: str
    scale: float
    dense: str
    compressed: str
    source: str
    notes: tuple[Note, ...]

    def speaks_of(self, score: Score) -> bool:
        """Whether this is the same metric on the same data; splits may differ, and are said."""
        return self.metric == score.metric and any(fnmatchcase(score.task, task) for task in self.tasks)


GPUSQ_RECIPES = {
    "GPUSQ-TLM_GEMM": ("gpusq-gemm-int8",), "GPUSQ-TLM_GEMM-MHA": ("gpusq-gemm-mha-int8",),
    "GPUSQ-TLM_GEMM_MHA": ("gpusq-gemm-mha-int8",), "PKD-BERT": ("pkd-6", "pkd-6-token"),
}  # fmt: skip
_NXM = {"ADMM_Unstructured": ("admm-unstructured",), "ASP": ("asp-2-4",), "NxMTransformer": ("nxm-admm",)}
THESIS_RECIPES = {
    "PKD": ("pkd-6", "pkd-6-token"), "IMP": ("imp-70", "imp-70-task"), "DQ": ("dq",), "IMP+DQ": ("imp-dq",),
}  # fmt: skip
_GLUE = {  # ALGORITHMS G and the papers' own words: QQP and MRPC F1, CoLA Matthews, STS-B Spearman
    "cola": ("glue/cola", "matthews"), "sst2": ("glue/sst2", "accuracy"), "mrpc": ("glue/mrpc", "f1"),
    "stsb": ("glue/stsb", "spearman"), "qqp": ("glue/qqp", "f1"), "mnli_m": ("glue/mnli", "accuracy"),
    "mnli_mm": ("glue/mnli-mm", "accuracy"), "qnli": ("glue/qnli", "accuracy"), "rte": ("glue/rte", "accuracy"),
}  # fmt: skip
_SQUAD = {"squad11_em": ("squad1", "exact_match"), "squad11_f1": ("squad1", "f1")}
_ROUGE = {"cnn_dm_rougeLsum": ("cnn_dailymail", "rougeLsum"), "xsum_rougeLsum": ("xsum", "rougeLsum")}
THESIS_TASKS = {
    "Sentiment Analysis": ("BERT-base", "imdb/halves", "25 % of all reviews"),
    "Named Entity Recognition": ("BERT-base", "conll2003", "its own split 70/15/15"),
    "Sentence Generation": ("GPT-2 small", "personachat", "0.5 % of all rows"),
}
_THESIS_METRICS = {
    "Accuracy": "accuracy", "F1": "f1", "Precision": "precision", "Recall": "recall", "BLEU": "bleu", "TER": "ter",
    "BERTScore": "bertscore", "Hits@1": "hits@1", "Hits@5": "hits@5", "Hits@10": "hits@10",
}  # fmt: skip


@cache
def published_scores() -> tuple[PublishedScore, ...]:
    """Every score of the papers' result tables, by table."""
    return tuple(
        score for read in (_encoders, _plug_in, _decoders, _summaries, _deep_compression, _nxm, _thesis)
        for score in read()
    )  # fmt: skip


def published_for(base: Base, recipe: str, score: Score) -> tuple[PublishedScore, ...]:
    """What the papers print for this model, recipe and score: of the same model, else of others of its family.

    `published_models` tells which is which.
    """
    return of_nearest_model((p for p in published_scores() if recipe in p.recipes and p.speaks_of(score)), base)


def _pairs(
    table: PublishedTable,
    row: Mapping[str, str],
    dense: Mapping[str, str],
    model: str,
    method: str,
    recipes: tuple[str, ...],
    columns: Mapping[str, tuple[str, str]],
    split: Mapping[str, str] | str,
) -> Iterator[PublishedScore]:
    """One score per column of a row of percentages, against the same column of the dense row."""
    for column, (task, metric) in columns.items():
        if column in table.columns:
            said = split if isinstance(split, str) else split.get(column, "test server")
            yield PublishedScore(
                model, method, recipes, (task,), metric, said, 100.0, dense[column], row[column], table.source,
                table.notes_on(column, dense, row),
            )  # fmt: skip


def _encoders() -> Iterator[PublishedScore]:
    table = published_table("gpusq_tlm_table1")
    dense = {row["reference_model"]: row for row in table.rows if row["method"] == row["reference_model"]}
    for row in table.rows:
        model, method = row["reference_model"], row["method"]
        if model != method:
            split = dict.fromkeys(_SQUAD, "dev")
            columns = {**_SQUAD, **_GLUE}
            yield from _pairs(table, row, dense[model], model, method, GPUSQ_RECIPES.get(method, ()), columns, split)


def _plug_in() -> Iterator[PublishedScore]:
    table = published_table("gpusq_tlm_table4")
    rows = {row["method"]: row for row in table.rows}
    for model in ("DistilBERT", "TinyBERT", "PKD-BERT"):
        # the paper does not say whether its plug-in rows prune attention maps: both recipes are shown beside them
        both, split = ("gpusq-gemm-int8", "gpusq-gemm-mha-int8"), dict.fromkeys(_SQUAD, "dev")
        row = rows[f"{model}_GPUSQ"]
        yield from _pairs(table, row, rows[model], model, row["method"], both, {**_SQUAD, **_GLUE}, split)


def _decoders() -> Iterator[PublishedScore]:
    table = published_table("gpusq_tlm_table2_ppl")
    methods = {
        "gpusq_tlm_gemm": ("GPUSQ-TLM_GEMM", ("gpusq-gemm-int8",)),
        "gpusq_tlm_gemm_mha": ("GPUSQ-TLM_GEMM-MHA", ("gpusq-gemm-mha-int8",)),
        "sparsegpt": ("SparseGPT", ("sparsegpt-2-4",)), "zeroquant": ("ZeroQuant", ()), "llm_int8": ("llm.int8()", ()),
    }  # fmt: skip
    for row in table.rows:
        for column, (method, recipes) in methods.items():
            yield PublishedScore(
                row["model"], method, recipes, ("wikitext103/token",), "perplexity", "split and protocol not stated",
                1.0, row["baseline"], row[column], table.source, table.notes_on("model", row),
            )  # fmt: skip


def _summaries() -> Iterator[PublishedScore]:
    table = published_table("gpusq_tlm_table3")
    dense, *others = table.rows
    for row in others:
        method = row["method"]
        yield from _pairs(table, row, dense, "BART", method, GPUSQ_RECIPES[method], _ROUGE, "split not stated")


def _deep_compression() -> Iterator[PublishedScore]:
    table = published_table("deep_compression_table4")
    dense, *others = table.rows
    columns = {
        "bert_base_f1": ("BERT-base", "squad1", "f1", "dev"),
        "wav2vec2_wer": ("Wav2vec2", "librispeech*", "wer", "split not stated"),
        "vit_accuracy": ("ViT-base/16", "imagenet*", "top1", "split not stated"),
    }
    for row in others:
        sparse = row["sparsity"] != "0"
        recipe = f"deepcomp-{'sparse-' if sparse else ''}{row['precision'].lower()}"
        method = f"{row['precision']}{', 50 % sparse' if sparse else ''}"
        for column, (model, task, metric, split) in columns.items():
            yield from _pairs(table, row, dense, model, method, (recipe,), {column: (task, metric)}, split)


def _nxm() -> Iterator[PublishedScore]:
    table = published_table("nxmtransformer_table1")
    dense, *others = table.rows
    for row in others:
        yield from _pairs(table, row, dense, "BERT-base", row["model"], _NXM[row["model"]], _GLUE, "dev")
    table = published_table("nxmtransformer_table2")
    rows = {row["model"]: row for row in table.rows}
    dense, row = rows["DistilBERT (BERT6)"], rows["DistilBERT-NxMTransformer"]
    yield from _pairs(table, row, dense, "DistilBERT", row["model"], ("nxm-admm",), _GLUE, "dev")


def _thesis() -> Iterator[PublishedScore]:
    table = published_table("thesis_table_a1")
    for row in table.rows:
        model, task, split = THESIS_TASKS[row["task"]]
        metric = _THESIS_METRICS[row["metric"]]
        metric = "token_accuracy" if task == "conll2003" and metric == "accuracy" else metric
        scale = 100.0 if metric == "bleu" else 1.0
        for method, recipes in THESIS_RECIPES.items():
            column = method.lower().replace("+", "_")
            if column == "imp" and model == "GPT-2 small":
                recipes = ("imp-30",)  # 30 % for GPT-2, 70 % for BERT (section 4.4)
            yield PublishedScore(
                model, method, recipes, (task,), metric, split, scale, row["baseline"], row[column], table.source,
                table.notes_on(column, row),
            )  # fmt: skip
