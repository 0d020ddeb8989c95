"""Unstructured masks against a full stable sort, on random scores with many ties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezoo.compress.unstructured import global_masks, row_mask, unstructured_mask


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 9),
    zeros=st.floats(0, 1),
    levels=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_the_largest_are_kept_and_ties_go_to_the_lower_flat_index(rows, columns, zeros, levels, seed):
    """ALGORITHMS B.4: round((1 - zeros) * numel) by (-score, flat index)."""
    score_OI = torch.randint(levels, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    keep = round((1 - zeros) * score_OI.numel())
    expected = torch.zeros(score_OI.numel(), dtype=torch.bool)
    expected[score_OI.flatten().argsort(descending=True, stable=True)[:keep]] = True
    assert unstructured_mask(score_OI, zeros).equal(expected.view(rows, columns))


def test_one_threshold_over_several_matrices():
    """70% of 10 + 20 weights: 9 are kept, wherever they are."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(2, 5, generator=generator), torch.rand(5, 4, generator=generator) * 3]
    masks = global_masks(scores, 0.7)
    assert [mask.shape for mask in masks] == [(2, 5), (5, 4)]
    assert sum(int(mask.sum()) for mask in masks) == 9
    kept = torch.cat([score[mask] for score, mask in zip(scores, masks, strict=True)])
    pruned = torch.cat([score[~mask] for score, mask in zip(scores, masks, strict=True)])
    assert kept.min() > pruned.max()
    assert global_masks([], 0.5) == []


def test_rows_lose_the_floor_of_the_share_and_ties_at_the_lower_index_first():
    """5 x 0.5 = 2.5: two go; as torch.sort(stable) in the public code of Wanda."""
    mask_OI = row_mask(torch.tensor([[1.0, 1, 1, 1, 1], [5, 4, 3, 2, 1]]), 0.5)
    assert mask_OI.tolist() == [[False, False, True, True, True], [True, True, True, False, False]]


@pytest.mark.parametrize("make", [unstructured_mask, row_mask])
def test_bad_input_is_named(make):
    with pytest.raises(ValueError, match="between 0 and 1, found 50"):
        make(torch.ones(2, 2), 50)
    with pytest.raises(ValueError, match="NaN"):
        make(torch.tensor([[1.0, torch.nan]]), 0.5)
