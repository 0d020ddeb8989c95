"""Language modelling on WikiText: the perplexities of causal models, and masked models' share of found words.

The files, and how they are cut into pages, are those of `eval.wikitext`. Perplexities of different protocols differ by
up to a factor of two on the same model, so each protocol is a task of its own:

* ``wikitext2/token``: per token of the model's own tokenizer, over disjoint windows of ``window`` tokens of the whole
  split as one text (0: the model's context, at most 1024). The first token of each window is not scored: in the first
  window that is the beginning token of tokenizers that add one (OPT, Llama); no other window has one. Tokenizers cut
  words differently, so this compares variants of one model, not models.
* ``wikitext2/sliding``: likewise per token, over windows that overlap: each advances by ``stride`` tokens.
* ``wikitext2/word``: per word and per byte of the original text, comparable between models: the protocol of
  lm-evaluation-harness's task ``wikitext`` (version 2). ``window`` 0 is the model's whole context, as there. Each page
  stands behind one beginning token (an end token where there is none), which is context and never scored, also with
  tokenizers that add one by themselves. The harness does so with ``add_bos_token=False``; without it, its version
  0.4.13 leaves such tokenizers their own token too, and scores that second one (its issue 3333). Version 1 did that.
* ``wikitext2/masked``: for models that read in both directions, which have no perplexity: 15 % of the tokens of blocks
  are hidden, the same ones for every model with this tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .task import Feature, FinetuneDefaults, Kind, Row, Setting, Task
from .wikitext import Wikitext, count_words, detokenize

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .runner import Runner

WINDOW = 1024  # most tokens of a window of token perplexity, and of a block to train on
MASK_SEED = 0
SPLITS = ("train", "valid", "test")
# pages; of valid and test counted in the files, of train those of the Hub's EleutherAI/wikitext_document_level
SIZES = {2: (629, 60, 62), 103: (29_444, 60, 62)}
SOURCE = "Merity et al. 2016 (Pointer Sentinel Mixture Models)"


def encode_causal(rows: Sequence[Row], processor: Any, max_length: int) -> Sequence[Feature]:
    """Blocks of ``max_length`` tokens with labels, to train a causal model on."""
    from .blocks import causal_blocks

    return causal_blocks((row["page"] + "\n" for row in rows), processor, _shortest(processor, max_length))


def encode_masked(rows: Sequence[Row], processor: Any, max_length: int) -> Sequence[Feature]:
    """Blocks of ``max_length`` tokens without labels, which `make_masker` adds."""
    from .blocks import masked_blocks

    return masked_blocks((row["page"] + "\n" for row in rows), processor, _shortest(processor, max_length))


def make_masker(processor: Any) -> Callable[..., Any]:
    """The masking of a masked task's training, see `eval.blocks.token_masker`."""
    from .blocks import token_masker

    return token_masker(processor)


def _shortest(processor: Any, max_length: int) -> int:
    return min(max_length or WINDOW, getattr(processor, "model_max_length", WINDOW))


def predict_tokens(runner: Runner, rows: Sequence[Row], *, sliding: bool = False) -> list[tuple[float, int]]:
    """(-ln P, tokens) of each window of all pages joined."""
    from . import perplexity as p

    window = p.settle_window(runner, WINDOW)
    tokens = p.text_tokens(runner.processor, "\n".join(row["page"] for row in rows))
    if not sliding:
        return p.negative_log_likelihoods(runner, p.disjoint_windows(tokens, window))
    runner.settings["stride"] = stride = int(runner.settings["stride"]) or window // 2
    return p.negative_log_likelihoods(runner, p.sliding_windows(tokens, window, stride))


def predict_pages(runner: Runner, rows: Sequence[Row]) -> list[float]:
    """-ln P of each page, put together from its windows."""
    from . import perplexity as p

    window = p.settle_window(runner)
    prefix = getattr(runner.processor, "bos_token_id", None)
    prefix = getattr(runner.processor, "eos_token_id", None) if prefix is None else prefix
    if prefix is None:
        raise ValueError("word perplexity needs a tokenizer with a beginning or end token: the first word follows it")
    features: list[Feature] = []
    for number, row in enumerate(rows):
        tokens = p.text_tokens(runner.processor, detokenize(row["page"]), special=False)
        features += [{**feature, "_row": number} for feature in p.rolling_windows(tokens, window, prefix)]
    total = [0.0] * len(rows)
    for feature, (nll, _) in zip(features, p.negative_log_likelihoods(runner, features), strict=True):
        total[feature["_row"]] += nll
    return total


def predict_masked(runner: Runner, rows: Sequence[Row]) -> list[tuple[float, int, int]]:
    """(-ln P, tokens found, tokens hidden) of each block; the hidden ones are drawn from `MASK_SEED`."""
    import torch

    from . import perplexity as p
    from .blocks import token_masker
    from .data import collate

    window = p.settle_window(runner, 512)
    mask = token_masker(runner.processor)
    generator = torch.Generator().manual_seed(MASK_SEED)
    features: list[Feature] = []
    for block in encode_masked(rows, runner.processor, window):
        batch = mask(collate([block], runner.processor.pad_token_id), generator)
        features.append({name: tensor[0].tolist() for name, tensor in batch.items()})
    return runner.map(features, _found)


def _found(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[tuple[float, int, int]]:
    from torch.nn import functional as F

    from ..models.dense import logits
    from .data import IGNORED

    results = []
    for scores_LV, labels_L in zip(logits(model, {k: v for k, v in batch.items() if k != "labels"}), batch["labels"]):
        hidden_L = labels_L != IGNORED
        scores_HV, labels_H = scores_LV[hidden_L].float(), labels_L[hidden_L]
        loss = float(F.cross_entropy(scores_HV, labels_H, reduction="sum"))
        results.append((loss, int((scores_HV.argmax(-1) == labels_H).sum()), len(labels_H)))
    return results


def score_tokens(predictions: Sequence[tuple[float, int]], references: Sequence[str]) -> dict[str, float]:
    """exp of the mean over all scored tokens, whatever windows they were in."""
    from .perplexity import perplexity

    return {"perplexity": perplexity(sum(nll for nll, _ in predictions), sum(count for _, count in predictions))}


def score_pages(predictions: Sequence[float], references: Sequence[str]) -> dict[str, float]:
    """Perplexity per word and per byte, and bits per byte, of the original pages."""
    from .perplexity import perplexity

    nll, size = math.fsum(predictions), sum(len(page.encode("utf-8")) for page in references)
    return {
        "word_perplexity": perplexity(nll, sum(count_words(page) for page in references)),
        "byte_perplexity": perplexity(nll, size),
        "bits_per_byte": nll / size / math.log(2),
    }


def score_masked(predictions: Sequence[tuple[float, int, int]], references: Sequence[str]) -> dict[str, float]:
    """Share of the hidden tokens that got the largest score, and their mean -ln P."""
    hidden = sum(count for _, _, count in predictions)
    if not hidden:
        raise ValueError("no token was hidden: the text is too short")
    return {
        "masked_accuracy": sum(right for _, right, _ in predictions) / hidden,
        "masked_loss": math.fsum(nll for nll, _, _ in predictions) / hidden,
    }


def _page(row: Row) -> str:
    page: str = row["page"]
    return page


_OPT = FinetuneDefaults(
    15, 6e-4, 16, WINDOW, "GPUSQ-TLM, table 6 (OPT and GPT of 125M; larger ones take lower rates); the length is ours",
    devices=32,
)  # fmt: skip
_MASKED = FinetuneDefaults(
    3, 5e-5, 4, 512, "Antunes 2021 (MSc thesis), table 4.3 (BERT on WikiText while pruned); the epochs are ours"
)


def _tasks(size: int) -> tuple[Task, ...]:
    def task(
        name: str, metric: str, kind: Kind, predict: Any, score: Any, source: str, settings: dict[str, Setting],
        version: int = 1,
    ) -> Task:  # fmt: skip
        masked = kind == "masked-lm"
        return Task(
            name=f"wikitext{size}/{name}",
            version=version,
            source=f"{SOURCE}; {source}",
            kind=kind,
            num_labels=None,
            splits=SPLITS,
            sizes=SIZES[size],
            metric=metric,
            higher_is_better=masked,
            rows=Wikitext(size).rows,
            encode=encode_masked if masked else encode_causal,
            score=score,
            predict=predict,
            reference=_page,
            make_augment=make_masker if masked else None,
            settings=settings,
            opposite=("masked_loss",),
            finetune=_MASKED if masked else _OPT,
        )

    window: dict[str, Setting] = {"window": 0}
    harness = "protocol: lm-evaluation-harness, task wikitext, version 2"
    per_token = "protocol: per token, disjoint windows"
    sliding = "protocol: per token, sliding windows (transformers, Perplexity of fixed-length models)"
    masking = "protocol: Devlin et al. 2019, section 3.1"
    return (
        task("token", "perplexity", "causal-lm", predict_tokens, score_tokens, per_token, window),
        task(
            "sliding", "perplexity", "causal-lm", partial(predict_tokens, sliding=True), score_tokens, sliding,
            {**window, "stride": 0},
        ),
        task("word", "word_perplexity", "causal-lm", predict_pages, score_pages, harness, window, version=2),
        task("masked", "masked_accuracy", "masked-lm", predict_masked, score_masked, masking, window),
    )  # fmt: skip


LANGUAGE: tuple[Task, ...] = _tasks(2) + _tasks(103)
