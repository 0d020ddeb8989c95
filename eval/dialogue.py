"""Persona-Chat (Zhang et al. 2018): the next reply of a speaker who has a persona.

Folder layout, plain or ``.xz``:

* ``personachat``, the dialogues of ConvAI2 (Dinan et al. 2019), ``DIR/persona-chat/`` (or ``DIR/ConvAI2/``)
  ``{train,valid}_self_original.txt`` with 20 candidates per reply, or ``{train,valid}_self_original_no_cands.txt``;
  a sample of the latter as ``convai2_{train,valid}_self_original_no_cands.sample.txt``. On the Hub:
  AlekseyKorshuk/persona-chat.
* ``personachat-synthetic`` (Jandaghi et al. 2023; conversations written by a model),
  ``DIR/persona-chat/Synthetic-Persona-Chat_{train,valid,test}.csv``. On the Hub: google/Synthetic-Persona-Chat.

A row is a dialogue; all its replies are scored. The model reads, one a line, ``your persona: ...``, then the turns so
far, ``them: ...`` and ``you: ...``, at most ``max_length`` tokens (the oldest turns are left out), and ``you:``.

Scores, fractions where they are shares:

* ``bleu``, ``ter``: of the written replies, greedy and up to the first line break, by sacrebleu (corpus level, Post
  2018; its signatures are in the settings);
* ``hits@1``, ``@5``, ``@10``: how often the right reply is among the first of all candidates, ranked by the mean
  log-probability of their tokens with the end token (``ranking``; ``sum`` is the other choice). Equal scores count
  against the right reply. Where the file has no candidates, 19 replies of other dialogues of the split are drawn once
  and for all; the settings say which it was (``candidates``);
* ``perplexity`` of the right reply per token of the model's own tokenizer, end token included (models with different
  tokenizers do not compare), ``word_perplexity`` per word between spaces (they do);
* ``bertscore`` (Zhang et al. 2020) only where ``bertscore_model`` names a local folder with an encoder: F1 without
  rescaling, of the layer ``bertscore_layer``, by the library bert-score; an empty reply has 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files
from .dialogue_bertscore import BertScorer
from .dialogue_files import (
    DISTRACTORS,
    SEED,
    convai2_rows,
    read_convai2,
    read_synthetic,
    synthetic_rows,
)
from .dialogue_prompt import encode_for_decoder, encode_for_encoder_decoder, prompts
from .dialogue_score import Reply, score, signatures
from .generate import is_encoder_decoder, write_texts
from .likelihood import Pairs, log_likelihoods
from .task import FinetuneDefaults, Row, Setting, Task, nearest

if TYPE_CHECKING:
    from .runner import Runner

CONVAI2_HUB, SYNTHETIC_HUB = "AlekseyKorshuk/persona-chat", "google/Synthetic-Persona-Chat"
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class DialogueFiles:
    """Where a data set's dialogues stand; ``synthetic`` says which of the two."""

    task: str
    splits: tuple[str, ...]
    synthetic: bool

    def rows(self, split: str, data_dir: str | Path | None = None) -> list[Row]:
        """The dialogues, as `eval.dialogue_files` says.

        Raises:
            ValueError: unknown split.
            DataError: with file and line for a broken row; with both ways out when the data is not found.
        """
        if split not in self.splits:
            raise ValueError(f"{self.task}: " + nearest("split", split, self.splits))
        folder = files.resolve_data_dir(data_dir)
        what = f"{self.task}, split {split},"
        if folder is None:
            hub = SYNTHETIC_HUB if self.synthetic else CONVAI2_HUB
            table = files.load_from_hub(self.task, hub, None, HUB_SPLITS[split])
            return (synthetic_rows if self.synthetic else convai2_rows)(table, f"{hub} {HUB_SPLITS[split]}")
        if self.synthetic:
            names = [f"Synthetic-Persona-Chat_{split}.csv"]
        else:
            plain = f"{split}_self_original"
            names = [f"{plain}.txt", f"{plain}_no_cands.txt", f"convai2_{plain}_no_cands.sample.txt"]
        places = [place + name for name in names for place in ("persona-chat/", "ConvAI2/", "")]
        path = files.find_file(what, folder, places)
        return read_synthetic(path) if self.synthetic else read_convai2(path)


def references(row: Row) -> tuple[str, ...]:
    """The right replies of a dialogue."""
    return tuple(row["turns"][index][1] for index in row["replies"])


def predict(runner: Runner, rows: Sequence[Row]) -> list[list[Reply]]:
    """For each dialogue what the model writes for each reply, and how likely it holds the right one.

    Raises:
        ValueError: no tokenizer or no end token, too few positions, settings out of range, scores that are not finite,
            or a ``bertscore_model`` that bert-score cannot use.
    """
    from .perplexity import context_length

    settings, tokenizer = runner.settings, runner.processor
    if settings["ranking"] not in ("mean", "sum"):
        raise ValueError(f"setting ranking is 'mean' or 'sum', found {settings['ranking']!r}")
    items = [(number, place) for number, row in enumerate(rows) for place in range(len(row["replies"]))]
    if not items:
        raise ValueError("these dialogues have no reply to score")
    scorer = BertScorer.of(settings, str(runner.device), runner.batch_size)  # fails before the long part
    encoder_decoder, limit = is_encoder_decoder(runner.model), context_length(runner.model)
    settings["max_length"] = runner.max_length if limit is None else min(runner.max_length, limit)
    found = prompts(
        [(rows[number], place) for number, place in items], tokenizer, runner.max_length,
        encoder_decoder=encoder_decoder, limit=limit, max_target=int(settings["max_target"]),
    )  # fmt: skip
    pairs = Pairs([(prompt.ids, target) for prompt in found for target in prompt.targets], encoder_decoder)
    likelihoods = iter(log_likelihoods(runner, pairs))
    written = write_texts(runner, [{"input_ids": p.ids, "attention_mask": [1] * len(p.ids)} for p in found])
    texts = [text.split("\n")[0].strip() for text in written]
    right = [references(rows[number])[place] for number, place in items]
    _record_(settings, rows, found)
    f1s = None if scorer is None else scorer.f1(texts, right)
    replies: list[list[Reply]] = [[] for _ in rows]
    for index, ((number, _), prompt) in enumerate(zip(items, found, strict=True)):
        chances = [next(likelihoods) for _ in prompt.targets]
        if settings["ranking"] == "sum":
            ranks = [chance.total for chance in chances]
        else:
            ranks = [chance.total / chance.tokens for chance in chances]
        replies[number].append(
            Reply(
                text=texts[index],
                rank=1 + sum(other >= ranks[0] for other in ranks[1:]),
                log_likelihood=chances[0].total,
                tokens=chances[0].tokens,
                bertscore=None if f1s is None else f1s[index],
            )
        )
    return replies


def _record_(settings: dict[str, Setting], rows: Sequence[Row], found: Sequence[Any]) -> None:
    """Write into the settings what the files and the model decided."""
    counts = sorted({len(prompt.targets) for prompt in found})
    count = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    sampled = any(row["candidates_from"] == "sampled" for row in rows)
    drawn = f"{count}: the reply and {DISTRACTORS} replies of other dialogues, seed {SEED}"
    settings["candidates"] = drawn if sampled else f"{count}, of the file"
    settings["replies"] = len(found)
    settings.update(signatures())


_SETTINGS: Mapping[str, Setting] = {
    "num_beams": 1, "min_target": 1, "max_target": 40, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "early_stopping": 1, "ranking": "mean", "bertscore_model": "", "bertscore_layer": 0,
}  # fmt: skip


def _task(name: str, source: str, splits: tuple[str, ...], sizes: tuple[int, ...], synthetic: bool) -> Task:
    return Task(
        name=name,
        version=1,
        source=source,
        kind="dialogue",
        num_labels=None,
        splits=splits,
        sizes=sizes,
        metric="bleu",
        higher_is_better=True,
        rows=DialogueFiles(name, splits, synthetic).rows,
        encode=encode_for_decoder,
        train_encode_by_head={"causal-lm": encode_for_decoder, "seq2seq-lm": encode_for_encoder_decoder},
        score=score,
        predict=predict,
        reference=references,
        max_length=256,
        settings=_SETTINGS,
        opposite=("ter", "perplexity", "word_perplexity"),
        finetune=FinetuneDefaults(
            epochs=3,
            learning_rate=6.25e-5,
            batch_size=2,
            max_length=256,
            source="thesis pipeline (ALGORITHMS E.4): 3 epochs, batch 2, learning rate one of 6.25e-5, 5e-5, 1e-4; the "
            "length is a choice of this project",
        ),
    )


PERSONACHAT = _task(
    "personachat",
    "Zhang et al. 2018 (Persona-Chat), the dialogues of ConvAI2 (Dinan et al. 2019); metrics: sacrebleu, bert-score",
    ("train", "valid"),
    (17_878, 1_000),
    synthetic=False,
)
PERSONACHAT_SYNTHETIC = _task(
    "personachat-synthetic",
    "Jandaghi et al. 2023 (Synthetic-Persona-Chat, written by a model); metrics: sacrebleu, bert-score",
    ("train", "valid", "test"),
    (8_938, 1_000, 968),
    synthetic=True,
)
DIALOGUES = (PERSONACHAT, PERSONACHAT_SYNTHETIC)
