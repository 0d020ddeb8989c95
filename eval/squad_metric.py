"""Exact match and F1 of SQuAD 1.1 (Rajpurkar et al. 2016) and 2.0 (Rajpurkar et al. 2018), after the rules of the
official scorers: texts are compared without case, punctuation, articles and extra spaces; the best reference counts.

All values are fractions. Answers to unanswerable questions (2.0) are empty texts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Answer:
    """What a model says to one question of SQuAD 2.0.

    Args:
        text: the answer as given; empty where the model holds the question for unanswerable.
        best: the best answer that is not empty.
        null_margin: score of no answer minus score of ``best``; ``text`` is empty above some threshold of this.
    """

    text: str
    best: str
    null_margin: float


def normalize(text: str) -> str:
    """Lower case; without ASCII punctuation, then without the words a, an and the, then with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, reference: str) -> float:
    """1.0 when both texts are the same after `normalize`, else 0.0."""
    return float(normalize(prediction) == normalize(reference))


def f1(prediction: str, reference: str) -> float:
    """F1 of the two bags of words after `normalize`; 0.0 where they share none."""
    predicted, wanted = normalize(prediction).split(), normalize(reference).split()
    same = (Counter(predicted) & Counter(wanted)).total()
    return 2 * same / (len(predicted) + len(wanted)) if same else 0.0


def f1_squad2(prediction: str, reference: str) -> float:
    """`f1`, but two texts that `normalize` leaves nothing of agree: no answer, and rightly so."""
    return max(f1(prediction, reference), float(normalize(prediction) == normalize(reference) == ""))


def references_squad2(references: Sequence[str]) -> list[str]:
    """The references that `normalize` leaves something of; the empty text where none remains: no answer."""
    return [reference for reference in references if normalize(reference)] or [""]


def best_of(metric: Callable[[str, str], float], prediction: str, references: Sequence[str]) -> float:
    """The metric against the best reference."""
    return max(metric(prediction, reference) for reference in references)


def score_squad1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means over the questions.

    Args:
        predictions: one text per question.
        references: the texts of all right answers to each.
    """
    return {
        "f1": _mean([best_of(f1, *pair) for pair in zip(predictions, references, strict=True)]),
        "exact_match": _mean([best_of(exact_match, *pair) for pair in zip(predictions, references, strict=True)]),
    }


def score_squad2(predictions: Sequence[Answer], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The means over all questions, over those with and those without an answer, and with the best threshold.

    Returns:
        ``f1``, ``exact_match``; ``has_answer_*`` and ``no_answer_accuracy`` where there are such questions;
        ``oracle_f1``, ``oracle_exact_match``: with the threshold of ``null_margin`` chosen on these very questions
        (the official scorer's best_f1, best_exact), ``oracle_*_threshold`` that threshold. They are upper bounds.
    """
    values: dict[str, float] = {}
    golds = [references_squad2(wanted) for wanted in references]
    answerable = [gold != [""] for gold in golds]
    margins = [answer.null_margin for answer in predictions]
    for name, metric in (("f1", f1_squad2), ("exact_match", exact_match)):
        given = [best_of(metric, answer.text, gold) for answer, gold in zip(predictions, golds, strict=True)]
        best = [best_of(metric, answer.best, gold) for answer, gold in zip(predictions, golds, strict=True)]
        values[name] = _mean(given)
        if any(answerable):
            values[f"has_answer_{name}"] = _mean([v for v, has in zip(given, answerable, strict=True) if has])
        if not all(answerable):
            values["no_answer_accuracy"] = _mean([v for v, has in zip(given, answerable, strict=True) if not has])
        values[f"oracle_{name}"], values[f"oracle_{name}_threshold"] = best_threshold(margins, best, answerable)
    return values


def best_threshold(
    margins: Sequence[float], values: Sequence[float], answerable: Sequence[bool]
) -> tuple[float, float]:
    """The threshold on the margin of no answer that gives the highest mean, and that mean.

    A question is answered when its margin is at most the threshold. Of equal means the lowest threshold is taken.

    Args:
        margins: score of no answer minus score of the best answer, per question; finite.
        values: the metric of the best answer; 0 for a wrong one.
        answerable: whether the question has an answer.

    Returns:
        The mean and the threshold: one of the margins, or 1 below the lowest where it is best never to answer.
    """
    total = len(margins)
    gained = float(total - sum(answerable))  # never answering is right for every unanswerable question
    mean, threshold = gained / total, min(margins) - 1.0
    order = sorted(range(total), key=lambda index: margins[index])
    for place, index in enumerate(order):
        gained += values[index] - (0.0 if answerable[index] else 1.0)
        tied = place + 1 < total and margins[order[place + 1]] == margins[index]
        if not tied and gained / total > mean + 1e-12:
            mean, threshold = gained / total, margins[index]
    return mean, threshold


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
