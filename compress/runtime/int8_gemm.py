"""One matrix of int8 weights that multiplies inputs rounded to at most 256 levels, float results.

    y_TO = s_x * s_O * ((levels_TI - z_x) @ q_OI^T) + b_O,   levels = clamp(round(x / s_x) + z_x, low, high)

Three integer kernels compute it. Their sums are exact int32, so they differ by the rounding of floats only.

* native: our own (``native/``), on weights laid out once, everything inside and one pass over the result. Input uint8.
* packed: oneDNN's matmul on weights reordered once, with scales, bias and activation inside. Its input must be uint8: a
  signed input falls to a reference kernel thousands of times slower. So symmetric levels get 128 added and the zero
  point 128, which makes the same integers.
* plain: ``torch._int_mm`` on the weights as they are and int8 levels (asymmetric ones minus 128). It starts in some 5
  microseconds instead of 25, but reorders the weights at every call and needs a second pass for scales and bias (a
  third for a zero point): the better one of PyTorch's two for few rows.

A fourth, dense, is what they must beat: PyTorch's float32 matmul of the dequantized weight with the rounded input. It
takes and gives floats only.

The dtype of a tensor of levels says whether it was made for plain or for the others. Legend: T rows (tokens of the
whole batch), I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantizers import InputQuantization
from . import native
from .levels import SIGN, Levels, check_finite, to_levels
from .native.attention_route import register_attention

Activation = Literal["gelu", "gelu_tanh", "relu"]
Kernel = Literal["plain", "packed", "native", "dense"]
_CAST = frozenset({torch.float16, torch.bfloat16, torch.float64})  # computed in float32, cast in and out

# Per activation: oneDNN's name and algorithm, and a lower bound of its values.
_POST_OPS: dict[Activation | None, tuple[str, str, float]] = {
    None: ("none", "", float("-inf")),
    "gelu": ("gelu", "none", -0.1700),
    "gelu_tanh": ("gelu", "tanh", -0.1701),
    "relu": ("relu", "", 0.0),
}


def prefers_plain(rows: int, out_features: int, in_features: int, activated: bool) -> bool:
    """Whether plain is the faster one of PyTorch's two; measured on two cores with AVX-512 VNNI, 128 to 3072 features.

    One row is a matrix-vector product, always faster unpacked. Otherwise the weights must be small enough to be
    reordered at every call, and the result small enough for a second pass (two more with an activation).
    """
    if rows == 1:
        return True
    return out_features * in_features <= 600_000 and rows * out_features <= (16_384 if activated else 131_072)


class Int8Gemm:
    """One weight matrix ready to multiply. It holds the weights plain and, from a kernel's first use on, in its layout.

    Args:
        weight_q_OI: int8 [O, I]. scale_O: float32 [O]. bias_O: float32 [O] or None.
        input: the levels of the input.
        activation: applied to the result.
        next_input: emit the result as these (static) levels, for the next GEMM, instead of float.
        takes_levels: accept such levels as input; they are those of ``input``.

    ``kernels`` chooses: pairs (largest number of rows, kernel), ascending, of which the last serves all larger numbers
    too (a measured selection sets it); None: native where it is available, else `prefers_plain`.
    """

    def __init__(
        self,
        weight_q_OI: Tensor,
        scale_O: Tensor,
        bias_O: Tensor | None,
        input: InputQuantization,
        activation: Activation | None = None,
        next_input: InputQuantization | None = None,
        takes_levels: bool = False,
    ) -> None:
        self.weight_q_OI = weight_q_OI.detach().contiguous()
        self.scale_O = scale_O.detach().contiguous()
        self.bias_O = None if bias_O is None else bias_O.detach().contiguous()
        self.input = input
        self.activation: Activation | None = activation
        self.next_input = next_input
        self.takes_levels = takes_levels
        self.kernels: tuple[tuple[int, Kernel], ...] | None = None
        self.out_features, self.in_features = weight_q_OI.shape
        self._prepare()

    def _prepare(self) -> None:
        self._plain: tuple[Tensor, Tensor] | None = None
        self._packed: tuple[Tensor, Tensor] | None = None
        self._native: native.NativeGemm | None = None
        self._dense_OI: Tensor | None = None
        none = self.scale_O.new_zeros(0)
        self._levels = Levels.of(self.input, none) if self.input.kind == "static" else None
        self._next = None if self.next_input is None else Levels.of(self.next_input, none)
        self._step_O = None if self._levels is None else self.scale_O * self._levels.scale

    def __getstate__(self) -> dict[str, Any]:
        """Without the layouts: oneDNN's tensors can be neither copied nor pickled, ours hold addresses."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()
        register_attention()  # the model that this comes with may name it

    def candidates(self) -> tuple[Kernel, ...]:
        """The kernels that run this matrix on this machine."""
        own: tuple[Kernel, ...] = ("native",) if self._has_native() else ()
        return (*own, "packed", "plain", "dense")

    def keep_(self, kernels: Collection[str]) -> None:
        """Drop the layouts of all other kernels; a later call makes them anew."""
        self._plain = self._plain if "plain" in kernels else None
        self._packed = self._packed if "packed" in kernels else None
        self._native = self._native if "native" in kernels else None
        self._dense_OI = self._dense_OI if "dense" in kernels else None

    def kernel_for(self, rows: int) -> Kernel:
        """The kernel that an input of this many rows takes."""
        if self.kernels:
            return next((kernel for most, kernel in self.kernels if rows <= most), self.kernels[-1][1])
        if self._has_native():
            return "native"
        activated = self.activation is not None
        return "plain" if prefers_plain(rows, self.out_features, self.in_features, activated) else "packed"

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O], in the dtype of ``x`` unless the result is levels.

        Raises:
            ValueError: the last dimension of ``x`` is not I, or NaN or infinity in it.
            TypeError: ``x`` is not floating point (nor levels, where they are accepted).
            RuntimeError: ``x`` is not on the CPU.
        """
        if torch.compiler.is_compiling():
            return _untraced(self, x)
        return self.run_with(None, x)

    def run_with(self, kernel: Kernel | None, x: Tensor) -> Tensor:
        """As a call, by the named kernel instead of the chosen one. Levels go where they were made for."""
        shape, dtype = x.shape, x.dtype
        if not shape or shape[-1] != self.in_features:
            raise ValueError(f"expected an input of {self.in_features} features, found the shape {list(shape)}")
        if not x.is_cpu:
            raise RuntimeError(f"this int8 matrix is for the CPU, its input is on {x.device}: load the model there")
        x_TI = x if len(shape) == 2 else x.reshape(-1, self.in_features)
        emitted, levels = self._next, self._levels
        kernel = self.kernel_for(x_TI.shape[0]) if kernel is None else kernel
        if dtype is torch.float32 or dtype in _CAST:
            if dtype is not torch.float32:
                x_TI = x_TI.float()
                emitted = None  # levels would not tell the next GEMM which dtype the model works in
            if levels is None:
                levels = Levels.of(self.input, x_TI)
            elif kernel != "native":
                check_finite(x_TI, "the input of an int8 matrix")
            if kernel == "dense":
                y_TO = self._run_dense(x_TI, levels).to(dtype)
                return y_TO if len(shape) == 2 else y_TO.view(*shape[:-1], self.out_features)
            x_TI = native.quantize(x_TI, levels) if kernel == "native" else to_levels(x_TI, levels, kernel == "plain")
        elif self.takes_levels and levels is not None and dtype in (torch.int8, torch.uint8):
            if (dtype is torch.int8) != (kernel == "plain") or kernel == "dense":
                kernel = "plain" if dtype is torch.int8 else "native" if self._has_native() else "packed"
        else:
            raise TypeError(f"expected a floating point input, found {str(dtype).removeprefix('torch.')}")
        if kernel == "native":
            y_TO = self._run_native(x_TI, levels, emitted)
        else:
            y_TO = (self._run_plain if kernel == "plain" else self._run_packed)(x_TI, levels, emitted)
        if dtype in _CAST:
            y_TO = y_TO.to(dtype)
        return y_TO if len(shape) == 2 else y_TO.view(*shape[:-1], self.out_features)

    def static_levels(self) -> Levels:
        """The levels of the input, which must be static."""
        assert self._levels is not None
        return self._levels

    def native_gemm(self) -> native.NativeGemm:
        """The matrix in the native layout, made at the first call."""
        if self._native is None:
            self._native = native.NativeGemm(self.weight_q_OI, self.scale_O, self.bias_O, self.activation)
        return self._native

    def skips_zeros(self) -> bool:
        """Whether the native kernel reads these weights without their zeros."""
        return self._has_native() and self.native_gemm().span != native.DENSE_SPAN

    def _has_native(self) -> bool:
        return self._native is not None or (
            native.available()[0] and native.supported(self.out_features, self.in_features)
        )

    def _run_dense(self, x_TI: Tensor, levels: Levels) -> Tensor:
        if self._dense_OI is None:
            self._dense_OI = self.weight_q_OI.float().mul_(self.scale_O[:, None])
        x_TI = torch.fake_quantize_per_tensor_affine(x_TI, levels.scale, levels.zero_point, levels.low, levels.high)
        return self._activated(F.linear(x_TI, self._dense_OI, self.bias_O))

    def _activated(self, y_TO: Tensor) -> Tensor:
        if self.activation == "relu":
            return F.relu(y_TO)
        if self.activation is not None:
            return F.gelu(y_TO, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return y_TO

    def _run_native(self, level_TI: Tensor, levels: Levels, emitted: Levels | None) -> Tensor:
        return (self._native or self.native_gemm())(level_TI, levels, emitted)

    def _run_plain(self, level_TI: Tensor, levels: Levels, emitted: Levels | None) -> Tensor:
        if self._plain is None:
            self._plain = (self.weight_q_OI.t(), self.weight_q_OI.sum(1, dtype=torch.int32))
        weight_q_IO, sum_O = self._plain
        sum_TO = torch._int_mm(level_TI, weight_q_IO)
        if levels.zero_point != SIGN:  # in integers: the result stays exact
            sum_TO.sub_(sum_O * (levels.zero_point - SIGN))
        y_TO = sum_TO.float()
        step_O = self.scale_O * levels.scale if self._step_O is None else self._step_O
        y_TO = y_TO.mul_(step_O) if self.bias_O is None else torch.addcmul(self.bias_O, y_TO, step_O)
        y_TO = self._activated(y_TO)
        return y_TO if emitted is None else to_levels(y_TO, emitted, signed=True)

    def _run_packed(self, level_TI: Tensor, levels: Levels, emitted: Levels | None) -> Tensor:
        if self._packed is None:
            packed = torch.ops.onednn.qlinear_prepack(self.weight_q_OI, None)
            self._packed = (packed, torch.zeros(self.out_features, dtype=torch.int32))
        post_op, algorithm, smallest = _POST_OPS[self.activation]
        y_TO = torch.ops.onednn.qlinear_pointwise.default(
            level_TI,
            levels.scale,
            levels.zero_point,
            self._packed[0],
            self.scale_O,
            self._packed[1],
            self.bias_O,
            1.0 if emitted is None else emitted.scale,
            0 if emitted is None else emitted.zero_point,
            torch.float32 if emitted is None else torch.uint8,
            post_op,
            [],
            algorithm,
        )
        # It saturates at 0 and 255. GELU and ReLU reach the levels below ``low`` at tiny steps only.
        if emitted is not None and emitted.high < 255:
            y_TO.clamp_(emitted.low, emitted.high)
        elif emitted is not None and smallest < (emitted.low - emitted.zero_point) * emitted.scale:
            y_TO.clamp_(min=emitted.low)
        return y_TO


@torch.compiler.disable
def _untraced(gemm: Int8Gemm, x: Tensor) -> Tensor:
    """The call under ``torch.compile``, which cannot follow addresses: it breaks the graph here."""
    return gemm.run_with(None, x)
