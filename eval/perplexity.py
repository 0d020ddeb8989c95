"""The negative log-likelihood of a text, cut into windows that a causal language model can read.

Features here hold ``labels`` that are already shifted: the label of a position is the token that the model has to give
the probability of there, -100 where none is scored.
Legend: B windows, L tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..models.dense import logits
from .data import IGNORED
from .runner import Runner
from .task import Feature

# Floats of one batch of scores, 1 GiB: a batch of long windows times a vocabulary of 50,000 would fill any machine.
_SCORES = 2**28


def context_length(model: nn.Module, processor: Any = None) -> int | None:
    """Tokens that the model can read at once; None where neither it nor its tokenizer says.

    The fields and their order are those of lm-evaluation-harness (``resolve_max_length``).
    """
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    length = getattr(processor, "model_max_length", None)
    return int(length) if isinstance(length, int) and length < 10**9 else None


def settle_window(runner: Runner, most: int | None = None) -> int:
    """The window in tokens: the setting ``window``; where that is 0 the model's context, but at most ``most``.

    It is written into the runner's settings.

    Raises:
        ValueError: it is below 2 or above the model's context, or nothing says how long it is.
    """
    context = context_length(runner.model, runner.processor)
    window = int(runner.settings["window"])
    if window == 0:
        if context is None and most is None:
            raise ValueError(f"{type(runner.model).__name__} does not say its context: give the setting window")
        window = min(length for length in (context, most) if length is not None)
    if window < 2 or (context is not None and window > context):
        limit = "more" if context is None else f"{context}, the context of {type(runner.model).__name__}"
        raise ValueError(f"setting window must be 0 (the model's own) or 2 to {limit}; found {window}")
    runner.settings["window"] = window
    return window


def text_tokens(processor: Any, text: str, *, special: bool = True) -> list[int]:
    """The token ids of a whole text.

    Args:
        special: with those that this tokenizer adds by itself: a beginning token (OPT, Llama) or none (GPT-2).

    Raises:
        ValueError: there is no tokenizer.
    """
    if processor is None or not callable(processor):
        raise ValueError(f"a language task needs the model's tokenizer, found {type(processor).__name__}")
    # verbose: no warning that the text is longer than the model's context, it is cut next
    ids: list[int] = processor(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def disjoint_windows(tokens: Sequence[int], window: int) -> list[Feature]:
    """Windows side by side, each without a look at the one before: all but the first token of each are scored.

    The last window may be shorter. A last window of one token has nothing to score and is left out.
    """
    starts = range(0, len(tokens), window)
    pieces = [tokens[start : start + window] for start in starts]
    return [_feature(piece[:-1], piece[1:]) for piece in pieces if len(piece) > 1]


def sliding_windows(tokens: Sequence[int], window: int, stride: int) -> list[Feature]:
    """Overlapping windows that advance by ``stride``: each scores the tokens that no window before it has scored.

    So every token but the first of the text is scored once, with at least ``window - stride`` tokens of context (less
    at the start). The scheme of the transformers documentation, "Perplexity of fixed-length models".

    Raises:
        ValueError: a stride outside 1 to ``window`` - 1.
    """
    if not 1 <= stride < window:
        raise ValueError(f"setting stride must be 1 to {window - 1}, below the window of {window}; found {stride}")
    features = []
    done = 1  # the first token has nothing before it
    start = 0
    while done < len(tokens):
        end = min(start + window, len(tokens))
        piece = tokens[start:end]
        features.append(_feature(piece[:-1], piece[1:], end - done))
        done = end
        start += stride
    return features


def rolling_windows(tokens: Sequence[int], window: int, prefix: int) -> list[Feature]:
    """Windows of lm-evaluation-harness's ``loglikelihood_rolling`` with a context of one token.

    Every token is scored once. The first window begins with ``prefix`` and scores its ``window`` tokens; each further
    one sees the last token of the one before and scores the next ``window`` tokens; the last one, which has fewer left,
    is filled up with older tokens as context so that it too is ``window`` long.
    """
    first = tokens[:window]
    features = [_feature([prefix, *first[:-1]], first)] if first else []
    done = len(first)
    while done < len(tokens):
        end = min(done + window, len(tokens))
        features.append(_feature(tokens[end - window - 1 : end - 1], tokens[end - window : end], end - done))
        done = end
    return features


def _feature(inputs: Sequence[int], targets: Sequence[int], scored: int | None = None) -> Feature:
    ignored = 0 if scored is None else len(targets) - scored
    return {
        "input_ids": list(inputs),
        "attention_mask": [1] * len(inputs),
        "labels": [IGNORED] * ignored + list(targets[ignored:]),
    }


def negative_log_likelihoods(runner: Runner, features: Sequence[Feature]) -> list[tuple[float, int]]:
    """For each window the sum of -ln P over its scored tokens, and how many these are."""
    return runner.map(features, _nll, max_tokens=max(1, _SCORES // _vocabulary(runner.model)))


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0]) if model.get_output_embeddings() is not None else 50_000


def _nll(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[tuple[float, int]]:
    scores_BLV = logits(model, {name: batch[name] for name in ("input_ids", "attention_mask")})
    found = []
    for scores_LV, labels_L in zip(scores_BLV, batch["labels"], strict=True):  # one by one: float32 copies are large
        loss_L = nn.functional.cross_entropy(scores_LV.float(), labels_L, ignore_index=IGNORED, reduction="none")
        found.append((float(loss_L.double().sum()), int((labels_L != IGNORED).sum())))
    return found


def perplexity(nll: float, count: int) -> float:
    """exp(nll / count).

    Raises:
        ValueError: nothing was scored, or the likelihood is not finite or too small for a float.
    """
    if count < 1:
        raise ValueError("no token was scored: the text is too short")
    if not math.isfinite(nll) or nll / count > 700:
        raise ValueError(f"the model gives a log-likelihood of {-nll:g} for {count} units: it has no perplexity")
    return math.exp(nll / count)
