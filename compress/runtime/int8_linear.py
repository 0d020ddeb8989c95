"""Linear modules that multiply integers: int8 weights, inputs rounded to at most 256 levels, float results.

    y_TO = s_x * s_O * ((levels_TI - z_x) @ q_OI^T) + b_O,   levels = clamp(round(x / s_x) + z_x, low, high)

Two kernels of PyTorch compute it. Their sums are exact int32, so they differ by the rounding of floats only.

* packed: oneDNN's matmul on weights reordered once, with scales, bias and activation inside. Its input must be uint8: a
  signed input falls to a reference kernel thousands of times slower. So symmetric levels get 128 added and the zero
  point 128, which makes the same integers.
* plain: ``torch._int_mm`` on the weights as they are and int8 levels (asymmetric ones minus 128). It starts in some 5
  microseconds instead of 25, but reorders the weights at every call and needs a second pass for scales and bias (a
  third for a zero point): the better one for few rows.

The dtype of a tensor of levels says for which of the two it was made. Legend: T rows (tokens of the whole batch),
I in_features, O out_features.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizers import InputQuantization
from .levels import SIGN, Levels, to_levels

Activation = Literal["gelu", "gelu_tanh", "relu"]
_CAST = frozenset({torch.float16, torch.bfloat16, torch.float64})  # computed in float32, cast in and out

# Per activation: oneDNN's name and algorithm, and a lower bound of its values.
_POST_OPS: dict[Activation | None, tuple[str, str, float]] = {
    None: ("none", "", float("-inf")),
    "gelu": ("gelu", "none", -0.1700),
    "gelu_tanh": ("gelu", "tanh", -0.1701),
    "relu": ("relu", "", 0.0),
}


def prefers_plain(rows: int, out_features: int, in_features: int, activated: bool) -> bool:
    """Whether the plain kernel is the faster one; measured on two cores with AVX-512 VNNI, 128 to 3072 features.

    One row is a matrix-vector product, always faster unpacked. Otherwise the weights must be small enough to be
    reordered at every call, and the result small enough for a second pass (two more with an activation).
    """
    if rows == 1:
        return True
    return out_features * in_features <= 600_000 and rows * out_features <= (16_384 if activated else 131_072)


class Int8Gemm:
    """One weight matrix ready to multiply. It holds the weights plain and packed: 2 bytes for each.

    Args:
        weight_q_OI: int8 [O, I]. scale_O: float32 [O]. bias_O: float32 [O] or None.
        input: the levels of the input.
        activation: applied to the result.
        next_input: emit the result as these (static) levels, for the next GEMM, instead of float.
        takes_levels: accept such levels as input; they are those of ``input``.
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
        self.out_features, self.in_features = weight_q_OI.shape
        self._pack()

    def _pack(self) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(self.weight_q_OI, None)
        self._zero_points_O = torch.zeros(self.out_features, dtype=torch.int32)
        self._weight_q_IO = self.weight_q_OI.t()
        self._sum_O = self.weight_q_OI.sum(1, dtype=torch.int32)
        none = self.scale_O.new_zeros(0)
        self._levels = Levels.of(self.input, none) if self.input.kind == "static" else None
        self._next = None if self.next_input is None else Levels.of(self.next_input, none)
        self._step_O = None if self._levels is None else self.scale_O * self._levels.scale

    def __getstate__(self) -> dict[str, Any]:
        """Without the packed weights: oneDNN's tensors can be neither copied nor pickled."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pack()

    def __call__(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O], in the dtype of ``x`` unless the result is levels.

        Raises:
            ValueError: the last dimension of ``x`` is not I.
            TypeError: ``x`` is not floating point (nor levels, where they are accepted).
        """
        shape, dtype = x.shape, x.dtype
        if not shape or shape[-1] != self.in_features:
            raise ValueError(f"expected an input of {self.in_features} features, found the shape {list(shape)}")
        x_TI = x if len(shape) == 2 else x.reshape(-1, self.in_features)
        emitted = self._next
        levels = self._levels
        if dtype is torch.float32 or dtype in _CAST:
            if dtype is not torch.float32:
                x_TI = x_TI.float()
                emitted = None  # levels would not tell the next GEMM which dtype the model works in
            if levels is None:
                levels = Levels.of(self.input, x_TI)
            plain = prefers_plain(x_TI.shape[0], self.out_features, self.in_features, self.activation is not None)
            x_TI = to_levels(x_TI, levels, signed=plain)
        elif self.takes_levels and levels is not None and dtype in (torch.int8, torch.uint8):
            plain = dtype is torch.int8
        else:
            raise TypeError(f"expected a floating point input, found {str(dtype).removeprefix('torch.')}")
        y_TO = self._run_plain(x_TI, levels, emitted) if plain else self._run_packed(x_TI, levels, emitted)
        if dtype in _CAST:
            y_TO = y_TO.to(dtype)
        return y_TO if len(shape) == 2 else y_TO.view(*shape[:-1], self.out_features)

    def _run_plain(self, level_TI: Tensor, levels: Levels, emitted: Levels | None) -> Tensor:
        sum_TO = torch._int_mm(level_TI, self._weight_q_IO)
        if levels.zero_point != SIGN:  # in integers: the result stays exact
            sum_TO.sub_(self._sum_O * (levels.zero_point - SIGN))
        y_TO = sum_TO.float()
        step_O = self.scale_O * levels.scale if self._step_O is None else self._step_O
        y_TO = y_TO.mul_(step_O) if self.bias_O is None else torch.addcmul(self.bias_O, y_TO, step_O)
        if self.activation == "relu":
            y_TO = F.relu(y_TO)
        elif self.activation is not None:
            y_TO = F.gelu(y_TO, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return y_TO if emitted is None else to_levels(y_TO, emitted, signed=True)

    def _run_packed(self, level_TI: Tensor, levels: Levels, emitted: Levels | None) -> Tensor:
        post_op, algorithm, smallest = _POST_OPS[self.activation]
        y_TO = torch.ops.onednn.qlinear_pointwise.default(
            level_TI,
            levels.scale,
            levels.zero_point,
            self._packed,
            self.scale_O,
            self._zero_points_O,
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


class SharedInput:
    """Several GEMMs of one input as one: the first caller computes all, the others are handed their rows.

    The results wait in one attribute, together with the tensor they belong to, and leave it when they are fetched, or
    when that tensor dies. Another tensor, an altered one, or another thread in between only means that the GEMM runs
    again: each step takes or replaces the attribute as a whole. (Inference tensors do not record alterations; one that
    is changed in place between two of the callers is taken for the same.)
    """

    def __init__(self, gemm: Int8Gemm, sizes: tuple[int, ...]) -> None:
        self.gemm = gemm
        self.sizes = sizes
        self._waiting: tuple[weakref.ref[Tensor], int, tuple[Tensor | None, ...]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"gemm": self.gemm, "sizes": self.sizes, "_waiting": None}

    def take(self, index: int, x: Tensor) -> Tensor:
        """Result ``index`` for the input ``x``: a view of [..., sum(sizes)]."""
        version = -1 if x.is_inference() else x._version
        waiting = self._waiting
        result = waiting[2][index] if waiting is not None and waiting[0]() is x and waiting[1] == version else None
        if waiting is not None and result is not None:
            owner, results = waiting[0], waiting[2]
        else:
            results = self.gemm(x).split(self.sizes, dim=-1)
            owner, result = weakref.ref(x, self._forget), results[index]
        others = (*results[:index], None, *results[index + 1 :])
        self._waiting = (owner, version, others) if any(other is not None for other in others) else None
        return result

    def _forget(self, owner: weakref.ref[Tensor]) -> None:
        waiting = self._waiting
        if waiting is not None and waiting[0] is owner:
            self._waiting = None


class _InferenceOnly(nn.Module):
    """No parameters, no gradients, nothing to save."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> _InferenceOnly:
        if mode:
            raise RuntimeError(
                "an int8 model is for inference only and stays in evaluation mode (eval() restores it everywhere); "
                "train the model that it was made from"
            )
        return super().train(False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        raise RuntimeError(
            f"{prefix.rstrip('.')} is an int8 runtime module without parameters, so a state dict of this model would "
            "be incomplete: keep the checkpoint that it was loaded from, or save the model before use_int8_"
        )


class Int8Linear(_InferenceOnly):
    """In the place of one linear: its own GEMM."""

    def __init__(self, gemm: Int8Gemm) -> None:
        super().__init__()
        self.gemm = gemm
        self.in_features, self.out_features = gemm.in_features, gemm.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.gemm(x)

    def extra_repr(self) -> str:
        fused = f", activation={self.gemm.activation}" if self.gemm.activation else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{fused}"


class Int8Slice(_InferenceOnly):
    """In the place of one linear of several that read the same tensor: some rows of a common GEMM."""

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self.shared = shared
        self.index = index
        self.in_features, self.out_features = shared.gemm.in_features, shared.sizes[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.take(self.index, x)

    def extra_repr(self) -> str:
        part = f"part {self.index + 1} of {len(self.shared.sizes)}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {part}"
