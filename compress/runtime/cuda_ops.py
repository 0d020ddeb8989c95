"""The matrix products of the CUDA runtime: PyTorch's cuSPARSELt operators, ``_int_mm`` and plain GEMMs, with padding.

The sparse product is one operator, ``squeezoo::sparse_mm``, with a fake form, so that ``torch.compile`` traces through
and CUDA graphs capture it. Its CPU form multiplies the padded dense weights: it defines the result, for tests.
Legend: T rows, I in_features, O out_features.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cuda_layout import Layout, padded_input, padded_rows

Algorithm = tuple[int, int, int]  # alg_id, split_k, split_k_mode of cuSPARSELt
DEFAULT_ALGORITHM: Algorithm = (0, 1, -1)


def multiply(
    layout: Layout,
    x_TI: Tensor,
    alpha_O: Tensor | None = None,
    bias_O: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    algorithm: Algorithm = DEFAULT_ALGORITHM,
) -> Tensor:
    """``x_TI @ weight_OI^T`` [T, O], rows perhaps apart in memory.

    Args:
        x_TI: in the dtype of the weight.
        alpha_O, bias_O: of sparse backends, [O] (alpha of int8 and float8 only): ``alpha * sum + bias``, rounded once.
            ``dense_half`` takes a bias in its own dtype. ``dense_int8`` takes neither and gives int32.
    """
    backend, rows, features = layout.backend, x_TI.shape[0], layout.out_features
    if backend == "dense_half":
        return F.linear(x_TI, layout.weight, bias_O)
    x_TI = padded_input(x_TI, backend)
    if backend == "dense_int8":
        return torch._int_mm(x_TI, layout.weight.t())[:rows, :features]
    alpha_O, bias_O = (_padded_vector(x, layout.padded_out) for x in (alpha_O, bias_O))
    y_TO = sparse_mm_operator()(
        x_TI, layout.weight, alpha_O, bias_O, layout.padded_out, None if out_dtype == x_TI.dtype else out_dtype,
        *algorithm,
    )  # fmt: skip
    return y_TO[:rows, :features]


def search(
    layout: Layout, x_TI: Tensor, alpha_O: Tensor | None, bias_O: Tensor | None, *, out_dtype: torch.dtype
) -> Algorithm:
    """cuSPARSELt's fastest algorithm for a sparse product of this size, by its own measurement; waits for the device.

    The default one where the search fails, or on a CPU.
    """
    if not x_TI.is_cuda:
        return DEFAULT_ALGORITHM
    columns_IT = padded_input(x_TI, layout.backend).t()
    alpha_O, bias_O = (_padded_vector(x, layout.padded_out) for x in (alpha_O, bias_O))
    wanted = None if out_dtype == x_TI.dtype else out_dtype
    newer = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    try:
        with torch.cuda.device(x_TI.device):  # the newer function does not choose the device itself
            if newer is not None:
                algorithm, split_k, mode, _ = newer(layout.weight, columns_IT, bias_O, alpha_O, wanted, True)
                return int(algorithm), int(split_k), int(mode)
            found = torch._cslt_sparse_mm_search(
                layout.weight, columns_IT, bias=bias_O, alpha=alpha_O, out_dtype=wanted, transpose_result=True
            )
            return int(found), 1, -1
    except (RuntimeError, TypeError):
        return DEFAULT_ALGORITHM


def searched_rows(rows: int, backend: Any) -> int:
    """The row count that stands for ``rows`` in the search: the next power of two, so that few are searched."""
    bucket = 16
    while bucket < padded_rows(rows, backend):  # comparisons, since ``torch.compile`` may trace it with a symbol
        bucket *= 2
    return bucket


def _padded_vector(x_O: Tensor | None, size: int) -> Tensor | None:
    """A per-channel vector of full length. It must never have one element: PyTorch would read that on the host."""
    return x_O if x_O is None or x_O.shape[0] == size else F.pad(x_O, (0, size - x_O.shape[0]))


def sparse_mm_operator() -> Any:
    """``torch.ops.squeezoo.sparse_mm``, registered when it is first needed: before a model is compiled."""
    if not torch.compiler.is_compiling():
        _register()
    return torch.ops.squeezoo.sparse_mm.default


def product_on_gpu(
    x_TI: Tensor, compressed: Tensor, alpha_O: Tensor | None, bias_O: Tensor | None, out_dtype: torch.dtype | None,
    algorithm: Algorithm,
) -> Tensor:  # fmt: skip
    """What the operator is on CUDA. An algorithm was searched at about this number of rows, and cuSPARSELt does not
    promise that it takes this very one: then its default one does."""
    # The dense factor must be column-major for 8-bit numbers; the result is written transposed, as [T, O].
    columns_IT = x_TI.contiguous().t()
    try:
        return torch._cslt_sparse_mm(compressed, columns_IT, bias_O, alpha_O, out_dtype, True, *algorithm)
    except RuntimeError:
        if algorithm == DEFAULT_ALGORITHM:
            raise
    return torch._cslt_sparse_mm(compressed, columns_IT, bias_O, alpha_O, out_dtype, True, *DEFAULT_ALGORITHM)


@cache
def _register() -> None:
    @torch.library.custom_op("squeezoo::sparse_mm", mutates_args=(), device_types="cuda")
    def operator(
        x_TI: Tensor, compressed: Tensor, alpha_O: Tensor | None, bias_O: Tensor | None, features: int,
        out_dtype: torch.dtype | None, alg_id: int, split_k: int, split_k_mode: int,
    ) -> Tensor:  # fmt: skip
        return product_on_gpu(
            x_TI, compressed, alpha_O, bias_O, out_dtype, (int(alg_id), int(split_k), int(split_k_mode))
        )

    @operator.register_kernel("cpu")
    def _(
        x_TI: Tensor, compressed: Tensor, alpha_O: Tensor | None, bias_O: Tensor | None, features: int,
        out_dtype: torch.dtype | None, alg_id: int, split_k: int, split_k_mode: int,
    ) -> Tensor:  # fmt: skip
        if x_TI.dtype == torch.int8:
            sum_TO = torch._int_mm(x_TI, compressed.t())
        else:
            sum_TO = x_TI.float() @ compressed.float().t()
        if alpha_O is not None:
            sum_TO = sum_TO * alpha_O
        return (sum_TO if bias_O is None else sum_TO + bias_O).to(out_dtype or x_TI.dtype)

    @operator.register_fake
    def _(
        x_TI: Tensor, compressed: Tensor, alpha_O: Tensor | None, bias_O: Tensor | None, features: int,
        out_dtype: torch.dtype | None, alg_id: int, split_k: int, split_k_mode: int,
    ) -> Tensor:  # fmt: skip
        return x_TI.new_empty((x_TI.shape[0], features), dtype=out_dtype or x_TI.dtype)
