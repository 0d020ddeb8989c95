"""Operators that have no CPU form. cuSPARSELt's by their definition, y = alpha (A_2:4 B) + bias: they refuse what
PyTorch's own refuse (dtypes, ``out_dtype``, the order of B) and what the library does (sizes that are no multiples,
weights that are not 2:4)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_FACTOR = {
    torch.int8: 10,
    torch.float8_e4m3fn: 10,
    torch.float16: 9,
    torch.bfloat16: 9,
}  # /16 of it
_RESULTS = {
    torch.int8: (torch.int8, torch.int32, torch.float16, torch.bfloat16),
    torch.float8_e4m3fn: (torch.float8_e4m3fn, torch.float32, torch.float16, torch.bfloat16),
}
_library: list[torch.library.Library] = []  # what it registers goes when it goes


def install(synchronize: Callable[[], None]) -> None:
    def search(
        compressed: Tensor,
        b: Tensor,
        bias: Any = None,
        alpha: Any = None,
        out: Any = None,
        transpose: bool = False,
    ) -> int:
        synchronize()
        sparse_mm(compressed, b, bias, alpha, out, transpose)
        return 0

    library = torch.library.Library("aten", "IMPL")
    library.impl("bmm.dtype", lambda a, b, dtype: torch.bmm(a.to(dtype), b.to(dtype)), "CUDA")
    library.impl("_cslt_compress", compress, "CUDA")
    library.impl("_cslt_sparse_mm", sparse_mm, "CUDA")
    library.impl("_cslt_sparse_mm_search", search, "CUDA")
    _library.append(library)
    torch._C._cusparselt = SimpleNamespace(mm_search=lambda *args: (search(*args), 1, -1, 1))
    torch.backends.cusparselt.is_available = lambda: True


def compress(w_OI: Tensor) -> Tensor:
    """[O I factor / 16]: values, then two bits for the place of each; the real form differs and is as opaque."""
    if w_OI.dtype not in _FACTOR:
        raise RuntimeError("Unsupported dtype for cuSPARSELt compressed matrix")
    _check_sizes(w_OI.shape, w_OI.dtype)
    if not w_OI.is_contiguous():
        raise RuntimeError("cuSPARSELt reads the rows as they lie")
    groups_G4 = torch.ops.emulated.host(w_OI).view(_whole(w_OI)).view(-1, 4)
    if int((groups_G4 != 0).sum(1).max()) > 2:
        raise RuntimeError("the matrix is not 2:4")
    places_G2 = (groups_G4 == 0).to(torch.int8).argsort(dim=1, stable=True)[:, :2].sort(1).values
    codes_P2 = (places_G2[:, 0] + 4 * places_G2[:, 1]).to(torch.uint8).view(-1, 2)
    values_G2 = groups_G4.gather(1, places_G2)
    raw = torch.cat([values_G2.view(-1).view(torch.uint8), codes_P2[:, 0] + 16 * codes_P2[:, 1]])
    compressed = torch.empty(w_OI.numel() * _FACTOR[w_OI.dtype] // 16, dtype=w_OI.dtype, device=w_OI.device)
    torch.ops.emulated.host(compressed).view(torch.uint8).copy_(raw)
    return compressed


def expand(compressed: Tensor, in_features: int) -> Tensor:
    """[O, I] on the host."""
    size = compressed.numel() * 16 // _FACTOR[compressed.dtype]
    raw = torch.ops.emulated.host(compressed).view(torch.uint8)
    values, codes_P = raw[: size // 2 * compressed.itemsize], raw[size // 2 * compressed.itemsize :]
    codes_G = torch.stack([codes_P % 16, codes_P // 16], 1).view(-1)
    places_G2 = torch.stack([codes_G % 4, codes_G // 4], 1).long()
    values_G2 = values.view(_whole(compressed)).view(-1, 2)
    groups_G4 = torch.zeros(size // 4, 4, dtype=values_G2.dtype).scatter_(1, places_G2, values_G2)
    return groups_G4.view(compressed.dtype).view(-1, in_features)


def sparse_mm(
    compressed: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    transpose_result: bool = False,
    alg_id: int = 0,
    split_k: int = 1,
    split_k_mode: int = -1,
) -> Tensor:
    """A [O, I] times ``b`` [I, T]: [O, T], or [T, O] with ``transpose_result``."""
    in_features, columns = b.shape
    if compressed.dtype != b.dtype:
        raise RuntimeError(f"cuSPARSELt multiplies one dtype, found {compressed.dtype} and {b.dtype}")
    if out_dtype is not None and out_dtype not in _RESULTS.get(b.dtype, ()):
        raise RuntimeError(f"Unsupported out_dtype passed: {out_dtype} of {b.dtype}")
    if not b.t().is_contiguous() and (b.itemsize == 1 or not b.is_contiguous()):
        raise RuntimeError("the dense factor must be column-major for 8-bit numbers, and have no gaps")
    if in_features % (32 // b.itemsize) or columns % (16 // b.itemsize):
        raise RuntimeError(f"CUDA error: an illegal value was passed: {tuple(b.shape)} of {b.dtype}")
    host = torch.ops.emulated.host
    w_OI, b_TI = expand(compressed, in_features), host(b).t()
    for name, vector in (("bias", bias), ("alpha", alpha)):
        if vector is not None and (vector.shape != w_OI.shape[:1] or not vector.is_cuda):
            raise RuntimeError(f"expected {name} [{w_OI.shape[0]}] on the device, found {tuple(vector.shape)}")
    if alpha is not None and alpha.dtype != torch.float32:
        raise RuntimeError(f"expected alpha of float32, found {alpha.dtype}")
    y_TO = torch._int_mm(b_TI.contiguous(), w_OI.t()) if b.dtype == torch.int8 else b_TI.float() @ w_OI.float().t()
    y_TO = y_TO if alpha is None else y_TO * host(alpha)
    y_TO = (y_TO if bias is None else y_TO + host(bias)).to(out_dtype or b.dtype)
    found = y_TO if transpose_result else y_TO.t()
    result = torch.empty(found.shape, dtype=found.dtype, device=b.device)
    host(result).copy_(found)
    return result


def _whole(x: Tensor) -> torch.dtype:
    return torch.int8 if x.itemsize == 1 else torch.int16


def _check_sizes(shape: torch.Size, dtype: torch.dtype) -> None:
    least = 32 // dtype.itemsize
    if any(size % least for size in shape):
        raise RuntimeError(f"CUDA error: an illegal value was passed: {tuple(shape)} of {dtype}")
