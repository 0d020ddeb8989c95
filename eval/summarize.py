"""CNN/DailyMail 3.0.0 (Hermann et al. 2015; See et al. 2017) and XSum (Narayan et al. 2018): summaries, by ROUGE.

Folder layout: ``DIR/cnn_dailymail/{train,validation,test}.jsonl`` with ``article`` and ``highlights`` (one sentence a
line), ``DIR/xsum/{train,validation,test}.jsonl`` with ``document`` and ``summary``; plain or ``.xz``, one JSON object a
line. On the Hub: abisee/cnn_dailymail (3.0.0) and EdinburghNLP/xsum. A few published documents are empty; a reference
never is.

The defaults are those of BART (Lewis et al. 2020) in its authors' code: CNN/DailyMail 4 beams, 56 to 142 tokens, length
penalty 2, no trigram twice; XSum 6 beams, 11 to 62 tokens, length penalty 1. GPUSQ-TLM (table 3) says source 1024,
target 60, 6 beams: the settings ``max_target=60`` and ``num_beams=6``, for CNN/DailyMail with ``min_target=11``.

Encoder-decoders read the document alone. Decoders read the document and then ``TL;DR:`` (Radford et al. 2019, section
3.6) and write on; the scores say so (``prompt``).

ROUGE is of the library rouge-score, with its Porter stemmer; means of F1 over the documents. Its LSum compares
sentence by sentence; models write theirs in one line, so both texts are cut after each ``.``, ``!`` or ``?`` that
white space follows, and at line breaks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files
from .generate import (
    continuation_ids,
    is_encoder_decoder,
    prompt_ids,
    require_tokenizer,
    source_length,
    with_target,
    write_texts,
)
from .task import Feature, FinetuneDefaults, Row, Setting, Task, nearest

if TYPE_CHECKING:
    from .runner import Runner

SPLITS = ("train", "validation", "test")
PROMPT = "\nTL;DR:"
ROUGE = ("rougeLsum", "rouge1", "rouge2", "rougeL")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class SummaryFiles:
    """Where one data set's rows stand: folder, names of the two fields, repository and configuration on the Hub."""

    task: str
    folder: str
    source: str
    target: str
    hub: str
    hub_name: str | None

    def rows(self, split: str, data_dir: str | Path | None = None) -> list[Row]:
        """``[{"id": str, "source": str, "target": str}]`` in file order; the target is never empty.

        Raises:
            ValueError: unknown split.
            DataError: with file and line for a broken row; with both ways out when the data is not found.
        """
        if split not in SPLITS:
            raise ValueError(f"{self.task}: " + nearest("split", split, SPLITS))
        folder = files.resolve_data_dir(data_dir)
        if folder is None:
            table = files.load_from_hub(self.task, self.hub, self.hub_name, split)
            return [self._row(row, f"{self.hub} {split} row {index}") for index, row in enumerate(table)]
        name = f"{self.folder}/{split}.jsonl"
        path = files.find_file(f"{self.task}, split {split},", folder, (name, f"{split}.jsonl"))
        rows = []
        for number, line in enumerate(files.read_text(path).split("\n"), start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                rows.append(self._row(json.loads(line), where))
            except json.JSONDecodeError as error:
                raise files.DataError(f"{where}: expected one JSON object, {error.msg}") from error
        if not rows:
            raise files.DataError(f"{path}:1: expected one JSON object a line, found none")
        return rows

    def _row(self, found: Any, where: str) -> Row:
        if not isinstance(found, dict):
            raise files.DataError(f"{where}: expected a JSON object, found {type(found).__name__}")
        for name in (self.source, self.target):
            if not isinstance(found.get(name), str):
                raise files.DataError(f"{where}: expected text under {name!r}, found the keys {sorted(found)}")
        if not found[self.target].strip():
            raise files.DataError(f"{where}: {self.target!r} is empty")
        return {"id": str(found.get("id", where)), "source": found[self.source], "target": found[self.target].strip()}


def encode_sources(rows: Sequence[Row], processor: Any, max_length: int, *, prompted: bool) -> list[Feature]:
    """What the model reads: ``input_ids`` and ``attention_mask`` of the document, at most ``max_length`` tokens.

    Args:
        prompted: the document is cut so that `PROMPT` fits after it, for decoders.
    """
    tokenizer = require_tokenizer(processor)
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"] if prompted else []
    if max_length <= len(prompt) + tokenizer.num_special_tokens_to_add():
        raise ValueError(f"max_length {max_length} leaves no token of the document")
    room = max_length - len(prompt)
    texts = [row["source"] for row in rows]
    if prompted:
        found = [[*ids, *prompt] for ids in prompt_ids(texts, tokenizer, room)]
    else:
        found = tokenizer(texts, truncation=True, max_length=room)["input_ids"]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in found]


def encode_for_encoder_decoder(
    rows: Sequence[Row], processor: Any, max_length: int, *, max_target: int
) -> list[Feature]:
    """Training pairs: the document, and ``labels`` of the summary in one line, at most ``max_target`` tokens."""
    features = encode_sources(rows, processor, max_length, prompted=False)
    targets = [_one_line(row["target"]) for row in rows]
    labels = processor(text_target=targets, truncation=True, max_length=max_target)["input_ids"]
    return [{**feature, "labels": ids} for feature, ids in zip(features, labels, strict=True)]


def encode_for_decoder(rows: Sequence[Row], processor: Any, max_length: int, *, max_target: int) -> list[Feature]:
    """Training sequences of at most ``max_length`` tokens: the document cut to what the rest leaves, `PROMPT`, the
    summary in one line and the end token; ``labels`` of the summary only."""
    features = []
    for row in rows:
        target = continuation_ids(" " + _one_line(row["target"]), processor)[:max_target]
        (source,) = encode_sources([row], processor, max_length - len(target), prompted=True)
        features.append(with_target(source["input_ids"], target, max_length))
    return features


def predict(runner: Runner, rows: Sequence[Row]) -> list[str]:
    """The model's summaries.

    Raises:
        ValueError: no tokenizer, a model that writes no text or has too few positions, settings out of range.
    """
    prompted = not is_encoder_decoder(runner.model)
    length = source_length(runner.model, runner.max_length, int(runner.settings["max_target"]))
    runner.settings["max_length"] = length
    runner.settings["prompt"] = PROMPT.strip() if prompted else "none"
    runner.settings["rouge"] = f"rouge-score {version('rouge-score')}: Porter stemmer, mean of F1"
    return write_texts(runner, encode_sources(rows, runner.processor, length, prompted=prompted))


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F1 of ROUGE-1, -2, -L and -LSum (Lin 2004), fractions."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)  # splits sentences at line breaks: no download
    found = [
        scorer.score(sentences(reference), sentences(prediction))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {name: sum(row[name].fmeasure for row in found) / len(found) for name in ROUGE}


def sentences(text: str) -> str:
    """The text with one sentence a line, cut as the module's docstring says."""
    return "\n".join(part for line in text.splitlines() for part in _SENTENCE_END.split(line.strip()) if part)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _task(
    name: str, source: str, files_: SummaryFiles, sizes: tuple[int, ...], settings: dict[str, Setting], rate: float
) -> Task:
    longest = int(settings["max_target"])
    heads = {
        "seq2seq-lm": partial(encode_for_encoder_decoder, max_target=longest),
        "causal-lm": partial(encode_for_decoder, max_target=longest),
    }
    return Task(
        name=name,
        version=1,
        source=f"{source}; metric: Lin 2004 (ROUGE), by rouge-score",
        kind="summarization",
        num_labels=None,
        splits=SPLITS,
        sizes=sizes,
        metric="rougeLsum",
        higher_is_better=True,
        rows=files_.rows,
        encode=heads["seq2seq-lm"],
        train_encode_by_head=heads,
        score=rouge,
        predict=predict,
        reference=itemgetter("target"),
        max_length=1024,
        settings=settings,
        finetune=FinetuneDefaults(
            epochs=3,
            learning_rate=rate,
            batch_size=16,
            devices=8,
            max_length=1024,
            source="GPUSQ-TLM, table 6: BART; the length is BART's",
        ),
    )


CNN_DAILYMAIL = _task(
    "cnn_dailymail",
    "Hermann et al. 2015, See et al. 2017 (CNN/DailyMail 3.0.0)",
    SummaryFiles("cnn_dailymail", "cnn_dailymail", "article", "highlights", "abisee/cnn_dailymail", "3.0.0"),
    (287_113, 13_368, 11_490),
    {
        "num_beams": 4, "min_target": 56, "max_target": 142, "length_penalty": 2.0, "no_repeat_ngram_size": 3,
        "early_stopping": 1,
    },
    5.5e-5,
)  # fmt: skip
XSUM = _task(
    "xsum",
    "Narayan et al. 2018 (XSum)",
    SummaryFiles("xsum", "xsum", "document", "summary", "EdinburghNLP/xsum", None),
    (204_045, 11_332, 11_334),
    {
        "num_beams": 6, "min_target": 11, "max_target": 62, "length_penalty": 1.0, "no_repeat_ngram_size": 3,
        "early_stopping": 1,
    },
    7e-5,
)  # fmt: skip
SUMMARIES = (CNN_DAILYMAIL, XSUM)
