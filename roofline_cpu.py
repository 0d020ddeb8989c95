"""The runtime's int8 GEMMs, for the roofline model of this CPU to time: the evaluation knows no kernels of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .compress.masks import Pattern, magnitude_mask
from .compress.quantizers import InputQuantization
from .compress.runtime import int8_supported
from .compress.runtime.int8_gemm import Int8Gemm
from .eval.roofline_fit import MakeGemm


def int8_kernels() -> dict[str, MakeGemm]:
    """``int8`` and, where the kernels skip zeros on this CPU, ``int8_2:4``, for `eval.roofline_fit.this_cpu`.

    A call takes floats and gives floats: rounding the input is part of its time, although in a model several GEMMs may
    share it. Empty where this machine cannot run int8.
    """
    if not int8_supported()[0]:
        return {}
    kernels: dict[str, MakeGemm] = {"int8": _maker(None)}
    if _gemm(64, 64, Pattern(2, 4)).skips_zeros():
        kernels["int8_2:4"] = _maker(Pattern(2, 4))
    return kernels


def _maker(pattern: Pattern | None) -> MakeGemm:
    def make(m: int, k: int, n_out: int) -> Callable[[], object]:
        gemm, x_TI = _gemm(n_out, k, pattern), torch.randn(m, k)
        return lambda: gemm(x_TI)

    return make


def _gemm(n_out: int, k: int, pattern: Pattern | None) -> Int8Gemm:
    """Random int8 weights, an input of 255 static levels."""
    q_OI = torch.randint(1, 128, (n_out, k), dtype=torch.int8)  # no zeros but those of the pattern
    if pattern is not None:
        q_OI *= magnitude_mask(q_OI.float(), pattern)
    levels = InputQuantization("static", 8, 4 / 127, 0, -127, 127)
    return Int8Gemm(q_OI, torch.full((n_out,), 1e-3), torch.zeros(n_out), levels)
