"""Wanda against the public code's results (vectors/wanda.json)."""

import json
from pathlib import Path

import pytest
import torch
from squeezoo.compress.masks import Pattern
from squeezoo.compress.rules import Unstructured
from squeezoo.compress.wanda import InputSquares, wanda_mask

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "wanda.json").read_text())
WEIGHT_OI = torch.tensor(VECTOR["weight"])


def scaler():
    squares = InputSquares(16)
    for x_TI in torch.tensor(VECTOR["calib"]).flatten(1, 2):
        squares.add_(x_TI, 1)
    return squares.scaler_I


def test_scaler_and_metric_equal_the_public_code():
    torch.testing.assert_close(scaler(), torch.tensor(VECTOR["scaler_row"]), rtol=1e-5, atol=1e-6)
    metric_OI = WEIGHT_OI.abs() * scaler().sqrt()
    torch.testing.assert_close(metric_OI, torch.tensor(VECTOR["metric"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_masks_equal_the_public_code(pattern):
    expected_OI = torch.tensor(VECTOR[f"mask_{pattern.replace(':', '_')}"]).bool()
    assert wanda_mask(WEIGHT_OI, scaler(), Pattern.parse(pattern)).equal(expected_OI)


def test_unstructured_mask_is_per_row_and_equals_the_public_code():
    expected_OI = torch.tensor(VECTOR["mask_unstructured_50_per_row"]).bool()
    mask_OI = wanda_mask(WEIGHT_OI, scaler(), Unstructured(zeros=0.5))
    assert mask_OI.equal(expected_OI)
    assert mask_OI.sum(1).tolist() == [8] * 6


def test_an_input_that_is_always_zero_goes_first():
    """Metric 0: the largest weight of a group is pruned when nothing comes in through it."""
    mask_OI = wanda_mask(torch.tensor([[9.0, 1.0, 2.0, 3.0]]), torch.tensor([0.0, 1, 1, 1]), Pattern(2, 4))
    assert mask_OI.tolist() == [[False, False, True, True]]


def test_a_scaler_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\[16\], found \[12\]"):
        wanda_mask(WEIGHT_OI, torch.ones(12), Pattern(2, 4))
