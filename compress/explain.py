"""What a checkpoint is made of and how it will run here, as lines for people (``squeezoo info``)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from .pack import forms
from .plan import Plan, PlannedGemm


def storage_lines(tensors: Mapping[str, Tensor], plan: Plan) -> list[str]:
    """One line per form of matrices in the weight file, with its true bits a weight, and one per integer table."""
    groups: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for form in forms(tensors, plan):
        sums = groups[form.form, form.number, form.note]
        for index, value in enumerate((1, form.weights, form.bytes)):
            sums[index] += value
    lines = []
    for (form_name, number, note), (count, weights, size) in groups.items():
        bits = f"{8 * size / weights:.3g} bits a weight" if weights else ""
        lines.append(f"{count} x {form_name} {number}: {size:,} bytes, {bits}{f' ({note})' if note else ''}")
    for table in plan.embeddings:
        size = sum(_bytes(tensors[f"{table.name}.{part}"]) for part in ("values", "scale"))
        lines.append(f"embedding {table.name} int{table.bits}: {size:,} bytes with its scales")
    return lines


def runtime_lines(plan: Plan, backend: Literal["int8", "reference", "dense"]) -> list[str]:
    """Which parts of a plan run on integer kernels with this backend, which in float32, and why."""
    if backend == "dense":
        return ["everything in float32 with the compressed weights; inputs and attention maps are not rounded"]
    if backend == "reference":
        return ["everything in float32, repeating the arithmetic of the training; slower than the dense model"]
    groups: dict[str, int] = defaultdict(int)
    for gemm in plan.gemms:
        groups[_how(gemm)] += 1
    lines = [f"{count} x GEMM: {how}" for how, count in groups.items()]
    maps = [("N:M" if site.sparsity else "quantized") for site in plan.attention]
    for kind, how in (
        ("N:M", "float32, there is no kernel for N:M maps on the CPU"),
        ("quantized", "int8 inside blocks that run as one native call, float32 elsewhere"),
    ):
        if kind in maps:
            lines.append(f"{maps.count(kind)} x attention map: {how}")
    if plan.embeddings:
        lines.append(f"{len(plan.embeddings)} x embedding table: int8 rows, float32 where a tied projection needs it")
    return lines


def _how(gemm: PlannedGemm) -> str:
    if gemm.weight is None:
        return "float32, the weight is not quantized" + ("; its zeros are multiplied" if gemm.sparsity else "")
    if gemm.input is None:
        return f"float32, int{gemm.weight_bits} weights expanded: without quantized inputs there is no kernel"
    dynamic = " with a range per call" if gemm.input["method"] == "dynamic" else ""
    how = f"int8 kernels, int{gemm.input_bits} inputs{dynamic}"
    if gemm.weight_bits != 8:
        how += f", int{gemm.weight_bits} weights held as int8"
    skipped = gemm.sparsity is not None and ":" in gemm.sparsity
    if skipped:
        return how + f", zeros of {gemm.sparsity} left out by the native kernel where that is faster"
    return how + (f", zeros of {gemm.sparsity} multiplied" if gemm.sparsity else "")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
