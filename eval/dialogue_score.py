"""What replies are worth: BLEU, TER, Hits@k, perplexity and BERTScore, by the kept libraries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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


def bert_score_f1(
    texts: Sequence[str], references: Sequence[str], settings: dict[str, Setting], device: str, batch_size: int
) -> list[float]:
    """F1 of BERTScore per pair, or nothing where ``bertscore_model`` is empty. The setting becomes the folder's name.

    Raises:
        ValueError: the library is not installed, the folder or the layer is missing.
    """
    source = str(settings["bertscore_model"])
    if not source:
        return []
    folder, layer = Path(source).expanduser(), int(settings["bertscore_layer"])
    if not (folder / "config.json").is_file():
        raise ValueError(f"setting bertscore_model: expected a folder with an encoder (config.json), found {source!r}")
    library: Any = _import_bert_score()
    layer = layer or library.utils.model2layers.get(folder.name, 0)
    if layer < 1:
        raise ValueError(
            f"bert-score knows no layer for a model named {folder.name!r}: give it, bertscore_layer=9 for BERT-base"
        )
    settings.update(bertscore_model=folder.resolve().name, bertscore_layer=layer)
    *_, f1 = library.score(
        list(texts), list(references), model_type=str(folder), num_layers=layer, device=device, batch_size=batch_size
    )
    return [float(value) for value in f1]


def _import_bert_score() -> Any:
    try:
        import bert_score
        import bert_score.utils
    except ImportError as error:
        raise ValueError(
            "setting bertscore_model needs the library bert-score: pip install bert-score, or leave the setting empty"
        ) from error
    return bert_score


def _sacrebleu() -> tuple[Any, Any]:
    from sacrebleu.metrics import BLEU, TER

    return BLEU(), TER()


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
