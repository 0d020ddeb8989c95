"""The lines of `squeezoo info`: how matrices are stored and what runs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from squeezoo.compress.explain import runtime_lines, storage_lines
from squeezoo.compress.matrix import Tensors, store_matrix, store_table
from squeezoo.compress.plan import Plan, PlannedAttention, PlannedEmbedding, PlannedGemm

INT8 = {"method": "lsq", "bits": 8}
INT4 = {"method": "sawb", "bits": 4}
DYNAMIC = {"method": "dynamic", "bits": 8}


def gemm(name: str, **changes: Any) -> PlannedGemm:
    empty = PlannedGemm(name, "q", 0, (8, 16), "out_in", 1, None, None, None, None, False, "")
    return replace(empty, **changes)


def plan() -> Plan:
    gemms = (
        gemm("a", sparsity="2:4", weight=INT8, input=INT8), gemm("b", sparsity="2:4", weight=INT8, input=INT8),
        gemm("c", weight=INT4, input={"method": "pact", "bits": 4}), gemm("d", sparsity="50%"),
        gemm("e", weight=INT8), gemm("f", weight=DYNAMIC, input=DYNAMIC), gemm("g", sparsity="1%", weight=INT8),
    )  # fmt: skip
    int8 = {"method": "minmax", "bits": 8}
    maps = (
        PlannedAttention("m", 0, "self", "2:4", False, None, None, None, None),
        PlannedAttention("n", 1, "self", None, False, int8, int8, int8, int8),
    )
    return Plan("bert", "r", gemms, attention=maps, embeddings=(PlannedEmbedding("w", 5, 4, "absmax", 8),))


def test_every_form_is_counted_with_its_true_bytes() -> None:
    """Expected by hand for matrices of 8 x 16: int8 2:4 64 + 16 bytes, int4 64, float16 at half zeros 16 + 128."""
    tensors: Tensors = {}
    half = torch.tensor([1.0, 0.0]).repeat(8, 8)
    for g in plan().gemms:
        w_OI = half.half() if g.weight is None else half.to(torch.int8)
        w_OI = torch.ones_like(w_OI) if g.name == "g" else w_OI
        tensors |= store_matrix(g, w_OI, None if g.weight is None else torch.rand(8, 1))
    tensors |= store_table(plan().embeddings[0], torch.ones(5, 4, dtype=torch.int8), torch.rand(5, 1))
    assert storage_lines(tensors, plan()) == [
        "2 x 2:4 int8: 160 bytes, 5 bits a weight",
        "1 x dense int4: 64 bytes, 4 bits a weight",
        "1 x bitmap float16: 144 bytes, 9 bits a weight",
        "2 x dense int8: 256 bytes, 8 bits a weight",
        "1 x dense int8: 128 bytes, 8 bits a weight "
        "(1% zeros, stored like other values: a bitmap would not be smaller)",
        "embedding w int8: 40 bytes with its scales",
    ]


def test_what_has_no_kernel_is_said() -> None:
    """Expected by hand: the kinds of the plan, once each."""
    assert runtime_lines(plan(), "int8") == [
        "2 x GEMM: int8 kernels, int8 inputs, zeros of 2:4 left out by the native kernel where that is faster",
        "1 x GEMM: int8 kernels, int4 inputs, int4 weights held as int8",
        "1 x GEMM: float32, the weight is not quantized; its zeros are multiplied",
        "2 x GEMM: float32, int8 weights expanded: without quantized inputs there is no kernel",
        "1 x GEMM: int8 kernels, int8 inputs with a range per call",
        "1 x attention map: float32, there is no kernel for N:M maps on the CPU",
        "1 x attention map: int8 inside blocks that run as one native call, float32 elsewhere",
        "1 x embedding table: int8 rows, float32 where a tied projection needs it",
    ]
    assert "slower than the dense model" in runtime_lines(plan(), "reference")[0]
    assert "not rounded" in runtime_lines(plan(), "dense")[0]
