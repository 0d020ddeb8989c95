"""The N:M attention kernel without a GPU: its cases in Triton's interpreter, what the compiler makes of it for GPUs,
the fallback, and the errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from maps import make_sparse
from squeezoo.compress.attention import sparse_attention
from squeezoo.compress.masks import Pattern
from squeezoo.compress.runtime import triton_support
from squeezoo.compress.runtime.nm_attention import (
    NmAttention,
    nm_attention,
    nm_attention_operator,
    nm_attention_supported,
    use_nm_attention_,
)
from torch._subclasses.fake_tensor import FakeTensorMode

TESTS = Path(__file__).parents[1]
MISSING = triton_support.triton_missing()
needs_triton = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@needs_triton
def test_the_kernels_in_tritons_interpreter() -> None:
    """Runs nm_attention_cases.py and triton_quantize_cases.py in a process of its own: Triton decides at import whether
    it interprets. Expected: every case passes; there are more than a hundred."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    cases = [str(TESTS / name) for name in ("nm_attention_cases.py", "triton_quantize_cases.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *cases]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 100


@needs_triton
@pytest.mark.skipif(triton_support.interpreting(), reason="Triton interprets here, so nothing is compiled")
@pytest.mark.parametrize(
    ("name", "capability"), [("nm_attention_small", 80), ("nm_attention_small", 90), ("nm_attention_large", 90)]
)
def test_the_kernel_compiles_for_gpus(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton needs no GPU to compile for one. Expected: machine code that multiplies on tensor cores (mma or wgmma)."""
    from squeezoo.compress.runtime import nm_attention_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel: Any = getattr(nm_attention_kernel, name)
    m = 4 if name.endswith("small") else 16
    constants: dict[str, Any] = dict(
        N=2, M=m, MASK=2, PER_QUERY=False, CAUSAL=False, RENORMALIZE=False, PRECISION="ieee", WIDEN=False, BLOCK_Q=64,
        BLOCK_G=64 // m, BLOCK_D=64, BLOCK_E=64,
    )  # fmt: skip
    types = {"mask_ptr": "*fp32", "scale": "fp32", "threshold": "fp32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 2})
    assert len(compiled.asm["cubin"]) > 1000
    assert re.search(r"(mma\.sync|wgmma\.mma_async)\S*bf16", compiled.asm["ptx"])


def qkv(**changes: Any) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"queries": 6, "keys": 11, **changes}
    return tuple(torch.randn(2, 4, sizes[name], 8, generator=generator) for name in ("queries", "keys", "keys"))


def test_without_a_gpu_the_reference_computes() -> None:
    """Expected: ``sparse_attention`` itself, causal mask included, also where gradients are asked for."""
    q, k, v = qkv()
    causal = torch.ones(6, 11, dtype=torch.bool).tril(5)
    expected, _ = sparse_attention(q, k, v, pattern=Pattern(2, 4), mask=causal, first_key=2)
    found = nm_attention(q, k, v, pattern=Pattern(2, 4), causal=True, first_key=2)
    assert torch.equal(found, expected)
    bias = torch.randn(1, 1, 6, 11)
    both, _ = sparse_attention(q, k, v, pattern=Pattern(2, 4), mask=bias.masked_fill(~causal, float("-inf")))
    assert torch.equal(nm_attention(q, k, v, pattern=Pattern(2, 4), mask=bias, causal=True), both)
    q.requires_grad_()
    nm_attention(q, k, v, pattern=Pattern(2, 4)).sum().backward()
    assert q.grad is not None
    assert q.grad.any()


def test_what_the_kernel_does_not_take() -> None:
    for device, dtype, width, message in (
        ("cuda", torch.float64, 64, "not float64"),
        ("cuda", torch.float16, 512, "heads of 1 to 256, not 512"),
        ("meta", torch.float32, 64, "not for meta" if not MISSING else "not installed"),
    ):
        runs, reason = nm_attention_supported(device, dtype, width)
        assert not runs
        assert message in reason


@pytest.mark.skipif(triton_support.interpreting(), reason="Triton interprets here")
def test_asking_for_triton_on_a_cpu_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="kernel='reference' computes the same"):
        nm_attention(*qkv(), pattern=Pattern(2, 4), kernel="triton")


def test_a_missing_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expected: the reason names the package, and ``auto`` falls back to the same numbers."""
    triton_support.triton_missing.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    try:
        runs, reason = triton_support.triton_runs("cuda")
        assert not runs
        assert "install the package triton" in reason
        q, k, v = qkv()
        expected, _ = sparse_attention(q, k, v, pattern=Pattern(2, 4))
        assert torch.equal(nm_attention(q, k, v, pattern=Pattern(2, 4)), expected)
    finally:
        triton_support.triton_missing.cache_clear()


def test_shapes_are_checked_before_anything_runs() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="with 4 heads a multiple of G"):
        nm_attention(q, k[:, :3], v[:, :3], pattern=Pattern(2, 4))
    with pytest.raises(ValueError, match="broadcastable to"):
        nm_attention(q, k, v, pattern=Pattern(2, 4), mask=torch.ones(5, 11, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_on_fake_tensors(dtype: torch.dtype) -> None:
    """Shape, dtype, device and strides [B, Q, H, E] without computing anything, V wider than Q."""
    operator = nm_attention_operator()
    with FakeTensorMode():
        q = torch.empty(2, 4, 6, 8, dtype=dtype, device="cuda")
        k, v = (torch.empty(2, 2, 11, size, dtype=dtype, device="cuda") for size in (8, 12))
        out = operator(q, k, v, None, 2, 4, 0.3, False, False, 0)
    assert out.shape == (2, 4, 6, 12)
    assert out.dtype == dtype
    assert out.device.type == "cuda"
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.skipif(triton_support.interpreting(), reason="Triton interprets here")
def test_attached_maps_keep_computing_where_the_kernel_cannot() -> None:
    """On a CPU the kernel declines and the reference runs: same output, probabilities included."""
    model = make_sparse("bert").eval()
    names = use_nm_attention_(model)
    assert names == tuple(f"bert.encoder.layer.{i}.attention.self" for i in range(2))
    compressor = model.get_submodule(f"{names[0]}.attention_map")
    assert isinstance(compressor.kernel, NmAttention)
    q, k, v = qkv()
    out, probs = compressor(q, k, v)
    expected, expected_probs = sparse_attention(q, k, v, pattern=Pattern(2, 4))
    assert torch.equal(out, expected)
    assert torch.equal(probs, expected_probs)
    assert not any("kernel" in name for name in model.state_dict())


def test_a_quantizer_of_p_keeps_the_reference() -> None:
    from maps import level

    model = make_sparse("bert")
    assert use_nm_attention_(model)
    from squeezoo.compress.attention_doors import attach_attention_
    from tiny import make

    other = make("bert")
    from maps import specs

    attach_attention_(other, specs(other, p="levels"), level)
    assert use_nm_attention_(other) == ()
