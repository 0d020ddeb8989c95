"""The compressed form, bit packing and sizes against the reference vectors, plus damaged input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezoo.compress.masks import Pattern, project
from squeezoo.compress.packing import (
    attention_row_bits,
    bits_per_weight,
    compress_nm,
    expand_nm,
    index_bits,
    pack_bits,
    pack_integers,
    packed_bytes,
    paper_bytes,
    unpack_bits,
    unpack_integers,
)
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "vectors"
COMPRESS: dict[str, Any] = json.loads((FOLDER / "compress_2_4.json").read_text())
STORAGE: dict[str, Any] = json.loads((FOLDER / "storage.json").read_text())
P24 = Pattern(2, 4)


@st.composite
def sparse_matrices(draw: st.DrawFn) -> tuple[Tensor, Pattern]:
    m = draw(st.sampled_from((2, 4, 8, 16, 32, 64, 128, 256)))
    pattern = Pattern(draw(st.integers(1, m - 1)), m)
    dtype = draw(st.sampled_from((torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)))
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    w_OI = torch.randint(-3, 4, shape, generator=generator)  # small integers: many groups with fewer than N non-zeros
    return project(w_OI.to(dtype), pattern), pattern


def test_values_and_indices_match_the_vector() -> None:
    """Expected: compress_2_4.json, by hand."""
    w_OI = project(torch.tensor(COMPRESS["weight"]), P24)
    values_OC, indices_OC = compress_nm(w_OI, P24)
    assert torch.equal(values_OC, torch.tensor(COMPRESS["values"]))
    assert indices_OC.dtype == torch.uint8
    assert indices_OC.tolist() == COMPRESS["indices"]
    assert torch.equal(expand_nm(values_OC, indices_OC, P24, w_OI.shape[1]), w_OI)


def test_packed_indices_are_the_nibbles_of_the_vector() -> None:
    """Expected: compress_2_4.json, nibble = idx0 | idx1 << 2; a byte holds two groups, low nibble first."""
    packed_OB = pack_bits(torch.tensor(COMPRESS["indices"], dtype=torch.uint8), 2)
    nibbles = torch.tensor(COMPRESS["nibbles"])
    assert torch.equal(packed_OB.long(), nibbles[:, 0::2] | nibbles[:, 1::2] << 4)


@given(sparse_matrices())
@settings(max_examples=150, deadline=None)
def test_expand_is_the_exact_inverse_of_compress(case: tuple[Tensor, Pattern]) -> None:
    """Expected: the same matrix; indices strictly increasing in each group; zeros at the lowest unused indices."""
    w_OI, pattern = case
    values_OC, indices_OC = compress_nm(w_OI, pattern)
    groups = -(-w_OI.shape[1] // pattern.m)
    assert values_OC.shape == indices_OC.shape == (w_OI.shape[0], groups * pattern.n)
    back = expand_nm(values_OC, indices_OC, pattern, w_OI.shape[1])
    assert back.dtype == w_OI.dtype
    assert torch.equal(back, w_OI)
    for row, kept in zip(w_OI.tolist(), indices_OC.view(-1, groups, pattern.n).tolist()):
        for group, indices in enumerate(kept):
            members = row[group * pattern.m : (group + 1) * pattern.m]
            members += [0] * (pattern.m - len(members))
            nonzero = [j for j, x in enumerate(members) if x != 0]
            unused = [j for j, x in enumerate(members) if x == 0]
            assert indices == sorted(nonzero + unused[: pattern.n - len(nonzero)])


def test_groups_with_few_non_zeros_are_filled_at_the_lowest_unused_indices() -> None:
    """Expected: by hand, the rule of the logical compressed layout."""
    w_OI = torch.tensor([[0.0, 0, 0, 7, 5, 0, 0, 0, 0, 0, 0, 0]])
    values_OC, indices_OC = compress_nm(w_OI, P24)
    assert values_OC.tolist() == [[0, 7, 5, 0, 0, 0]]
    assert indices_OC.tolist() == [[0, 3, 0, 1, 0, 1]]


def test_an_index_points_into_padding_only_when_the_tail_is_shorter_than_n() -> None:
    """Expected: by hand; 5 columns leave a tail of one, 2:4 stores two values for it."""
    values_OC, indices_OC = compress_nm(torch.tensor([[1.0, 0, 0, 2, 3]]), P24)
    assert values_OC.tolist() == [[1, 2, 3, 0]]
    assert indices_OC.tolist() == [[0, 3, 0, 1]]
    assert expand_nm(values_OC, indices_OC, P24, 5).tolist() == [[1, 0, 0, 2, 3]]
    assert compress_nm(torch.tensor([[1.0, 0, 0, 2, 0, 0, 3]]), P24)[1].tolist() == [[0, 3, 0, 2]]


def test_a_matrix_that_is_not_nm_is_refused() -> None:
    """Expected: ValueError that names the pattern, before anything is packed."""
    with pytest.raises(ValueError, match="expected a 2:4 matrix"):
        compress_nm(torch.ones(2, 8), P24)
    with pytest.raises(ValueError, match="expected a matrix"):
        compress_nm(torch.zeros(8), P24)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([[0, 1, 3, 2]], "strictly increasing .* found \\[3, 2\\] in group 1"),
        ([[0, 1, 2, 2]], "strictly increasing .* found \\[2, 2\\] in group 1"),
        ([[0, 1, 2, 4]], "expected indices 0..3 for 2:4, found 4"),
        ([[0, 1]], "of shape \\[out_features, 4\\]"),
    ],
)
def test_damaged_indices_are_refused(indices: list[list[int]], message: str) -> None:
    """Expected: ValueError that says what was expected and found."""
    with pytest.raises(ValueError, match=message):
        expand_nm(torch.ones(1, 4), torch.tensor(indices, dtype=torch.uint8), P24, 8)


@given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 3), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_bits_are_packed_little_endian_and_read_back(bits: int, count: int, rows: int, seed: int) -> None:
    """Expected: each row as one big integer sum(x_i << i * bits), written low byte first."""
    x_OC = torch.randint(0, 1 << bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed_OB = pack_bits(x_OC, bits)
    length = packed_bytes(count, bits)
    expected = [list(sum(x << i * bits for i, x in enumerate(row)).to_bytes(length, "little")) for row in x_OC.tolist()]
    assert packed_OB.dtype == torch.uint8
    assert packed_OB.tolist() == expected
    assert torch.equal(unpack_bits(packed_OB, bits, count), x_OC)


@given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 3), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_signed_integers_are_packed_in_their_width_and_read_back(bits: int, count: int, rows: int, seed: int) -> None:
    """Expected: the same int8 values, in ceil(count * bits / 8) bytes a row; two to a byte with 4 bits, low nibble
    first, an odd last one alone."""
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    q_OC = torch.randint(-half, half, (rows, count), generator=generator).to(torch.int8)
    packed = pack_integers(q_OC, bits)
    assert packed.numel() * packed.element_size() == rows * packed_bytes(count, bits)
    assert torch.equal(unpack_integers(packed, bits, count), q_OC)
    if bits == 4:
        nibbles = [[x + 8 for x in row] + [0] * (count % 2) for row in q_OC.tolist()]
        assert packed.tolist() == [[low | high << 4 for low, high in zip(row[::2], row[1::2])] for row in nibbles]


def test_integers_that_do_not_fit_are_refused() -> None:
    """Expected: ValueError that says what was expected and found."""
    with pytest.raises(ValueError, match="values -8 to 7 for 4 bits, found -9 to 7"):
        pack_integers(torch.tensor([[-9, 7]], dtype=torch.int8), 4)
    with pytest.raises(ValueError, match=r"expected int8 values to pack, found torch\.int16"):
        pack_integers(torch.zeros(4, dtype=torch.int16), 4)
    with pytest.raises(ValueError, match="int8 rows of 3 values"):
        unpack_integers(torch.zeros((1, 2), dtype=torch.int8), 8, 3)


def test_packing_keeps_leading_dimensions() -> None:
    """Expected: rows are packed one by one, whatever stands before them."""
    x = torch.randint(0, 8, (2, 3, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(pack_bits(x, 3), pack_bits(x.view(6, 5), 3).view(2, 3, 2))
    assert torch.equal(unpack_bits(pack_bits(x[0, 0], 3), 3, 5), x[0, 0])


def test_wrong_input_to_the_bit_packer_is_refused() -> None:
    """Expected: ValueError that says what was expected and found."""
    with pytest.raises(ValueError, match="values below 4 for 2 bits, found 4"):
        pack_bits(torch.tensor([4], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="expected 1 to 8 bits per value, found 9"):
        pack_bits(torch.zeros(4, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match=r"expected uint8 values to pack, found torch\.int64"):
        pack_bits(torch.zeros(4, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match="rows of 3 bytes for 12 values of 2 bits"):
        unpack_bits(torch.zeros((1, 2), dtype=torch.uint8), 2, 12)


@pytest.mark.parametrize("text", sorted(STORAGE["per_pattern"]))
def test_bits_per_weight_match_the_vector(text: str) -> None:
    """Expected: storage.json, hand-derived integer arithmetic."""
    pattern, expected = Pattern.parse(text), STORAGE["per_pattern"][text]
    assert index_bits(pattern) == expected["index_bits"]
    group = pattern.m * bits_per_weight(pattern, 0, "combinatorial")
    assert group == expected["comb_bits_per_group"]
    for bits in (4, 8, 16):
        assert bits_per_weight(pattern, bits) == expected[f"bits_per_weight_{bits}b"]
        assert bits_per_weight(pattern, bits, "combinatorial") == expected[f"bits_per_weight_{bits}b_comb"]


def test_ratios_and_savings_match_the_vector() -> None:
    """Expected: storage.json and Deep Compression's savings (1.6, 1.33, 6.4, 10.67, 16 without indices)."""
    fp32, fp16, int8, int4 = (bits_per_weight(None, bits) for bits in (32, 16, 8, 4))
    sparse16, sparse8, sparse4 = (bits_per_weight(P24, bits) for bits in (16, 8, 4))
    assert sparse16 / fp16 == STORAGE["fp16_2_4_vs_fp16"]
    assert sparse8 / fp16 == STORAGE["int8_2_4_vs_fp16"]
    assert sparse8 / int8 == STORAGE["int8_2_4_vs_int8"]
    assert sparse4 / fp16 == STORAGE["int4_2_4_vs_fp16"]
    assert sparse4 / int4 == STORAGE["int4_2_4_vs_int4"]
    assert bits_per_weight(P24, 4, "pairs") / fp16 == STORAGE["int4_pairwise_4_8_vs_fp16"]
    savings = STORAGE["savings"]
    assert int8 / sparse8 == pytest.approx(savings["int8_sparse_vs_int8"], rel=1e-7)
    assert int4 / sparse4 == pytest.approx(savings["int4_sparse_vs_int4"], rel=1e-7)
    assert fp32 / sparse8 == pytest.approx(savings["int8_sparse_vs_fp32"], rel=1e-7)
    assert fp32 / sparse4 == pytest.approx(savings["int4_sparse_vs_fp32"], rel=1e-7)
    assert fp32 / int4 / P24.density == savings["nominal_16x"]


def test_bert_base_bytes_match_the_vector() -> None:
    """Expected: storage.json; 12 blocks of four 768 x 768 and two 768 x 3072 matrices."""
    shapes = 12 * ([(768, 768)] * 4 + [(3072, 768), (768, 3072)])
    assert sum(o * i for o, i in shapes) == STORAGE["bert_base_encoder_linear_weights"]
    sizes: dict[str, tuple[Pattern | None, int]] = {"fp32": (None, 32), "fp16": (None, 16), "int8": (None, 8)}
    sizes |= {"fp16_2_4": (P24, 16), "int8_2_4": (P24, 8), "int4_2_4": (P24, 4)}
    found = {name: sum(paper_bytes(shape, *size) for shape in shapes) for name, size in sizes.items()}
    assert found == STORAGE["bert_base_bytes"]


def test_paper_bytes_are_exact_integers_rounded_up() -> None:
    """Expected: by hand, ceil(numel * N (b + i) / (8 M)); padding of ragged tails is not counted."""
    assert paper_bytes((3, 5), None, 4) == 8
    assert paper_bytes((3, 5), P24, 8) == 10  # 15 * 5 bits = 75 bits
    assert paper_bytes((2**20 + 1, 2**20), P24, 8) == (2**20 + 1) * 2**20 * 5 // 8


def test_other_index_forms_of_the_table() -> None:
    """Expected: ALGORITHMS F: combinatorial ceil(log2 C(M, N)) a group, bitmap M bits a group, INT4 pairs 20 bits per
    eight weights; the form that is written is the default."""
    assert bits_per_weight(P24, 8) == 20 / 4
    assert bits_per_weight(P24, 8, "combinatorial") == (16 + 3) / 4
    assert bits_per_weight(P24, 8, "bitmap") == (16 + 4) / 4
    assert bits_per_weight(Pattern(1, 4), 4, "bitmap") == (4 + 4) / 4
    assert bits_per_weight(P24, 4, "pairs") == 20 / 8
    assert paper_bytes((64, 64), P24, 4, "pairs") == 64 * 64 * 20 // 64
    assert paper_bytes((64, 64), P24, 8, "combinatorial") == 64 * 64 * 19 // 32


def test_rows_of_an_attention_map() -> None:
    """Expected by hand: ceil(L / M) * N * (b + log2 M) bits, 197 keys make 50 groups of 4 and 13 of 16."""
    assert attention_row_bits(197, P24, 8) == 50 * 2 * 10
    assert attention_row_bits(197, Pattern(2, 16), 16) == 13 * 2 * 20


@given(sparse_matrices())
@settings(max_examples=30, deadline=None)
def test_bytes_on_disk_equal_paper_bytes_when_nothing_is_padded(case: tuple[Tensor, Pattern]) -> None:
    """Expected: packed int8 values and packed indices together weigh what paper_bytes says."""
    w_OI, pattern = case
    whole = torch.zeros(w_OI.shape[0], 8 * pattern.m, dtype=torch.int8)
    whole[:, : w_OI.shape[1]] = w_OI[:, : 8 * pattern.m].to(torch.int8)
    values_OC, indices_OC = compress_nm(project(whole, pattern), pattern)
    stored = values_OC.numel() + pack_bits(indices_OC, index_bits(pattern)).numel()
    assert stored == paper_bytes(whole.shape, pattern, 8)
