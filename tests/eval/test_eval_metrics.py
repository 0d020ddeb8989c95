"""Metrics against the reference vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from squeezoo.eval import metrics

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
def test_against_vectors(name: str) -> None:
    """Expected: vectors/metrics.json, made with scikit-learn, 8 significant digits."""
    value = getattr(metrics, name)(VECTORS["y_pred"], VECTORS["y_true"])
    assert value == pytest.approx(VECTORS[name], rel=1e-6)
    assert type(value) is float


def test_f1_counts_class_one_only() -> None:
    """By hand: precision 1/2 and recall 1 of class 1 give 2/3, where class 0 would give 4/5; mirrored, 4/5."""
    assert metrics.f1([1, 1, 0, 0], [1, 0, 0, 0]) == pytest.approx(2 / 3)
    assert metrics.f1([0, 0, 1, 1], [0, 1, 1, 1]) == pytest.approx(4 / 5)


def test_degenerate_inputs_are_finite() -> None:
    """scikit-learn's documented limits: nothing predicted and nothing present gives F1 0, a constant side MCC 0."""
    assert metrics.f1([0, 0], [0, 0]) == 0.0
    assert metrics.matthews([1, 1], [0, 1]) == 0.0
