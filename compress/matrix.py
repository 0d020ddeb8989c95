"""One quantized or pruned matrix, and one quantized input, as the tensors that lie in a weight file.

Tensors of the GEMM ``g`` (O out_features, I in_features, C kept values of a row, K kept values of the matrix):
    g.values            the weights that are kept, row by row. Integers of 8 bits: int8; of 2 to 7 bits: packed, plus
                        2^(bits-1); not quantized: float16 or float32. [O, C] before packing; C = I without sparsity,
                        ceil(I / M) * N with N:M; [K] with a bitmap
    g.index             uint8, rows of packed positions inside the groups of M (N:M only)
    g.bitmap            uint8 [O, ceil(I / 8)], one bit per weight (unstructured sparsity, only where that is smaller
                        than storing the zeros)
    g.scale             float32 [O], or [parts] or [1] where it is the same for all rows of a part (quantized only)
    g.input_scale       float32 [] (static quantized inputs only)
    g.input_zero_point  int32 [] (static asymmetric inputs only: levels 0..2^k - 1; without it -Qp..Qp)
An embedding table ``e`` has ``e.values`` [rows, width] and ``e.scale`` [rows] or [1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .bitmap import bitmap_bytes, compress_bitmap, dense_bytes, expand_bitmap
from .packing import compress_nm, expand_nm, index_bits, pack_bits, pack_integers, unpack_bits, unpack_integers
from .plan import PlannedEmbedding, PlannedGemm
from .quantizers import InputQuantization

Tensors = dict[str, Tensor]
PARTS = ("values", "index", "bitmap", "scale", "input_scale", "input_zero_point")


class PackError(ValueError):
    """Tensors that do not fit the plan."""


class _MissingError(PackError):
    pass


@dataclass(frozen=True)
class Form:
    """How one matrix lies in the file.

    Args:
        name: of the GEMM. form: ``2:4``, ``bitmap``, ``dense``. number: ``int8``, ``int4``, ``float16``, ...
        weights: zeros included. bytes: values, indices and bitmap, without scales.
        note: what a reader should know, e.g. that zeros are stored; may be empty.
    """

    name: str
    form: str
    number: str
    weights: int
    bytes: int
    note: str


def store_matrix(gemm: PlannedGemm, w_OI: Tensor, scale_O1: Tensor | None) -> Tensors:
    """The tensors of one masked matrix [O, I]: int8 with scales [O, 1], or float.

    Raises:
        PackError: more non-zeros than the pattern allows, or integers that its bits do not hold.
    """
    tensors: Tensors = {}
    bits = gemm.weight_bits or 8 * w_OI.element_size()
    try:
        if gemm.pattern is not None:
            w_OI, index_OC = compress_nm(w_OI, gemm.pattern)
            tensors[f"{gemm.name}.index"] = pack_bits(index_OC, index_bits(gemm.pattern))
        elif gemm.unstructured is not None and bitmap_bytes(w_OI, bits) < dense_bytes(w_OI, bits):
            w_OI, tensors[f"{gemm.name}.bitmap"] = compress_bitmap(w_OI)
        if gemm.weight_bits is not None:
            w_OI = pack_integers(w_OI, gemm.weight_bits)
    except ValueError as error:
        raise PackError(f"{gemm.name}: {error}") from error
    tensors[f"{gemm.name}.values"] = w_OI.contiguous()
    if scale_O1 is not None:
        tensors[f"{gemm.name}.scale"] = _short_scale(scale_O1.flatten(), gemm.parts)
    return tensors


def read_matrix(gemm: PlannedGemm, tensors: Tensors) -> tuple[Tensor, Tensor | None]:
    """int8 or float [O, I] and the scales [O] of one GEMM; takes its tensors out of ``tensors``.

    Raises:
        PackError: a tensor is missing, or does not fit the plan.
    """
    name, (rows, columns), pattern = gemm.name, gemm.shape, gemm.pattern
    values = _take(tensors, name, "values")
    bitmap_OB = tensors.pop(f"{name}.bitmap", None)
    try:
        if bitmap_OB is not None:
            stored = int(unpack_bits(bitmap_OB, 1, columns).sum())
        else:
            stored = columns if pattern is None else -(-columns // pattern.m) * pattern.n
        if gemm.weight_bits is not None:
            values = unpack_integers(values, gemm.weight_bits, stored)
        elif not values.is_floating_point():
            raise ValueError(f"expected floating point values, found {values.dtype}")
        if pattern is not None:
            index_OC = unpack_bits(_take(tensors, name, "index"), index_bits(pattern), stored)
            values = expand_nm(values, index_OC, pattern, columns)
        elif bitmap_OB is not None:
            values = expand_bitmap(values, bitmap_OB, columns)
        if tuple(values.shape) != gemm.shape:
            raise ValueError(f"the plan expects shape {gemm.shape}, the weight file has {tuple(values.shape)}")
        scale_O = None
        if gemm.weight_bits is not None:
            scale_O = _long_scale(_take(tensors, name, "scale"), rows, gemm.parts)
    except _MissingError:
        raise
    except ValueError as error:
        raise PackError(f"{name}: {error}") from error
    return values, scale_O


def store_input(gemm: PlannedGemm, found: InputQuantization) -> Tensors:
    """The tensors of the levels of a GEMM's input; none for a dynamic one.

    Raises:
        PackError: levels that the format does not know.
    """
    name = gemm.name
    qp = (1 << (found.bits - 1)) - 1
    symmetric = (found.qmin, found.qmax) == (-qp, qp)
    asymmetric = (found.qmin, found.qmax) == (0, 2 * qp + 1)
    if found.bits != gemm.input_bits or not (symmetric or asymmetric) or (symmetric and found.zero_point):
        raise PackError(
            f"{name}: expected levels {-qp}..{qp} around 0 or 0..{2 * qp + 1} for {gemm.input_bits} bits, found {found}"
        )
    if found.scale is None or found.zero_point is None:
        if found != _dynamic(gemm):
            raise PackError(f"{name}: the plan says {gemm.input}, its quantizer gives {found}")
        return {}
    if _dynamic(gemm) is not None:
        raise PackError(f"{name}: the plan says {gemm.input}, its quantizer gives {found}")
    tensors = {f"{name}.input_scale": torch.tensor(found.scale, dtype=torch.float32)}
    if asymmetric:
        tensors[f"{name}.input_zero_point"] = torch.tensor(found.zero_point, dtype=torch.int32)
    return tensors


def read_input(gemm: PlannedGemm, tensors: Tensors) -> InputQuantization | None:
    """The levels of a GEMM's input, None where it is not quantized; takes its tensors out of ``tensors``.

    Raises:
        PackError: a tensor is missing.
    """
    if gemm.input_bits is None:
        return None
    dynamic = _dynamic(gemm)
    if dynamic is not None:
        return dynamic
    bits, qp = gemm.input_bits, (1 << (gemm.input_bits - 1)) - 1
    scale = float(_take(tensors, gemm.name, "input_scale"))
    zero_point = tensors.pop(f"{gemm.name}.input_zero_point", None)
    if zero_point is None:
        return InputQuantization("static", bits, scale, 0, -qp, qp)
    return InputQuantization("static", bits, scale, int(zero_point), 0, 2 * qp + 1)


def store_table(table: PlannedEmbedding, q_RD: Tensor, scale_R1: Tensor) -> Tensors:
    """The tensors of one embedding table as integers [rows, width] with scales [rows, 1]."""
    try:
        values = pack_integers(q_RD, table.bits)
    except ValueError as error:
        raise PackError(f"{table.name}: {error}") from error
    return {f"{table.name}.values": values, f"{table.name}.scale": _short_scale(scale_R1.flatten(), 1)}


def read_table(table: PlannedEmbedding, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """int8 [rows, width] and scales [rows]; takes the table's tensors out of ``tensors``.

    Raises:
        PackError: a tensor is missing, or does not fit the plan.
    """
    try:
        q_RD = unpack_integers(_take(tensors, table.name, "values"), table.bits, table.width)
        if q_RD.shape[0] != table.rows:
            raise ValueError(f"the plan expects {table.rows} rows, the weight file has {q_RD.shape[0]}")
        return q_RD, _long_scale(_take(tensors, table.name, "scale"), table.rows, 1)
    except _MissingError:
        raise
    except ValueError as error:
        raise PackError(f"{table.name}: {error}") from error


def form_of(gemm: PlannedGemm, tensors: Mapping[str, Tensor]) -> Form:
    """How the matrix of ``gemm`` lies among ``tensors``."""
    found = {part: tensors[key] for part in PARTS if (key := f"{gemm.name}.{part}") in tensors}
    number = f"int{gemm.weight_bits}" if gemm.weight_bits else str(found["values"].dtype).removeprefix("torch.")
    size = sum(t.numel() * t.element_size() for part, t in found.items() if part in ("values", "index", "bitmap"))
    note = ""
    if gemm.unstructured is not None and "bitmap" not in found:
        note = f"{gemm.sparsity} zeros, stored like other values: a bitmap would not be smaller"
    form = gemm.sparsity if gemm.pattern is not None else "bitmap" if "bitmap" in found else "dense"
    return Form(gemm.name, str(form), number, gemm.shape[0] * gemm.shape[1], size, note)


def _dynamic(gemm: PlannedGemm) -> InputQuantization | None:
    """The levels of an input whose range is that of each call; None for all others. Nothing of it is in the file."""
    record = gemm.input or {"method": "none"}
    if record["method"] != "dynamic" and not record.get("dynamic"):
        return None
    bits, qp = int(record["bits"]), (1 << (int(record["bits"]) - 1)) - 1
    if record["method"] == "dynamic":
        return InputQuantization("dynamic", bits, None, None, 0, 2 * qp + 1)
    return InputQuantization("dynamic", bits, None, 0, -qp, qp)


def _take(tensors: Tensors, name: str, part: str) -> Tensor:
    if f"{name}.{part}" not in tensors:
        raise _MissingError(f"the plan expects the tensor {name}.{part}, the weight file has none")
    return tensors.pop(f"{name}.{part}")


def _short_scale(scale_O: Tensor, parts: int) -> Tensor:
    """One scale, or one per part, where that says the same."""
    rows = scale_O.numel()
    for count in (1, parts):
        if rows % count == 0:
            short = scale_O.view(count, -1)[:, :1]
            if bool((scale_O.view(count, -1) == short).all()):
                return short.flatten().clone()
    return scale_O.clone()


def _long_scale(scale: Tensor, rows: int, parts: int) -> Tensor:
    count = scale.numel()
    if count not in (rows, parts, 1) or rows % count or scale.dtype != torch.float32:
        raise ValueError(f"expected 1, {parts} or {rows} float32 scales, found {scale.dtype} {list(scale.shape)}")
    return scale.flatten() if count == rows else scale.flatten().repeat_interleave(rows // count)
