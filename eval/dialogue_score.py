"""What replies are worth: BLEU, TER, Hits@k and perplexity, by the kept libraries, and the mean of BERTScores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .task import Setting

HITS = (1, 5, 10)


@dataclass(frozen=True)
class Reply:
    """What a model makes of one reply.

    Args:
        text: what it writes.
        rank: place of the right reply among its candidates, from 1.
        log_likelihood: natural logarithm of the probability of the right reply, end token included.
        tokens: number of tokens of that.
        bertscore: F1 of ``text`` and the right reply, or None where it was not asked for.
    """

    text: str
    rank: int
    log_likelihood: float
    tokens: int
    bertscore: float | None = None


def score(predictions: Sequence[Sequence[Reply]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """All replies of all dialogues together.

    Args:
        predictions: per dialogue, per reply.
        references: the right replies, likewise.

    Returns:
        ``bleu``, ``hits@1``, ``hits@5``, ``hits@10``, ``ter``, ``perplexity``, ``word_perplexity``, and ``bertscore``
        where the replies have one; BLEU and TER as fractions.
    """
    replies, right = [], []
    for found, wanted in zip(predictions, references, strict=True):
        for reply, text in zip(found, wanted, strict=True):
            replies.append(reply)
            right.append(text)
    bleu, ter = _sacrebleu()
    texts = [reply.text for reply in replies]
    total = -sum(reply.log_likelihood for reply in replies)
    values = {
        "bleu": bleu.corpus_score(texts, [right]).score / 100,
        **{f"hits@{k}": sum(reply.rank <= k for reply in replies) / len(replies) for k in HITS},
        "ter": ter.corpus_score(texts, [right]).score / 100,
        "perplexity": _exp(total / sum(reply.tokens for reply in replies)),
        "word_perplexity": _exp(total / sum(len(text.split()) for text in right)),
    }
    similar = [reply.bertscore for reply in replies if reply.bertscore is not None]
    if len(similar) == len(replies):
        values["bertscore"] = sum(similar) / len(similar)
    return values


def signatures() -> dict[str, Setting]:
    """Sacrebleu's descriptions of what it computes, for the settings of a score."""
    from sacrebleu import __version__

    bleu = f"sacrebleu {__version__}: 13a tokens, exponential smoothing, case kept"
    return {"bleu": bleu, "ter": f"sacrebleu {__version__}: not normalized, case ignored"}


def _sacrebleu() -> tuple[Any, Any]:
    from sacrebleu.metrics import BLEU, TER

    return BLEU(), TER()


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
