"""N:M patterns and masks against the reference vectors, a slow reference and exhaustive search."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezoo.compress import masks
from squeezoo.compress.masks import Pattern, check_nm, magnitude_mask, nm_mask, project
from torch import Tensor

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "nm_masks.json").read_text())
GROUP_SIZES = (2, 4, 8, 16, 32, 64, 128, 256)


def slow_mask(score_OI: Tensor, n: int, m: int) -> Tensor:
    """Sort (-score, index) of each group in plain Python and keep the first n."""
    mask = torch.zeros(score_OI.shape, dtype=torch.bool)
    for row, scores in enumerate(score_OI.tolist()):
        for start in range(0, len(scores), m):
            columns = range(start, min(start + m, len(scores)))
            for column in sorted(columns, key=lambda j: (-scores[j], j))[:n]:
                mask[row, column] = True
    return mask


@st.composite
def patterns(draw: st.DrawFn, sizes: tuple[int, ...] = GROUP_SIZES) -> Pattern:
    m = draw(st.sampled_from(sizes))
    return Pattern(draw(st.integers(1, m - 1)), m)


@st.composite
def tied_scores(draw: st.DrawFn) -> tuple[Tensor, Pattern]:
    pattern = draw(patterns((2, 4, 8, 16, 32)))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    levels = draw(st.integers(1, 6))  # few different scores: ties in nearly every group
    seed = draw(st.integers(0, 2**31))
    scores = torch.randint(-levels, levels + 1, (rows, columns), generator=torch.Generator().manual_seed(seed))
    return scores.float(), pattern


def test_two_of_four_masks_match_five_public_implementations() -> None:
    """Expected: nm_masks.json, on which apex, fms-model-optimizer, NM-sparsity, Wanda and numpy agree."""
    w_OI = torch.tensor(VECTORS["weight"])
    expected = torch.tensor(VECTORS["mask_2_4"], dtype=torch.bool)
    assert torch.equal(nm_mask(w_OI.abs(), Pattern(2, 4)), expected)
    assert torch.equal(magnitude_mask(w_OI, Pattern(2, 4)), expected)


@pytest.mark.parametrize("text", sorted(VECTORS["masks_other"]))
def test_other_patterns_match_the_vectors(text: str) -> None:
    """Expected: nm_masks.json, from locuslab/wanda's magnitude loop."""
    expected = torch.tensor(VECTORS["masks_other"][text], dtype=torch.bool)
    assert torch.equal(magnitude_mask(torch.tensor(VECTORS["weight"]), Pattern.parse(text)), expected)


@pytest.mark.parametrize(("kind", "text"), [("ties", "2:4"), ("ragged", "2:4"), ("ragged", "1:4")])
def test_ties_and_ragged_tails_match_the_vectors(kind: str, text: str) -> None:
    """Expected: nm_masks.json, by hand (lower index wins; a tail of r columns keeps min(N, r))."""
    expected = torch.tensor(VECTORS[f"{kind}_mask_{text.replace(':', '_')}"], dtype=torch.bool)
    assert torch.equal(magnitude_mask(torch.tensor(VECTORS[f"{kind}_weight"]), Pattern.parse(text)), expected)


def test_two_of_four_equals_the_exhaustive_search_over_six_patterns() -> None:
    """Expected: ASP's definition (Mishra et al., arXiv:2104.08378), the pattern that keeps the largest sum of |w|."""
    w_OI = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    choices = torch.tensor(sorted(set(itertools.permutations([1.0, 1.0, 0.0, 0.0]))))
    best = (w_OI.abs().view(-1, 4) @ choices.t()).argmax(1)
    assert torch.equal(magnitude_mask(w_OI, Pattern(2, 4)), choices[best].bool().view(w_OI.shape))


@given(tied_scores())
@settings(max_examples=150, deadline=None)
def test_masks_match_a_slow_reference_on_ties_and_ragged_tails(case: tuple[Tensor, Pattern]) -> None:
    """Expected: a stable sort of (-score, index) in plain Python."""
    score_OI, pattern = case
    assert torch.equal(nm_mask(score_OI, pattern), slow_mask(score_OI, pattern.n, pattern.m))
    assert torch.equal(magnitude_mask(score_OI, pattern), slow_mask(score_OI.abs(), pattern.n, pattern.m))


@pytest.mark.parametrize("m", GROUP_SIZES)
def test_every_group_size_keeps_what_a_slow_reference_keeps(m: int) -> None:
    """Expected: a stable sort in plain Python; N of 1, M/2 and M - 1, a ragged tail, many ties."""
    score_OI = torch.randn(5, 2 * m + m // 2 + 1, generator=torch.Generator().manual_seed(m)).mul(8).round()
    for n in sorted({1, m // 2, m - 1}):
        assert torch.equal(nm_mask(score_OI, Pattern(n, m)), slow_mask(score_OI, n, m))


@pytest.mark.parametrize("columns", [64, 61])
@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(3, 8), Pattern(5, 16)], ids=str)
def test_rows_handled_in_chunks_give_the_same_mask(
    pattern: Pattern, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expected: the slow reference, with chunks of 3 rows that do not divide the 10 rows."""
    monkeypatch.setattr(masks, "_CHUNK_ELEMENTS", 3 * columns)
    score_OI = torch.randint(0, 5, (10, columns), generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(nm_mask(score_OI, pattern), slow_mask(score_OI, pattern.n, pattern.m))


def test_all_zero_groups_keep_the_first_n() -> None:
    """Expected: by hand."""
    for pattern in (Pattern(2, 4), Pattern(3, 16)):
        expected = torch.arange(32).remainder(pattern.m) < pattern.n
        assert torch.equal(nm_mask(torch.zeros(3, 32), pattern), expected.expand(3, 32))
        assert torch.equal(nm_mask(torch.tensor([[0.0, -0.0] * 16] * 3), pattern), expected.expand(3, 32))


def test_leading_dimensions_and_strided_inputs_are_kept() -> None:
    """Expected: the mask of the same rows as one contiguous matrix."""
    score = torch.randn(3, 2, 5, 12, generator=torch.Generator().manual_seed(2))
    flat = nm_mask(score.reshape(30, 12), Pattern(1, 4))
    assert torch.equal(nm_mask(score, Pattern(1, 4)), flat.view(3, 2, 5, 12))
    assert torch.equal(nm_mask(score.reshape(30, 12).t().contiguous().t(), Pattern(1, 4)), flat)
    assert torch.equal(nm_mask(score[0, 0, 0], Pattern(1, 4)), flat[0])
    assert nm_mask(torch.empty(0, 8), Pattern(2, 4)).shape == (0, 8)


def test_scores_are_compared_in_float32_or_wider() -> None:
    """Expected: by hand. 1 + 1e-12 exceeds 1 in float64 only; 2^24 + 1 exceeds 2^24 in integers; |-128| is 128."""
    close = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert nm_mask(close, Pattern(1, 2)).tolist() == [[False, True]]
    assert nm_mask(close.float(), Pattern(1, 2)).tolist() == [[True, False]]
    assert nm_mask(torch.tensor([[2**24, 2**24 + 1]]), Pattern(1, 2)).tolist() == [[False, True]]
    assert magnitude_mask(torch.tensor([[127, -128]], dtype=torch.int8), Pattern(1, 2)).tolist() == [[False, True]]
    half = torch.tensor([[0.5, -2.0, 1.0, 0.25]])
    for dtype in (torch.float16, torch.bfloat16):
        assert magnitude_mask(half.to(dtype), Pattern(2, 4)).tolist() == [[False, True, True, False]]


def test_infinite_scores_are_ordered() -> None:
    """Expected: by hand; -inf is the lowest score, and equal infinities keep the lower index."""
    inf = float("inf")
    assert nm_mask(torch.tensor([[-inf, inf, -inf, 0.0]]), Pattern(2, 4)).tolist() == [[False, True, False, True]]
    assert nm_mask(torch.full((1, 16), -inf), Pattern(2, 16))[0].nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("column", [0, 7, 9])
def test_a_nan_score_is_refused(column: int) -> None:
    """Expected: ValueError that counts the NaN, wherever it stands (the tail included)."""
    score = torch.rand(4, 10)
    score[2, column] = float("nan")
    with pytest.raises(ValueError, match="found 1 NaN of 40"):
        nm_mask(score, Pattern(2, 4))
    with pytest.raises(ValueError, match="found 1 NaN of 40"):
        project(score, Pattern(2, 16))


def test_projection_is_the_nearest_matrix_and_idempotent() -> None:
    """Expected: exhaustive search over all supports of two of four (Euclidean distance)."""
    x_OI = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    projected = project(x_OI, Pattern(2, 4))
    distances = []
    for kept in itertools.combinations(range(4), 2):
        lost = torch.ones(4)
        lost[list(kept)] = 0
        distances.append((x_OI.view(-1, 4) * lost).square().sum(1))
    torch.testing.assert_close((x_OI - projected).view(-1, 4).square().sum(1), torch.stack(distances).amin(0))
    assert torch.equal(project(projected, Pattern(2, 4)), projected)
    assert project(torch.tensor([[float("inf"), 1.0]]), Pattern(1, 2)).tolist() == [[float("inf"), 0.0]]


def test_projection_passes_gradient_to_kept_entries_only() -> None:
    """Expected: by hand."""
    x_OI = torch.tensor([[3.0, -4.0, 1.0, 2.0]], requires_grad=True)
    project(x_OI, Pattern(2, 4)).sum().backward()
    assert x_OI.grad is not None
    assert x_OI.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


@given(tied_scores())
@settings(max_examples=80, deadline=None)
def test_check_nm_counts_non_zeros_per_group(case: tuple[Tensor, Pattern]) -> None:
    """Expected: counts in plain Python."""
    w_OI, pattern = case
    groups = [row[j : j + pattern.m] for row in w_OI.tolist() for j in range(0, len(row), pattern.m)]
    assert check_nm(w_OI, pattern) is all(sum(x != 0 for x in group) <= pattern.n for group in groups)
    assert check_nm(project(w_OI, pattern), pattern)


def test_check_nm_sees_the_ragged_tail_and_nan() -> None:
    """Expected: by hand; a NaN is a non-zero, -0.0 is a zero."""
    assert not check_nm(torch.tensor([[0.0, 0, 0, 0, 1, 1, 1]]), Pattern(2, 4))
    assert check_nm(torch.tensor([[1.0, 0, 0, 2, 1, -0.0, 1]]), Pattern(2, 4))
    assert not check_nm(torch.tensor([[float("nan"), 1.0, 1.0, 0.0]]), Pattern(2, 4))
    assert check_nm(torch.tensor([[1, 0, -1, 0]], dtype=torch.int8), Pattern(2, 4))


@given(patterns())
def test_every_valid_pattern_is_read_back(pattern: Pattern) -> None:
    """Expected: str and parse are inverse; density is N / M."""
    assert Pattern.parse(str(pattern)) == pattern
    assert pattern.density == pattern.n / pattern.m


@given(patterns())
def test_a_swapped_pattern_names_the_swap_and_what_to_write(pattern: Pattern) -> None:
    """Expected: NxMTransformer (arXiv:2110.15766) writes 4:2 for what is 2:4 here."""
    with pytest.raises(ValueError, match=f'NxMTransformer writes {pattern.m}:{pattern.n} .* Write "{pattern}"'):
        Pattern.parse(f"{pattern.m}:{pattern.n}")


@given(st.integers(0, 300), st.integers(0, 600))
def test_only_n_below_a_power_of_two_is_accepted(n: int, m: int) -> None:
    """Expected: 1 <= N < M, M one of 2, 4, ..., 256."""
    if m in GROUP_SIZES and 1 <= n < m:
        assert Pattern.parse(f"{n}:{m}") == Pattern(n, m)
    else:
        with pytest.raises(ValueError, match="pattern"):
            Pattern.parse(f"{n}:{m}")


@given(st.text(max_size=8) | st.text(alphabet="1234:x \u0662", max_size=4))
def test_other_text_is_refused_with_what_was_found(text: str) -> None:
    """Expected: only digits, a colon and digits pass; anything else is a ValueError, never another error."""
    if re.fullmatch(r"(1|2|3):4|1:2", text):
        assert str(Pattern.parse(text)) == text
    elif not re.fullmatch(r"[0-9]+:[0-9]+", text):
        with pytest.raises(ValueError, match='expected a sparsity pattern "N:M"'):
            Pattern.parse(text)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("2 : 4", 'write "2:4"'),
        ("4x2", 'write "2:4"'),
        ("02:4", 'write "2:4"'),
        ("7 / 5", "for example"),
        ("", "2:4"),
        ("4:4", "1 <= N < M"),
    ],
)
def test_near_misses_say_what_to_write(text: str, hint: str) -> None:
    """Expected: by hand."""
    with pytest.raises(ValueError, match=hint):
        Pattern.parse(text)


def test_a_pattern_that_is_not_text_is_refused() -> None:
    """Expected: by hand; YAML reads 2:4 without quotes as the number 124."""
    with pytest.raises(ValueError, match=r'expected a sparsity pattern "N:M".*found 124; .*with the quotes'):
        Pattern.parse(124)  # type: ignore[arg-type]
