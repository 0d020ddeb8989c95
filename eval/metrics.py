"""Metrics of classes, values and tags by scikit-learn, SciPy and seqeval, with the house's types; all fractions."""

from __future__ import annotations

import math
from collections.abc import Sequence


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Share of equal class ids; ``predictions`` and ``labels`` are [n]."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def f1(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Binary F1 of class 1; 0 when class 1 is neither predicted nor present."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="binary", zero_division=0))


def precision(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Binary precision of class 1; 0 when it is never predicted."""
    from sklearn.metrics import precision_score

    return float(precision_score(labels, predictions, average="binary", zero_division=0))


def recall(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Binary recall of class 1; 0 when it is not present."""
    from sklearn.metrics import recall_score

    return float(recall_score(labels, predictions, average="binary", zero_division=0))


def matthews(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Matthews correlation coefficient (Matthews 1975), -1 to 1; 0 when one side is constant."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: Sequence[float], values: Sequence[float]) -> float:
    """Pearson's correlation, -1 to 1; 0 when one side is constant."""
    from scipy.stats import pearsonr

    return 0.0 if _constant(predictions, values) else float(pearsonr(predictions, values)[0])


def spearman(predictions: Sequence[float], values: Sequence[float]) -> float:
    """Spearman's rank correlation with mean ranks for ties, -1 to 1; 0 when one side is constant."""
    from scipy.stats import spearmanr

    return 0.0 if _constant(predictions, values) else float(spearmanr(predictions, values)[0])


def _constant(*sides: Sequence[float]) -> bool:
    return any(len(set(side)) < 2 for side in sides)


def entities(predictions: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]) -> dict[str, float]:
    """Entity F1, precision and recall (micro, an entity counts when type and both ends are right) and token accuracy.

    Args:
        predictions, tags: IOB2 tags of each sentence, as many in one as in the other. The rules are seqeval's default,
            those of the script ``conlleval``: an I- tag without its B- begins an entity.
    """
    import warnings

    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    truth, found = [list(row) for row in tags], [list(row) for row in predictions]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a metric that is 0 by division by 0
        return {
            "f1": float(f1_score(truth, found, zero_division=0)),
            "precision": float(precision_score(truth, found, zero_division=0)),
            "recall": float(recall_score(truth, found, zero_division=0)),
            "token_accuracy": float(accuracy_score(truth, found)),
        }


def geometric_mean(values: Sequence[float]) -> float:
    """exp of the mean logarithm; 0 when a value is 0.

    Raises:
        ValueError: no values, or a negative one.
    """
    if not values or min(values) < 0:
        raise ValueError(f"a geometric mean needs values of at least 0, found {list(values)}")
    return 0.0 if min(values) == 0 else math.exp(math.fsum(math.log(value) for value in values) / len(values))
