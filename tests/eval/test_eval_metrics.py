"""Metrics against the reference vectors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from squeezoo.eval import metrics

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["accuracy", "f1", "precision", "recall", "matthews"])
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
    assert metrics.precision([0, 0], [1, 0]) == metrics.recall([1, 0], [0, 0]) == 0.0
    assert metrics.pearson([2.0, 2.0], [1.0, 3.0]) == metrics.spearman([1.0, 3.0], [2.0, 2.0]) == 0.0


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlations_against_vectors(name: str) -> None:
    """Expected: vectors/metrics.json, made with SciPy; one value occurs twice, so ranks are tied."""
    value = getattr(metrics, name)(VECTORS["a"], VECTORS["b"])
    assert value == pytest.approx(VECTORS[name], rel=1e-6)
    assert type(value) is float


@pytest.mark.parametrize("model", list(VECTORS["glue_rows"]))
def test_geometric_mean_against_vectors(model: str) -> None:
    """Expected: vectors/metrics.json; rows of NxMTransformer, table 1, whose averages are geometric means."""
    expected = VECTORS["glue_geometric_mean_8_scores"][model]
    assert metrics.geometric_mean(VECTORS["glue_rows"][model]) == pytest.approx(expected, rel=1e-6)


def test_geometric_mean_of_the_odd_ones() -> None:
    """Definition: 0 with a zero, undefined with a negative value or none."""
    assert metrics.geometric_mean([0.0, 0.5]) == 0.0
    for values in ([], [-0.1, 0.5]):
        with pytest.raises(ValueError, match="geometric mean"):
            metrics.geometric_mean(values)
