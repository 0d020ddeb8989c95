"""Quantized GEMMs in an ONNX graph: what stands where `onnx_trace.mark_` left a node per GEMM.

    static input    x -> Clip -> QuantizeLinear -> DequantizeLinear -+
                    W (int8) -> DequantizeLinear (axis 1) -----------+-> MatMul -> y
    dynamic input   x -> DynamicQuantizeLinear -+
                    W (int8) -------------------+-> MatMulInteger -> Cast -> Mul (both scales) -> y
    float input     W (int8) -> DequantizeLinear (axis 1) -> MatMul -> y

ONNX Runtime (1.31) runs the first as MatMulIntegerToFloat, the second as DynamicQuantizeMatMul, and the third as
MatMulNBits. It makes a float Gemm of an x of rank 2 in the first form, so such a GEMM has the second form with its
static scale. What it folds at load is used to keep the file small: weights of 2 to 4 bits lie in it as int4, which no
integer kernel reads, before a Cast to int8, and large float tensors that float16 holds exactly before a Cast to float.
Rounded inputs are uint8 everywhere, symmetric ones around 128: its x86 kernels take no other, and it changes an int8
input that several GEMMs read to float ones. Clip keeps to the levels where they are not all 256 of uint8: a level -128
beside -127..127 moves single outputs of trained models far.

Legend: O out_features, I in_features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compressed_tensors import ExportError
from .onnx_trace import DOMAIN, NODE
from .packing import pack_bits
from .quantizers import InputQuantization

INT4_BITS, INT4_OPSET = range(2, 5), 21
_LARGE = 1 << 16  # elements of a float tensor that is worth a Cast


@dataclass(frozen=True, eq=False)
class Matrix:
    """One GEMM as it goes into the file.

    Args:
        w_OI: int8 with scales float32 [O], or float32 with None. bits: width of the integers. levels: of the input.
    """

    w_OI: Tensor = field(repr=False)
    scale_O: Tensor | None = field(repr=False)
    bits: int | None
    levels: InputQuantization | None


def put_matrices_(model: Any, matrices: Mapping[str, Matrix]) -> None:
    """Replace every marked node of an ``onnx.ModelProto`` by its quantized GEMM, in place.

    Raises:
        ExportError: a GEMM that the graph does not hold exactly once; nothing has been changed then.
    """
    graph = model.graph
    count = Counter(_attributes(node)["name"] for node in graph.node if (node.domain, node.op_type) == (DOMAIN, NODE))
    for name in matrices:
        if count[name] != 1:
            raise ExportError(
                f"{name} stands {count[name]} times in the traced model, expected once: its module is not called as a "
                "module, or several times; export with --to dense instead"
            )
    builder = _Builder()
    for node in list(graph.node):
        if node.domain == DOMAIN:
            marked = _attributes(node)
            builder.gemm_(marked["name"], node.input[0], node.output[0], matrices[marked["name"]], marked["rank"])
        else:
            builder.nodes.append(node)
    del graph.node[:]
    graph.node.extend(builder.nodes)
    graph.initializer.extend(builder.initializers.values())
    kept = [opset for opset in model.opset_import if opset.domain != DOMAIN]
    if builder.has_int4:
        for opset in kept:  # 21 only adds types to the operators of 20 that are used here
            opset.version = INT4_OPSET if opset.domain == "" else opset.version
        model.ir_version = max(model.ir_version, 10)
    del model.opset_import[:]
    model.opset_import.extend(kept)


def halve_floats_(graph: Any) -> None:
    """Store large float32 tensors as float16 where that is exact, as the checkpoint does."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < _LARGE:
            continue
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.array_equal(half.astype(np.float32), values):
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.float16"))
            casts.append(helper.make_node("Cast", [f"{name}.float16"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _attributes(node: Any) -> dict[str, Any]:
    found = {attribute.name: attribute for attribute in node.attribute}
    return {"name": found["name"].s.decode(), "rank": found["rank"].i}


class _Builder:
    """Collects the nodes and tensors of a graph; an input that several GEMMs read is quantized once."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.has_int4 = False
        self._integers: dict[tuple[str, InputQuantization], tuple[str, str, str]] = {}
        self._floats: dict[tuple[str, InputQuantization], str] = {}

    def gemm_(self, name: str, x: str, y: str, matrix: Matrix, rank: int) -> None:
        levels = matrix.levels
        weight = self._weight_(name, matrix)
        if levels is not None and matrix.scale_O is not None and (levels.kind == "dynamic" or rank == 2):
            integers, scale, zero_point = self._integers_(name, x, levels)
            self._node_("MatMulInteger", [integers, weight, zero_point], f"{name}.sum")
            self._node_("Cast", [f"{name}.sum"], f"{name}.sum_float", to=1)
            self._node_("Mul", [scale, f"{name}.weight_scale"], f"{name}.scale")
            self._node_("Mul", [f"{name}.sum_float", f"{name}.scale"], y)
            return
        if matrix.scale_O is not None:
            weight = self._node_("DequantizeLinear", [weight, f"{name}.weight_scale"], f"{name}.weight_float", axis=1)
        self._node_("MatMul", [x if levels is None else self._rounded_(name, x, levels), weight], y)

    def _weight_(self, name: str, matrix: Matrix) -> str:
        """The matrix [I, O], integers as int8 with their scales beside them; the name of the result."""
        from onnx import TensorProto, helper

        w_IO = matrix.w_OI.t().contiguous()
        if matrix.scale_O is None:
            return self._tensor_(f"{name}.weight", w_IO.float())
        self._tensor_(f"{name}.weight_scale", matrix.scale_O)
        if matrix.bits not in INT4_BITS:
            return self._tensor_(f"{name}.weight_quantized", w_IO)
        self.has_int4 = True
        packed = pack_bits(w_IO.view(torch.uint8).bitwise_and(15).view(1, -1), 4)  # two's complement, low nibble first
        self.initializers[f"{name}.weight_int4"] = helper.make_tensor(
            f"{name}.weight_int4", TensorProto.INT4, list(w_IO.shape), packed.numpy().tobytes(), raw=True
        )
        return self._node_("Cast", [f"{name}.weight_int4"], f"{name}.weight_quantized", to=TensorProto.INT8)

    def _rounded_(self, name: str, x: str, levels: InputQuantization) -> str:
        """``x`` rounded to its levels, as float."""
        key = (x, levels)
        if key not in self._floats:
            rounded = f"{name}.input_rounded"
            self._floats[key] = self._node_("DequantizeLinear", list(self._integers_(name, x, levels)), rounded)
        return self._floats[key]

    def _integers_(self, name: str, x: str, levels: InputQuantization) -> tuple[str, str, str]:
        """Names of the integers of ``x``, of their scale and of their zero point."""
        key = (x, levels)
        if key not in self._integers:
            names = (f"{name}.input_quantized", f"{name}.input_scale", f"{name}.input_zero_point")
            self._quantize_(x, levels, *names)
            self._integers[key] = names
        return self._integers[key]

    def _quantize_(self, x: str, levels: InputQuantization, integers: str, scale: str, zero_point: str) -> None:
        from onnx import helper

        symmetric, zero = levels.qmin < 0, levels.zero_point or 0
        if levels.kind == "static":
            assert levels.scale is not None
            step = torch.tensor(levels.scale)
            self._tensor_(scale, step)
            self._tensor_(zero_point, torch.tensor(zero + 128 * symmetric, dtype=torch.uint8))
            ends = []
            if levels.qmin != 0 or levels.bits < 8:  # QuantizeLinear saturates at 0 and 255, here at -128 and 127
                ends.append(self._tensor_(f"{integers}_lowest", step * (levels.qmin - zero)))
            if levels.bits < 8:
                ends.append(self._tensor_(f"{integers}_highest", step * (levels.qmax - zero)))
            x = self._node_("Clip", [x, *ends], f"{integers}_clipped") if ends else x
            self._node_("QuantizeLinear", [x, scale, zero_point], integers)
        elif symmetric:
            self._tensor_(zero_point, torch.tensor(128, dtype=torch.uint8))
            largest = self._tensor_(f"{integers}_qmax", torch.tensor(float(levels.qmax)))
            # Never 0, which has no quotient.
            tiny = self._tensor_(f"{integers}_tiny", torch.tensor(torch.finfo(torch.float32).tiny))
            self._node_("Abs", [x], f"{integers}_abs")
            self._node_("ReduceMax", [f"{integers}_abs"], f"{integers}_range", keepdims=0)
            self._node_("Div", [f"{integers}_range", largest], f"{integers}_step")
            self._node_("Max", [f"{integers}_step", tiny], scale)
            self._node_("QuantizeLinear", [x, scale, zero_point], integers)
        else:
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], [integers, scale, zero_point]))

    def _tensor_(self, name: str, tensor: Tensor) -> str:
        from onnx import numpy_helper

        self.initializers[name] = numpy_helper.from_array(tensor.numpy(), name)
        return name

    def _node_(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes))
        return output
