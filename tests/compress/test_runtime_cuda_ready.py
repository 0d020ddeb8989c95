"""What a model of the CUDA runtime brings along so that nothing has to be made, or guessed, inside a compiled model or
a captured graph; on the operators' CPU forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_models import pruned_model, sites_of
from squeezoo.compress.attention import sparse_attention
from squeezoo.compress.masks import Pattern
from squeezoo.compress.runtime import cuda_ops, nm_attention
from squeezoo.compress.runtime.cuda import use_cuda_
from squeezoo.compress.runtime.cuda_modules import runtime_modules
from squeezoo.compress.runtime.cuda_ops import DEFAULT_ALGORITHM, product_on_gpu
from squeezoo.compress.runtime.cuda_source import CudaOptions
from squeezoo.compress.runtime.cuda_support import fused_scales
from tiny import make

CPU16 = CudaOptions(dtype=torch.bfloat16, device="cpu")


def test_layouts_are_there_after_loading() -> None:
    """Of the kernel that runs, and of no other: making one copies weights from the host and, on a GPU, calls
    ``_cslt_compress``, which has no fake form, so neither a graph nor ``torch.compile`` could do it."""
    for backend, expected in ((None, "sparse_int8"), ("sparse_half", "sparse_half")):
        model, sites, gemms, _ = pruned_model("bert")
        use_cuda_(model, sites, gemms, backend=backend, options=CPU16)  # type: ignore[arg-type]
        layouts = [set(module.gemm._layouts) for module in runtime_modules(model)]
        assert layouts.count({expected}) == 12
        assert all(len(names) == 1 for names in layouts)


def test_tied_parameters_stay_one() -> None:
    """GPT-2's embedding is its final projection: one tensor in the model's dtype, not two."""
    model = make("gpt2")
    use_cuda_(model, sites_of(model, "gpt2"), {}, options=CPU16)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert len(list(model.parameters())) == len(list(make("gpt2").parameters()))


def test_a_searched_algorithm_that_refuses_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the default one, whose own errors stay errors."""
    seen = []

    def product(weight: Any, columns_IT: Any, bias: Any, alpha: Any, dtype: Any, turned: bool, *how: int) -> Any:
        seen.append(how)
        if how[0] in refused:
            raise RuntimeError("CUDA error: operation not supported when calling `cusparseLtMatmulPlanInit`")
        return (columns_IT.t().int() @ weight.int().t()).to(dtype)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    x_TI, w_OI = torch.randint(-9, 9, (16, 32)).to(torch.int8), torch.randint(-9, 9, (32, 32)).to(torch.int8)
    expected = x_TI.int() @ w_OI.int().t()
    refused = {7}
    assert torch.equal(product_on_gpu(x_TI, w_OI, None, None, torch.int32, (7, 2, 1)), expected)
    assert torch.equal(product_on_gpu(x_TI, w_OI, None, None, torch.int32, (5, 1, -1)), expected)
    assert seen == [(7, 2, 1), DEFAULT_ALGORITHM, (5, 1, -1)]
    refused = {0, 7}
    with pytest.raises(RuntimeError, match="cusparseLtMatmulPlanInit"):
        product_on_gpu(x_TI, w_OI, None, None, torch.int32, (7, 2, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_kernel_that_rounds_before_it_scales_is_found_out(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of int8 products pass 65,504, the largest float16. Such a kernel's scales are not used."""
    fused_scales.cache_clear()
    assert fused_scales(dtype, "cpu") == (True, True)
    right = cuda_ops.multiply

    def early(layout: Any, x: Any, alpha: Any = None, bias: Any = None, **how: Any) -> Any:
        y = right(layout, x, out_dtype=torch.int32).to(dtype).float() * alpha
        return (y if bias is None else y + bias).to(dtype)

    fused_scales.cache_clear()
    monkeypatch.setattr(cuda_ops, "multiply", early)
    assert fused_scales(dtype, "cpu") == ((False, False) if dtype == torch.float16 else (True, False))
    fused_scales.cache_clear()


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_that_do_not_fit_are_left_to_the_reference(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``_launch`` says so of a device with little shared memory. Expected: ``sparse_attention`` with the same mask."""
    monkeypatch.setattr(nm_attention, "_launch", lambda *_: False)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, size, 8, generator=generator) for size in (6, 11, 11))
    mask = torch.rand(2, 1, 1, 11, generator=generator) < 0.7
    both = mask & torch.ones(6, 11, dtype=torch.bool).tril(5) if causal else mask
    expected, _ = sparse_attention(q, k, v, pattern=Pattern(2, 4), mask=both, scale=0.3, renormalize=True, first_key=1)
    found = nm_attention.nm_attention_operator()(q, k, v, mask, 2, 4, 0.3, causal, True, 1)
    assert torch.equal(found, expected)
    assert found.transpose(1, 2).is_contiguous()
