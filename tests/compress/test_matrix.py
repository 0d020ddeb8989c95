"""Every form of a matrix in a weight file: exact round trips through a real file, and honest sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from squeezoo.compress.bitmap import compress_bitmap, expand_bitmap
from squeezoo.compress.masks import project
from squeezoo.compress.matrix import (
    PackError,
    form_of,
    read_input,
    read_matrix,
    read_table,
    store_input,
    store_matrix,
    store_table,
)
from squeezoo.compress.plan import PlannedEmbedding, PlannedGemm
from squeezoo.compress.quantizers import InputQuantization
from squeezoo.compress.rules import parse_sparsity
from torch import Tensor


def planned(
    shape: tuple[int, int], sparsity: str | None = None, bits: int | None = None, **changes: Any
) -> PlannedGemm:
    fields: dict[str, Any] = dict(
        name="g", role="q", block=0, shape=shape, layout="out_in", parts=1, sparsity=sparsity,
        weight=None if bits is None else {"method": "lsq", "bits": bits}, input=None, input_owner=None,
        accelerated=False, reason="",
    )  # fmt: skip
    return PlannedGemm(**{**fields, **changes})


def number_bytes(tensors: dict[str, Tensor], *parts: str) -> int:
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if name.rpartition(".")[2] in parts)


@st.composite
def cases(draw: st.DrawFn) -> tuple[PlannedGemm, Tensor, Tensor | None]:
    """A plan, a matrix that keeps it, and its scales."""
    m = draw(st.sampled_from((2, 4, 8, 16, 64, 256)))
    sparsity = draw(st.sampled_from((None, f"{draw(st.integers(1, m - 1))}:{m}", "5%", "50%", "90%")))
    bits = draw(st.sampled_from((None, 2, 3, 4, 5, 6, 7, 8)))
    shape = draw(st.sampled_from((1, 3, 6))), draw(st.integers(1, 280))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if bits is None:
        w_OI = torch.randn(shape, generator=generator).to(draw(st.sampled_from((torch.float16, torch.float32))))
    else:
        half = 1 << (bits - 1)
        w_OI = torch.randint(-half, half, shape, generator=generator).to(torch.int8)
    if sparsity is not None and ":" in sparsity:
        w_OI = project(w_OI, parse_sparsity(sparsity))
    elif sparsity is not None:
        w_OI = w_OI * (torch.rand(shape, generator=generator) > float(sparsity[:-1]) / 100)
    scale_O1 = None if bits is None else torch.rand(shape[0], 1, generator=generator) + 0.1
    return planned(shape, sparsity, bits), w_OI, scale_O1


@given(cases())
@settings(max_examples=200, deadline=None)
def test_every_form_comes_back_exactly_from_a_file(case: tuple[PlannedGemm, Tensor, Tensor | None]) -> None:
    """Expected: the same numbers, types and scales, through safetensors; nothing is left over; the bytes are said."""
    gemm, w_OI, scale_O1 = case
    tensors = store_matrix(gemm, w_OI, scale_O1)
    read = load(save(tensors))
    found = form_of(gemm, read)
    assert found.bytes == number_bytes(read, "values", "index", "bitmap")
    values, scale_O = read_matrix(gemm, read)
    assert values.dtype == w_OI.dtype
    assert torch.equal(values, w_OI)
    assert (scale_O is None) == (scale_O1 is None)
    assert scale_O is None or torch.equal(scale_O, scale_O1.flatten())  # type: ignore[union-attr]
    assert read == {}


@pytest.mark.parametrize(
    ("kind", "bits", "form", "size"),
    [
        (torch.float16, None, "bitmap", 64 * (9 + 36 * 2)),
        (torch.int8, 8, "bitmap", 64 * (9 + 36)),
        (torch.int8, 4, "bitmap", 64 * (9 + 18)),
        (torch.int8, 2, "dense", 64 * 18),
    ],
)
def test_half_zeros_take_a_bitmap_where_it_is_smaller(
    kind: torch.dtype, bits: int | None, form: str, size: int
) -> None:
    """Expected by hand for 64 rows of 72 weights, every second one zero: 9 bytes of bitmap a row and 36 values. With 2
    bits dense storage (18 bytes a row) is as small, so the zeros are stored, and that is said."""
    w_OI = torch.ones(64, 72).to(kind)
    w_OI[:, ::2] = 0
    gemm = planned((64, 72), "50%", bits)
    found = form_of(gemm, store_matrix(gemm, w_OI, None if bits is None else torch.ones(64, 1)))
    assert (found.form, found.bytes) == (form, size)
    assert found.number == ("float16" if bits is None else f"int{bits}")
    assert found.note == ("50% zeros, stored like other values: a bitmap would not be smaller" if bits == 2 else "")


def test_five_percent_zeros_do_not_pay_for_a_bitmap() -> None:
    """Expected by hand: int8, 5 % zeros save 0.4 bits a weight, a bitmap costs 1."""
    w_OI = torch.ones(20, 80, dtype=torch.int8)
    w_OI[:, ::20] = 0
    gemm = planned((20, 80), "5%", 8)
    found = form_of(gemm, store_matrix(gemm, w_OI, torch.ones(20, 1)))
    assert (found.form, found.bytes) == ("dense", 1600)
    assert "stored like other values" in found.note


def test_scales_that_are_equal_are_stored_once() -> None:
    """Expected by hand: one scale per tensor, one per Q, K and V of a fused matrix, one per row else."""
    w_OI = torch.ones(6, 8, dtype=torch.int8)
    for scales, stored in (([2.0] * 6, 1), ([1.0, 1.0, 2.0, 2.0, 3.0, 3.0], 3), ([1.0, 2.0, 3.0, 1.0, 2.0, 3.0], 6)):
        gemm = planned((6, 8), None, 8, parts=3)
        tensors = store_matrix(gemm, w_OI, torch.tensor(scales)[:, None])
        assert tensors["g.scale"].shape == (stored,)
        scale_O = read_matrix(gemm, tensors)[1]
        assert scale_O is not None
        assert scale_O.tolist() == scales


@pytest.mark.parametrize(
    ("found", "record", "names"),
    [
        (InputQuantization("static", 8, 0.5, 0, -127, 127), {"method": "lsq", "bits": 8}, ["g.input_scale"]),
        (InputQuantization("static", 3, 0.5, 0, -3, 3), {"method": "q8bert", "bits": 3}, ["g.input_scale"]),
        (
            InputQuantization("static", 4, 0.25, 6, 0, 15),
            {"method": "pact", "bits": 4},
            ["g.input_scale", "g.input_zero_point"],
        ),
        (
            InputQuantization("static", 8, 0.25, 0, 0, 255),
            {"method": "minmax", "bits": 8},
            ["g.input_scale", "g.input_zero_point"],
        ),
        (InputQuantization("dynamic", 8, None, None, 0, 255), {"method": "dynamic", "bits": 8}, []),
        (InputQuantization("dynamic", 4, None, 0, -7, 7), {"method": "q8bert", "bits": 4, "dynamic": True}, []),
    ],
)
def test_every_kind_of_input_comes_back(found: InputQuantization, record: dict[str, Any], names: list[str]) -> None:
    """Expected: the same record from the file and the plan."""
    gemm = planned((4, 8), None, 8, input=record, input_owner="g")
    tensors = load(save(store_input(gemm, found))) if names else store_input(gemm, found)
    assert sorted(tensors) == names
    assert read_input(gemm, tensors) == found
    assert tensors == {}


def test_inputs_that_the_format_does_not_know_are_refused() -> None:
    """Expected: PackError with what was expected and found, instead of a file that reads back as something else."""
    gemm = planned((4, 8), None, 8, input={"method": "lsq", "bits": 8}, input_owner="g")
    for wrong in (
        InputQuantization("static", 8, 0.5, 0, -128, 127),
        InputQuantization("static", 8, 0.5, 3, -127, 127),
        InputQuantization("static", 4, 0.5, 0, -7, 7),
        InputQuantization("dynamic", 8, None, None, 0, 255),
    ):
        with pytest.raises(PackError, match=r"g: (expected levels|the plan says)"):
            store_input(gemm, wrong)
    with pytest.raises(PackError, match=r"expects the tensor g\.input_scale"):
        read_input(gemm, {})


@given(st.integers(1, 40), st.integers(1, 40), st.integers(2, 8), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_embedding_tables_come_back(rows: int, width: int, bits: int, seed: int) -> None:
    """Expected: the same integers and one scale per row."""
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    q_RD = torch.randint(-half, half, (rows, width), generator=generator).to(torch.int8)
    scale_R1 = torch.rand(rows, 1, generator=generator) + 0.1
    table = PlannedEmbedding("e", rows, width, "absmax", bits)
    tensors = load(save(store_table(table, q_RD, scale_R1)))
    found, scale_R = read_table(table, tensors)
    assert torch.equal(found, q_RD)
    assert torch.equal(scale_R, scale_R1.flatten())


def damages() -> dict[str, tuple[dict[str, Any], str]]:
    zeros = torch.zeros
    return {
        "no index": ({"g.index": None}, r"the plan expects the tensor g\.index"),
        "no scale": ({"g.scale": None}, r"the plan expects the tensor g\.scale"),
        "short values": ({"g.values": zeros((4, 3), dtype=torch.uint8)}, "g: expected uint8 rows of 4 bytes"),
        "wrong type": ({"g.values": zeros((4, 8))}, "g: expected uint8 rows of 4 bytes"),
        "few rows": ({"g.values": zeros((3, 4), dtype=torch.uint8)}, "g: expected values and indices of shape"),
        "scales": ({"g.scale": torch.ones(2)}, "g: expected 1, 1 or 4 float32 scales"),
        "half scale": ({"g.scale": torch.ones(4, dtype=torch.float16)}, "g: expected 1, 1 or 4 float32 scales"),
    }


@pytest.mark.parametrize("case", damages())
def test_damage_is_named(case: str) -> None:
    """Expected: PackError with the GEMM and what was expected."""
    gemm = planned((4, 16), "2:4", 4)
    w_OI = project(torch.arange(-8, 8).repeat(4, 1).to(torch.int8), gemm.pattern)  # type: ignore[arg-type]
    tensors: dict[str, Any] = store_matrix(gemm, w_OI, torch.rand(4, 1))
    changes, message = damages()[case]
    tensors = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    with pytest.raises(PackError, match=message):
        read_matrix(gemm, tensors)


def test_a_damaged_bitmap_is_named() -> None:
    """Expected: the number of values must be that of the set bits."""
    values_K, bitmap_OB = compress_bitmap(torch.eye(9))
    with pytest.raises(ValueError, match=r"expected the 9 values that the bitmap marks, found \(8,\)"):
        expand_bitmap(values_K[:-1], bitmap_OB, 9)
    with pytest.raises(ValueError, match="expected a matrix"):
        compress_bitmap(torch.zeros(4))
    gemm = planned((9, 9), "88%")
    with pytest.raises(PackError, match="g: expected the 9 values"):
        read_matrix(gemm, {"g.values": values_K[:-1], "g.bitmap": bitmap_OB})


def test_what_does_not_fit_its_plan_is_not_stored() -> None:
    """Expected: PackError before anything is written."""
    with pytest.raises(PackError, match="g: expected a 2:4 matrix"):
        store_matrix(planned((4, 8), "2:4"), torch.ones(4, 8), None)
    with pytest.raises(PackError, match="g: expected values -8 to 7 for 4 bits, found 100 to 100"):
        store_matrix(planned((4, 8), None, 4), torch.full((4, 8), 100, dtype=torch.int8), torch.ones(4, 1))
