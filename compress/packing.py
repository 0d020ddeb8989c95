"""The logical compressed form of an N:M matrix, bit packing, and what it all weighs.

Legend: O out_features, I in_features, G = ceil(I / M) groups per row, N kept of M, C = G * N kept values per row,
B bytes per row. Nothing here depends on a kernel or a device; a runtime builds its own layout from this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .masks import Pattern, check_nm, nm_mask

IndexForm = Literal["per_value", "combinatorial", "bitmap", "pairs"]


@torch.no_grad()
def compress_nm(w_OI: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Kept values and where they stood: [O, I] -> values [O, C] (dtype of ``w_OI``), indices uint8 [O, C] in 0..M-1.

    Values stand in increasing column order. A group with fewer than N non-zeros is filled with zeros at its lowest
    unused indices, so indices increase strictly inside every group. A ragged tail counts as padded with zeros up to M;
    an index points into that padding only when the tail itself is shorter than N.

    Raises:
        ValueError: ``w_OI`` is not a matrix, or has a group with more than N non-zeros.
    """
    if w_OI.ndim != 2:
        raise ValueError(f"expected a matrix [out_features, in_features], found shape {tuple(w_OI.shape)}")
    if not check_nm(w_OI, pattern):
        raise ValueError(
            f"expected a {pattern} matrix (at most {pattern.n} non-zeros of {pattern.m} along in_features), found a "
            f"group with more in the matrix of shape {tuple(w_OI.shape)}; apply the mask before packing"
        )
    padding = -w_OI.shape[1] % pattern.m
    if padding:
        w_OI = torch.nn.functional.pad(w_OI, (0, padding))
    # Non-zeros score 1 and zeros 0; ties go to the lower index, which is exactly the rule for filling up a group.
    # Rows are a multiple of M long, so a flat position modulo M is the index inside its group.
    flat_C = nm_mask(w_OI != 0, pattern).flatten().nonzero().squeeze(1)
    shape = (w_OI.shape[0], w_OI.shape[1] // pattern.m * pattern.n)
    values_OC = w_OI.flatten().take(flat_C).view(shape)
    indices_OC = flat_C.bitwise_and_(pattern.m - 1).to(torch.uint8).view(shape)
    return values_OC, indices_OC


@torch.no_grad()
def expand_nm(values_OC: Tensor, indices_OC: Tensor, pattern: Pattern, in_features: int) -> Tensor:
    """Exact inverse of :func:`compress_nm`: values and indices [O, C] -> w [O, in_features].

    Raises:
        ValueError: shapes do not fit, or indices are not strictly increasing inside a group and below M.
    """
    n, m = pattern.n, pattern.m
    groups = -(-in_features // m)
    expected = (values_OC.shape[0], groups * n)
    if tuple(values_OC.shape) != expected or tuple(indices_OC.shape) != expected:
        raise ValueError(
            f"expected values and indices of shape [out_features, {groups * n}] for {pattern} and {in_features} "
            f"in_features, found {tuple(values_OC.shape)} and {tuple(indices_OC.shape)}"
        )
    _check_indices(indices_OC, pattern)
    w_GM = torch.zeros((expected[0] * groups, m), dtype=values_OC.dtype, device=values_OC.device)
    w_GM.scatter_(1, indices_OC.reshape(-1, n).long(), values_OC.reshape(-1, n))
    return w_GM.view(expected[0], groups * m)[:, :in_features].contiguous()


def _check_indices(indices_OC: Tensor, pattern: Pattern) -> None:
    if not indices_OC.numel():
        return
    largest = int(indices_OC.max())
    if largest >= pattern.m:
        raise ValueError(f"expected indices 0..{pattern.m - 1} for {pattern}, found {largest}; the file is damaged")
    index_GN = indices_OC.reshape(-1, pattern.n)
    rising_G = (index_GN[:, 1:] > index_GN[:, :-1]).all(1)
    if not bool(rising_G.all()):
        group = int(rising_G.logical_not().nonzero()[0, 0])
        raise ValueError(
            f"expected strictly increasing indices inside each group of {pattern}, found {index_GN[group].tolist()} in "
            f"group {group}; the file is damaged"
        )


@torch.no_grad()
def pack_bits(x_OC: Tensor, bits: int) -> Tensor:
    """Pack each row of small integers, least significant bit first: uint8 [..., C] -> uint8 [..., ceil(C * bits / 8)].

    With 2 bits a byte holds two groups of 2:4, low nibble first, and a nibble is ``idx0 | idx1 << 2``. Rows start on a
    byte; unused bits are zero.

    Raises:
        ValueError: ``bits`` not in 1..8, or a value that does not fit.
    """
    _check_bits(bits)
    if x_OC.dtype != torch.uint8:
        raise ValueError(f"expected uint8 values to pack, found {x_OC.dtype}")
    if x_OC.numel() and int(x_OC.max()) >> bits:
        raise ValueError(f"expected values below {1 << bits} for {bits} bits, found {int(x_OC.max())}")
    count = x_OC.shape[-1]
    if bits == 8:
        return x_OC.clone()
    per_word, word_bytes, word_dtype = _word(bits)
    x_OC = torch.nn.functional.pad(x_OC, (0, -count % per_word)).unflatten(-1, (-1, per_word))
    word_OW = x_OC[..., 0].to(word_dtype)
    for k in range(1, per_word):
        word_OW = word_OW | x_OC[..., k].to(word_dtype) << bits * k
    byte_OWB = torch.stack([(word_OW >> 8 * k & 255).to(torch.uint8) for k in range(word_bytes)], dim=-1)
    return byte_OWB.flatten(-2)[..., : packed_bytes(count, bits)].contiguous()


@torch.no_grad()
def unpack_bits(packed_OB: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_bits`: uint8 [..., ceil(count * bits / 8)] -> uint8 [..., count].

    Raises:
        ValueError: ``bits`` not in 1..8, or rows of another length than ``count`` values need.
    """
    _check_bits(bits)
    needed = packed_bytes(count, bits)
    if packed_OB.dtype != torch.uint8 or packed_OB.shape[-1] != needed:
        raise ValueError(
            f"expected uint8 rows of {needed} bytes for {count} values of {bits} bits, "
            f"found {packed_OB.dtype} {tuple(packed_OB.shape)}"
        )
    if bits == 8:
        return packed_OB.clone()
    per_word, word_bytes, word_dtype = _word(bits)
    byte_OWB = torch.nn.functional.pad(packed_OB, (0, -needed % word_bytes)).unflatten(-1, (-1, word_bytes))
    word_OW = byte_OWB[..., 0].to(word_dtype)
    for k in range(1, word_bytes):
        word_OW = word_OW | byte_OWB[..., k].to(word_dtype) << 8 * k
    low = (1 << bits) - 1
    x_OWC = torch.stack([(word_OW >> bits * k & low).to(torch.uint8) for k in range(per_word)], dim=-1)
    return x_OWC.flatten(-2)[..., :count].contiguous()


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"expected 1 to 8 bits per value, found {bits}")


def _word(bits: int) -> tuple[int, int, torch.dtype]:
    """Smallest run of whole bytes that whole values fill: values per word, bytes per word, dtype that holds it."""
    if 8 % bits == 0:
        return 8 // bits, 1, torch.uint8
    return 8, bits, torch.int64


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a packed row of ``count`` values of ``bits`` bits."""
    return -(-count * bits // 8)


@torch.no_grad()
def pack_integers(q_OC: Tensor, bits: int) -> Tensor:
    """Signed integers of ``bits`` bits: int8 [..., C] -> the same for 8 bits, else uint8 [..., ceil(C * bits / 8)].

    Below 8 bits each value is stored plus 2^(bits-1), so as a number without sign.

    Raises:
        ValueError: ``bits`` not in 1..8, not int8, or a value outside -2^(bits-1) .. 2^(bits-1) - 1.
    """
    _check_bits(bits)
    half = 1 << (bits - 1)
    if q_OC.dtype != torch.int8:
        raise ValueError(f"expected int8 values to pack, found {q_OC.dtype}")
    if q_OC.numel() and not (-half <= int(q_OC.min()) and int(q_OC.max()) < half):
        found = f"{int(q_OC.min())} to {int(q_OC.max())}"
        raise ValueError(f"expected values {-half} to {half - 1} for {bits} bits, found {found}")
    return q_OC.contiguous() if bits == 8 else pack_bits((q_OC.to(torch.int16) + half).to(torch.uint8), bits)


@torch.no_grad()
def unpack_integers(packed_OB: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_integers`: rows of ``count`` values, int8.

    Raises:
        ValueError: ``bits`` not in 1..8, a wrong dtype, or rows of another length than ``count`` values need.
    """
    if bits == 8:
        if packed_OB.dtype != torch.int8 or packed_OB.shape[-1] != count:
            raise ValueError(f"expected int8 rows of {count} values, found {packed_OB.dtype} {tuple(packed_OB.shape)}")
        return packed_OB
    return (unpack_bits(packed_OB, bits, count).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def index_bits(pattern: Pattern) -> int:
    """Bits of one stored index: ceil(log2 M), at least 1."""
    return max(1, (pattern.m - 1).bit_length())


def bits_per_weight(pattern: Pattern | None, value_bits: int, index: IndexForm = "per_value") -> float:
    """Stored bits per weight of the dense matrix; ``value_bits`` when there is no pattern.

    Args:
        index: ``per_value``, the form that is written: N (b + i) / M with i = ceil(log2 M). The others are to compare
            with: ``combinatorial`` ceil(log2 C(M, N)) bits per group; ``bitmap`` M bits per group; ``pairs`` the INT4
            form of A100 tensor cores, which keeps N of M *pairs* of values, one index for both.
    """
    if pattern is None:
        return float(value_bits)
    bits, weights = _group(pattern, value_bits, index)
    return bits / weights


def paper_bytes(shape: Sequence[int], pattern: Pattern | None, value_bits: int, index: IndexForm = "per_value") -> int:
    """Bytes of one weight of ``shape`` as the papers count: values and indices only, rounded up to a whole byte.

    Scales, biases and the padding of ragged tails are not counted (GPUSQ-TLM, Table 1; Deep Compression, section 4).
    """
    numel = math.prod(shape)
    if pattern is None:
        return packed_bytes(numel, value_bits)
    bits, weights = _group(pattern, value_bits, index)
    return -(-numel * bits // (8 * weights))


def _group(pattern: Pattern, value_bits: int, index: IndexForm) -> tuple[int, int]:
    """(bits, weights) of the smallest whole group."""
    n, m = pattern.n, pattern.m
    if index == "pairs":
        return n * (2 * value_bits + index_bits(pattern)), 2 * m
    if index == "combinatorial":
        return n * value_bits + (math.comb(m, n) - 1).bit_length(), m
    return n * value_bits + (m if index == "bitmap" else n * index_bits(pattern)), m


def attention_row_bits(keys: int, pattern: Pattern, value_bits: int) -> int:
    """Bits of one row of an N:M attention map over ``keys`` keys: ceil(L / M) * N * (b + log2 M)."""
    return -(-keys // pattern.m) * pattern.n * (value_bits + index_bits(pattern))
