"""Numbers as people read them. Rounding never flatters: a speed-up of 0.997 does not become 1.00x."""

from __future__ import annotations

import math

from ..eval.ratio import speed_up
from ..eval.task import Score

__all__ = [
    "PERCENT", "deviation", "difference", "duration", "metric_name", "milliseconds", "shown", "size", "speed_up",
    "spread", "value",
]  # fmt: skip

# Metrics whose fraction people read as a percentage; correlations, BLEU, perplexity and the rest stay as they are.
PERCENT = frozenset({
    "accuracy", "f1", "exact_match", "precision", "recall", "top1", "top5", "wer", "cer", "token_accuracy",
    "masked_accuracy",
})  # fmt: skip


def metric_name(metric: str) -> str:
    """``exact_match`` -> ``exact match``; ``f1`` -> ``F1``."""
    return {"f1": "F1", "wer": "WER", "cer": "CER"}.get(metric, metric.replace("_", " "))


def value(score: Score) -> str:
    """``91.40 %`` or ``0.521`` or ``12.3``."""
    return shown(score.metric, score.value)


def shown(metric: str, amount: float) -> str:
    """An amount of a metric as `value` writes it."""
    return f"{amount:.2%}".replace("%", " %") if metric in PERCENT else f"{amount:.4g}"


def deviation(metric: str, amount: float) -> str:
    """A spread without sign: ``0.82 points`` for percentages, else in the metric's own unit."""
    return f"{100 * amount:.2f} points" if metric in PERCENT else f"{amount:.3g}"


def difference(score: Score, reference: Score) -> str:
    """Signed distance to ``reference``: ``-0.34 points`` for percentages, else in the metric's own unit."""
    gap = score.value - reference.value
    return f"{100 * gap:+.2f} points" if score.metric in PERCENT else f"{gap:+.3g}"


def milliseconds(ms: float) -> str:
    """Three significant digits: ``0.123``, ``12.3``, ``1,230``."""
    if ms <= 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(ms)))
    return f"{ms:,.{decimals}f}"


def size(count: int) -> str:
    """Decimal units: ``812 B``, ``12.3 kB``, ``6.64 MB``, ``1.20 GB``."""
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 999.5:
            break
        amount, unit = amount / 1000, larger
    return f"{count} B" if unit == "B" else f"{amount:.3g} {unit}"


def duration(seconds: float) -> str:
    """``0.4 s``, ``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def spread(ratios: tuple[float, float]) -> str:
    """``2.20 to 2.42``."""
    return f"{ratios[0]:.2f} to {ratios[1]:.2f}"
