"""What surrounds an integer GEMM on a GPU, each as one Triton kernel: rounding its input (also behind LayerNorm), and
scales, bias, activation and rounding of its result.

Every function has a plain form in PyTorch, taken where Triton does not run and while ``torch.compile`` traces: inductor
then joins it with its neighbours itself. Both round half to even after a true division, as the reference does.
Legend: T rows (tokens of the whole batch), I in_features, O out_features, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quantizers import InputQuantization
from .int8_gemm import Activation
from .nonfinite import NonFinite
from .triton_support import triton_runs

_WIDEST = 1 << 14  # a row is held by one program


@dataclass(frozen=True)
class Int8Levels:
    """Static levels of an input as the int8 numbers that CUDA kernels multiply: ``x ~ (level - shift) * scale``.

    Symmetric levels are what they are (``shift`` 0); those of 0..255 get 128 subtracted. ``low`` and ``high`` bound the
    rounded ``x / scale``.
    """

    scale: float
    low: int
    high: int
    shift: int

    @classmethod
    def of(cls, found: InputQuantization, scale: float, zero_point: int) -> Int8Levels:
        sign = 128 if found.qmin == 0 and found.qmax > 127 else 0
        return cls(scale, found.qmin - zero_point, found.qmax - zero_point, zero_point - sign)


def fused_kernels(x: Tensor) -> bool:
    """Whether the Triton forms are taken for ``x``: not while compiling, where Triton runs."""
    return not torch.compiler.is_compiling() and triton_runs(x.device)[0]


def quantize(x_TI: Tensor, levels: Int8Levels, seen: NonFinite | None = None) -> Tensor:
    """int8 levels of the shape of ``x_TI``. NaN becomes some level, and ``seen`` remembers it, as it does infinity."""
    if not fused_kernels(x_TI):
        return _plain_levels(x_TI.float(), levels, seen)
    from . import triton_quantize_kernels as kernels

    x_TI = x_TI.contiguous()
    level_TI = torch.empty_like(x_TI, dtype=torch.int8)
    if size := x_TI.numel():
        with _on(x_TI):
            kernels.quantize_kernel[(-(-size // 2048),)](
                x_TI, level_TI, _mark(seen, x_TI), size, levels.scale, float(levels.low), float(levels.high),
                levels.shift, SEE=seen is not None, BLOCK=2048,
            )  # fmt: skip
    return level_TI


def rounded(x_TI: Tensor, levels: Int8Levels, dtype: torch.dtype) -> Tensor:
    """``x_TI`` rounded and clipped to its levels, as ``dtype``: what a kernel without integers multiplies. NaN and
    infinity become NaN."""
    if not fused_kernels(x_TI):
        wide_TI = x_TI.float()
        step_TI = (wide_TI / levels.scale).round().clamp(levels.low, levels.high)
        return (step_TI * levels.scale + (wide_TI - wide_TI)).to(dtype)
    from . import triton_quantize_kernels as kernels

    x_TI = x_TI.contiguous()
    out_TI = torch.empty_like(x_TI, dtype=dtype)
    if size := x_TI.numel():
        with _on(x_TI):
            kernels.round_kernel[(-(-size // 2048),)](
                x_TI, out_TI, size, levels.scale, float(levels.low), float(levels.high), BLOCK=2048
            )
    return out_TI


def quantize_rows(x_TI: Tensor, highest: int = 127) -> tuple[Tensor, Tensor]:
    """int8 levels -highest..highest and float32 scales [T], each row by its largest magnitude (per token); the scale of
    a row with NaN or infinity is NaN."""
    if not fused_kernels(x_TI) or x_TI.shape[1] > _WIDEST:
        wide_TI = x_TI.float()
        scale_T = wide_TI.abs().amax(1) / highest
        scale_T = torch.where(scale_T < torch.finfo(torch.float32).tiny, 1.0, scale_T) + (scale_T - scale_T)
        return (wide_TI / scale_T[:, None]).round().clamp(-highest, highest).to(torch.int8), scale_T
    from . import triton_quantize_kernels as kernels

    x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
    rows, width = x_TI.shape
    level_TI = torch.empty(rows, width, dtype=torch.int8, device=x_TI.device)
    scale_T = torch.empty(rows, dtype=torch.float32, device=x_TI.device)
    if rows:
        with _on(x_TI):
            kernels.quantize_rows_kernel[(rows,)](
                x_TI, level_TI, scale_T, width, x_TI.stride(0), float(highest), BLOCK=_power(width)
            )
    return level_TI, scale_T


def finish(
    sum_TO: Tensor,
    *,
    step_O: Tensor | None = None,
    row_T: Tensor | None = None,
    correction_O: Tensor | None = None,
    bias_O: Tensor | None = None,
    activation: Activation | None = None,
    emit: Int8Levels | None = None,
    dtype: torch.dtype = torch.float32,
    seen: NonFinite | None = None,
) -> Tensor:
    """``act((sum + correction_O) * step_O * row_T + bias_O)`` as ``dtype``, or as the levels ``emit``: [T, O].

    Args:
        sum_TO: int32, or a floating result that has its scales already; rows may be apart, columns not.
        step_O, row_T, bias_O: float32. correction_O: int32, with an int32 ``sum_TO`` only.
        seen: remembers NaN and infinity among what becomes levels.
    """
    if not fused_kernels(sum_TO):
        y_TO = (sum_TO if correction_O is None else sum_TO + correction_O).float()
        y_TO = y_TO if step_O is None else y_TO * step_O
        y_TO = y_TO if row_T is None else y_TO * row_T[:, None]
        y_TO = activated(y_TO if bias_O is None else y_TO + bias_O, activation)
        return y_TO.to(dtype) if emit is None else _plain_levels(y_TO, emit, seen)
    from . import triton_quantize_kernels as kernels

    rows, features = sum_TO.shape
    out_TO = torch.empty(rows, features, dtype=dtype if emit is None else torch.int8, device=sum_TO.device)
    found = emit or Int8Levels(1.0, 0, 0, 0)
    if out_TO.numel():
        with _on(sum_TO):
            kernels.finish_kernel[(-(-rows // 8), -(-features // 256))](
                sum_TO, out_TO, *(sum_TO if x is None else x for x in (step_O, row_T, correction_O, bias_O)),
                _mark(seen, sum_TO), rows, features, sum_TO.stride(0),
                found.scale, float(found.low), float(found.high), found.shift,
                STEP=step_O is not None, ROW=row_T is not None, CORRECTION=correction_O is not None,
                BIAS=bias_O is not None, ACTIVATION=activation or "", EMIT=emit is not None,
                SEE=seen is not None, BLOCK_T=8, BLOCK_O=256,
            )  # fmt: skip
    return out_TO


def layer_norm(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    levels: Int8Levels | None,
    seen: NonFinite | None = None,
) -> tuple[Tensor, Tensor | None]:
    """LayerNorm of ``x`` (+ ``residual``) in the dtype of ``x``, and its int8 levels where ``levels`` are given; then
    ``seen`` remembers NaN and infinity."""
    if not fused_kernels(x_TD) or x_TD.shape[1] > _WIDEST:
        x_TD = x_TD if residual_TD is None else x_TD + residual_TD
        y_TD = F.layer_norm(x_TD, x_TD.shape[-1:], weight_D, bias_D, eps)
        return y_TD, None if levels is None else _plain_levels(y_TD.float(), levels, seen)
    from . import triton_quantize_kernels as kernels

    rows, width = x_TD.shape
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    if residual_TD is not None and residual_TD.stride(1) != 1:
        residual_TD = residual_TD.contiguous()
    y_TD = torch.empty(rows, width, dtype=x_TD.dtype, device=x_TD.device)
    level_TD = None if levels is None else torch.empty(rows, width, dtype=torch.int8, device=x_TD.device)
    found = levels or Int8Levels(1.0, 0, 0, 0)
    if rows:
        with _on(x_TD):
            kernels.layer_norm_kernel[(rows,)](
                x_TD, *(x_TD if x is None else x for x in (residual_TD, weight_D, bias_D)), y_TD,
                y_TD if level_TD is None else level_TD, _mark(seen, y_TD), width, x_TD.stride(0),
                0 if residual_TD is None else residual_TD.stride(0), eps,
                found.scale, float(found.low), float(found.high), found.shift,
                RESIDUAL=residual_TD is not None, WEIGHT=weight_D is not None, BIAS=bias_D is not None,
                EMIT=levels is not None, SEE=seen is not None,
                BLOCK=_power(width),
            )  # fmt: skip
    return y_TD, level_TD


def activated(y: Tensor, activation: Activation | None) -> Tensor:
    if activation is None:
        return y
    if activation == "relu":
        return F.relu(y)
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def _mark(seen: NonFinite | None, unused: Tensor) -> Tensor:
    return unused if seen is None else seen.mark


def _plain_levels(x: Tensor, levels: Int8Levels, seen: NonFinite | None = None) -> Tensor:
    if seen is not None:
        seen.see(x)
    return ((x / levels.scale).round().clamp(levels.low, levels.high) + levels.shift).to(torch.int8)


def _power(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _on(x: Tensor) -> torch.cuda.device:
    """Triton launches on the current device, which need not be that of ``x``."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
