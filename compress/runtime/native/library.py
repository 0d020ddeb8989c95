"""The compiled kernels as Python functions: records as C sees them, argument types, and whether they run here."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any

import torch

from ..levels import Levels
from .build import BuildError, library_path

NEEDED = ("avx512_f", "avx512_cd", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni", "fma3", "f16c", "bmi2")
_P, _I64, _I32, _F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class CLevels(ctypes.Structure):
    _fields_ = [("scale", _F32), ("zero_point", _I32), ("low", _I32), ("high", _I32)]


class CGemm(ctypes.Structure):
    _fields_ = [
        ("panels", _P), ("sum_O", _P), ("scale_O", _P), ("bias_O", _P),
        ("outputs", _I64), ("inputs", _I64), ("activation", _I32), ("span", _I32),
    ]  # fmt: skip


class CNorm(ctypes.Structure):
    _fields_ = [("weight", _P), ("bias", _P), ("width", _I64), ("epsilon", _F32)]


class CAttention(ctypes.Structure):
    _fields_ = [
        ("batch", _I64), ("heads", _I64), ("queries", _I64), ("keys", _I64), ("width", _I64),
        ("q_stride", _I64 * 3), ("k_stride", _I64 * 3), ("v_stride", _I64 * 3),
        ("heads_per_group", _I64), ("scale", _F32), ("causal", _I32), ("bfloat16", _I32),
    ]  # fmt: skip


class CMask(ctypes.Structure):
    _fields_ = [("at", _P), ("is_bool", _I32), ("stride", _I64 * 3)]


class CMapLevels(ctypes.Structure):
    _fields_ = [("q", CLevels), ("k", CLevels), ("p", CLevels), ("v", CLevels)]


class CBlock(ctypes.Structure):
    _fields_ = [
        ("qkv", CGemm), ("out", CGemm), ("up", CGemm), ("down", CGemm),
        ("of_qkv", CLevels), ("of_out", CLevels), ("of_up", CLevels), ("of_down", CLevels),
        ("attention_norm", CNorm), ("ffn_norm", CNorm),
        ("heads", _I64), ("head_width", _I64), ("scale", _F32), ("norm_first", _I32), ("bfloat16", _I32),
        ("has_map", _I32), ("map", CMapLevels),
    ]  # fmt: skip


@lru_cache(maxsize=4096)
def c_levels(levels: Levels) -> CLevels:
    """The record for C; a model has few different ones."""
    return CLevels(levels.scale, levels.zero_point, levels.low, levels.high)


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "sq_span": (_I32, [_P, _I64, _I64]),
    "sq_two_of_four": (_I32, [_P, _I64, _I64]),
    "sq_packed_size": (_I64, [_I64, _I64, _I32]),
    "sq_pack": (None, [_P, _I64, _I64, _I32, _P, _I32]),
    "sq_gemm": (None, [_P, _P, _I64, _I64, _F32, _I32, _P, _P, _P, _I32]),
    "sq_quantize": (_I32, [_P, _I64, _I64, _P, _P, _I32]),
    "sq_normalize": (None, [_P, _I64, _P, _P, _P, _P, _I32]),
    "sq_has_bfloat16": (_I32, []),
    "sq_attention": (None, [_P, _P, _P, _P, _P, _P, _P, _P, _I32]),
    "sq_block": (_I32, [_P, _P, _I64, _I64, _P, _P, _I32]),
}


@cache
def load() -> Any:
    """The library with its functions typed.

    Raises:
        BuildError: it cannot be compiled or loaded here, or this CPU lacks its instructions.
    """
    missing = missing_instructions()
    if missing:
        raise BuildError(f"the CPU lacks {', '.join(missing)}, which the native kernels are made of")
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the native kernels cannot be loaded: {error}") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def missing_instructions() -> list[str]:
    """Those that the kernels are made of and this CPU lacks."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return ["a PyTorch that can name its instructions (torch.cpu.get_capabilities)"]
    found = torch.cpu.get_capabilities()
    return [name for name in NEEDED if not found.get(name)]
