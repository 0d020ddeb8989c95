"""The CUDA runtime in whole models, without a GPU: its operators have CPU forms that define them, so a model runs here
as it would there, only slowly. Rules, probes and errors too."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cuda_models import pruned_model, sites_of
from gemms import DYNAMIC, TOY, Toy, random_gemm, symmetric
from squeezed import pruned
from squeezoo.compress import checkpoint
from squeezoo.compress.backends import CheckpointError, _say_slower, resolve_backend
from squeezoo.compress.checkpoint import (
    assemble,
    load,
    load_manifest,
    load_tensors,
    save_checkpoint,
)
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.runtime import QuantizedGemm, cuda_support, use_reference_
from squeezoo.compress.runtime.candidates import units_of
from squeezoo.compress.runtime.choice import EVER, Choice
from squeezoo.compress.runtime.cuda import use_cuda_
from squeezoo.compress.runtime.cuda_modules import CudaLinear, CudaSlice
from squeezoo.compress.runtime.cuda_source import CudaOptions
from squeezoo.compress.runtime.cuda_support import (
    CudaError,
    cuda_capability,
    fused_scales,
    supported,
    works,
)
from squeezoo.compress.runtime.cuda_waiting import LevelsNorm, ResidualNorm
from squeezoo.models.adapter import find_sites
from squeezoo.models.dense import logits
from torch import nn

CPU32 = CudaOptions(dtype=torch.float32, device="cpu")
CPU16 = CudaOptions(dtype=torch.bfloat16, device="cpu")
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).abs().max() / expected.abs().max())


def saved(recipe_name: str, folder: Path) -> None:
    """A checkpoint of a tiny BERT, calibrated but not trained."""
    recipe = Recipe.load(recipe_name)
    model = pruned("bert", recipe)
    save_checkpoint(
        model, make_plan(tiny.ALL["bert"](), recipe), recipe, folder, name="n", base={"name": "tiny", "revision": None}
    )


# -- whole models


@pytest.mark.parametrize("name", ["bert", "distilbert", "timm_vit", "gpt2_token", "bart_classification", "wav2vec2"])
@torch.no_grad()
def test_whole_models_agree_with_the_reference(name: str) -> None:
    """float32: exact integer sums, so 1e-5 of the largest logit. bfloat16 between the modules: 5 %, since its rounding
    (1/256 of a value) moves inputs to neighbouring levels. Twice the same, and copies too."""
    batch = tiny.tiny_batch(name, seed=5)
    for options, tolerance in ((CPU32, 1e-5), (CPU16, 5e-2)):
        model, sites, gemms, expected = pruned_model(name)
        report = use_cuda_(model, sites, gemms, options=options)
        assert report.kernels["sparse_int8"] >= 8
        assert len(report.single) + sum(map(len, report.shared)) + 2 * len(report.fused) == len(gemms)
        found = logits(model, batch)
        assert found.dtype == options.dtype
        assert far(found, expected) <= tolerance
        assert torch.equal(logits(model, batch), found)
        assert torch.equal(logits(copy.deepcopy(model), batch), found)


@pytest.mark.parametrize("backend", ["sparse_int8", "dense_int8", "sparse_half", "dense_half", "sparse_fp8"])
@torch.no_grad()
def test_every_kernel_can_be_forced(backend: Any) -> None:
    """GEMMs that cannot run it keep their own (the head of 3 labels has no 2:4 kernel). Tolerance: 5 % as above; float8
    has the same here, because tiny random models hardly react to it."""
    model, sites, gemms, expected = pruned_model("bert")
    report = use_cuda_(model, sites, gemms, backend=backend, options=CPU16)
    assert report.kernels[backend] >= 12
    assert far(logits(model, tiny.tiny_batch("bert", seed=5)), expected) <= 5e-2


@torch.no_grad()
def test_what_is_put_in() -> None:
    """BERT: Q, K and V share a GEMM, both FFN matrices are one unit, norms stand where norms stood, and the residual is
    joined; two blocks, so 2 shared + 2 attention outputs + 2 FFN + pooler or head units."""
    model, sites, gemms, _ = pruned_model("bert")
    report = use_cuda_(model, sites, gemms, options=CPU32)
    layer = model.bert.encoder.layer[0]
    assert isinstance(layer.attention.self.query, CudaSlice)
    assert isinstance(layer.attention.output, ResidualNorm)
    assert isinstance(layer.output.LayerNorm, LevelsNorm)
    assert isinstance(layer.intermediate.intermediate_act_fn, nn.Identity)
    assert report.norms == 5
    assert len(report.shared) == len(report.fused) == 2
    units = [named.unit for named in units_of(model)]
    kinds = [unit.workload().kind for unit in units]
    assert sorted(kinds) == sorted(["linear"] * (4 + len(report.single) - 2) + ["ffn"] * 2)
    for unit in units:
        for kernel in unit.kernels():
            unit.run(kernel, *unit.example(3))
    assert "kernels=('sparse_int8', 'dense_int8', 'dense_half')" in repr(layer.intermediate.dense)


@torch.no_grad()
def test_the_ffn_hands_integers_over_under_one_choice() -> None:
    """Between the two matrices run int8 levels with an integer kernel and floats with another; the choice by rows is
    common to both. Expected: the reference."""
    torch.manual_seed(0)
    fast = Toy(nn.GELU(), width=48, hidden=64).eval()
    slow = copy.deepcopy(fast)
    gemms = {
        "blocks.0.up": random_gemm(64, 48, 1, name="blocks.0.up", scale_O=torch.rand(64) / 400, input=symmetric(0.03)),
        "blocks.0.down": random_gemm(48, 64, 2, name="blocks.0.down", input=symmetric(0.02)),
    }
    report = use_cuda_(fast, find_sites(fast, TOY), gemms, options=CPU32)
    use_reference_(slow, find_sites(slow, TOY), gemms)
    assert report.fused == (("blocks.0.up", "blocks.0.down"),)
    assert report.kernels == {"dense_int8": 2}  # random weights are not 2:4
    (named,) = units_of(fast)
    named.unit.choose = Choice(((4, "dense_half"), (EVER, "dense_int8")))
    up = fast.blocks[0].up
    for rows, dtype in ((4, torch.float32), (9, torch.int8)):
        x = torch.randn(rows, 48)
        assert up(x).dtype == dtype
        assert float((fast(x) - slow(x)).norm() / slow(x).norm()) < 2e-3


@torch.no_grad()
def test_a_dynamic_input_is_not_fused() -> None:
    fast = Toy(nn.GELU(), width=48, hidden=64).eval()
    gemms = {
        f"blocks.0.{n}": random_gemm(*s, name=f"blocks.0.{n}", input=DYNAMIC)
        for n, s in (("up", (64, 48)), ("down", (48, 64)))
    }
    slow = copy.deepcopy(fast)
    use_reference_(slow, find_sites(slow, TOY), gemms)
    assert use_cuda_(fast, find_sites(fast, TOY), gemms, options=CPU32).fused == ()
    x = torch.randn(9, 48)
    assert float((fast(x) - slow(x)).norm() / slow(x).norm()) < 0.01


@torch.no_grad()
def test_pruned_float_models_run_in_half() -> None:
    """A recipe without quantizers: its 2:4 weights as they are. Expected: the dense model, to bfloat16's precision."""
    model, sites, gemms, _ = pruned_model("bert")
    names = [gemm.name for gemm in sites.gemms]
    for site in sites.gemms:
        site.weight_OI.mul_(gemms[site.name].weight_q_OI != 0)
    batch = tiny.tiny_batch("bert", seed=5)
    expected = logits(model, batch)
    report = use_cuda_(model, sites, {}, sparse=names, options=CPU16)
    assert report.kernels == {"sparse_half": len(names)}
    assert report.norms == 0
    assert far(logits(model, batch), expected) < 0.02
    other, sites, gemms, _ = pruned_model("bert")
    with pytest.raises(ValueError, match="found 'nothing', which is no GEMM of this model"):
        use_cuda_(other, sites, gemms, sparse=["nothing"], options=CPU16)


@torch.no_grad()
def test_torch_compile_traces_the_whole_model() -> None:
    """One graph, without breaks; Q, K and V still share one product: as many calls of the operator as in eager mode."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model, sites, gemms, _ = pruned_model("bert")
    use_cuda_(model, sites, gemms, options=CPU16)
    batch = tiny.tiny_batch("bert", seed=5)
    expected = logits(model, batch)
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert torch.equal(compiled(**batch).logits, expected)
    assert counter.frame_count == 1
    (graph,) = counter.graphs
    products = [node for node in graph.graph.nodes if "sparse_mm" in str(node.target)]
    assert len(products) == 2 * (1 + 1 + 2)  # of each block: QKV, attention output, FFN
    torch._dynamo.reset()


def test_it_is_for_inference() -> None:
    model, sites, gemms, _ = pruned_model("bert")
    use_cuda_(model, sites, gemms, options=CPU32)
    assert not model.training
    with pytest.raises(RuntimeError, match="inference only"):
        model.train()
    assert not any(module.training for module in model.modules())
    with pytest.raises(RuntimeError, match="state dict"):
        model.state_dict()


@torch.no_grad()
def test_pickled_models_compute_the_same() -> None:
    model, sites, gemms, _ = pruned_model("bert")
    use_cuda_(model, sites, gemms, options=CPU32)
    batch = tiny.tiny_batch("bert", seed=5)
    expected = logits(model, batch)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), batch), expected)


# -- checkpoints


@pytest.mark.parametrize("recipe", ["gpusq-gemm-int8", "magnitude-2-4"])
def test_a_checkpoint_is_assembled_for_cuda(recipe: str, tmp_path: Path) -> None:
    """What ``load(device="cuda")`` does, with the operators' CPU forms. Expected: the reference backend."""
    saved(recipe, tmp_path / "c")
    manifest, tensors = load_manifest(tmp_path / "c"), load_tensors(tmp_path / "c" / checkpoint.WEIGHTS)
    model = assemble(manifest.model, tensors, manifest.plan, "cuda", "cpu")
    kinds = {type(module) for module in model.modules()}
    assert CudaLinear in kinds
    batch = tiny.tiny_batch("bert")
    with torch.inference_mode():
        expected = logits(load(tmp_path / "c", backend="reference"), batch)
        assert far(logits(model, batch), expected) <= 5e-2


@no_cuda
def test_cuda_without_cuda_is_a_clear_error(tmp_path: Path) -> None:
    saved("gpusq-gemm-int8", tmp_path / "c")
    for backend in ("auto", "cuda", "reference", "dense"):
        with pytest.raises(CheckpointError, match="CUDA was asked for, but PyTorch"):
            load(tmp_path / "c", device="cuda", backend=backend)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="write device='cuda'"):
        load(tmp_path / "c", backend="cuda")
    model, sites, gemms, _ = pruned_model("bert")
    with pytest.raises(CudaError, match="CUDA was asked for"):
        use_cuda_(model, sites, gemms)
    assert type(model.bert.encoder.layer[0].output.dense) is nn.Linear


def test_an_old_gpu_takes_the_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Capability 7.5: ``auto`` falls back, asking for it is an error that says what is needed."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old GPU")
    with pytest.raises(CudaError, match=r"Old GPU has compute capability 7\.5, the CUDA runtime needs 8\.0"):
        cuda_capability("cuda")
    saved("gpusq-gemm-int8", tmp_path / "c")
    manifest = load_manifest(tmp_path / "c")
    _say_slower.cache_clear()
    how = (manifest.plan, manifest.recipe.name)
    with pytest.warns(RuntimeWarning, match=r"Old GPU has compute capability 7\.5.*runs as the float32 reference"):
        assert resolve_backend("auto", "cuda", *how) == "reference"
    assert resolve_backend("dense", "cuda", *how) == "dense"
    with pytest.raises(CheckpointError, match="Old GPU"):
        resolve_backend("cuda", "cuda", *how)
    with pytest.raises(CheckpointError, match="expected a device below cuda:1, found cuda:1"):
        resolve_backend("auto", "cuda:1", *how)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert resolve_backend("auto", "cuda", *how) == "cuda"
    assert cuda_capability("cuda") == (8, 0)


# -- rules


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sparse_int8", (7, 5), (64, 64), torch.bfloat16), "capability 7.5; the CUDA kernels need 8.0"),
        (("sparse_int8", (8, 0), (60, 64), torch.bfloat16), r"multiples of \(8, 16\), found \(60, 64\)"),
        (("sparse_int8", (8, 0), (64, 64), torch.float64), "found float64"),
        (("sparse_half", (8, 0), (64, 64), torch.float32), "cuSPARSELt has no float32"),
        (("sparse_fp8", (8, 9), (64, 64), torch.bfloat16), r"needs compute capability 9.0 \(Hopper\), found 8.9"),
    ],
)
def test_what_a_device_cannot_run(arguments: Any, message: str) -> None:
    runs, reason = supported(*arguments)
    assert not runs
    assert re.search(message, reason), reason


def test_what_a_gemm_cannot_run() -> None:
    ampere: Any = ((8, 0), (64, 64), torch.bfloat16)
    assert supported("sparse_int8", *ampere) == (True, "sparse_int8 on compute capability 8.0")
    assert supported("sparse_int8", *ampere, two_of_four=False) == (False, "its weight is not 2:4")
    assert supported("dense_int8", *ampere, quantized=False) == (False, "the recipe does not quantize this GEMM")
    assert supported("dense_half", (8, 0), (3, 5), torch.float32)[0]
    assert supported("sparse_fp8", (9, 0), (64, 64), torch.float16)[0]
    with pytest.raises(ValueError, match="found 'int8'"):
        supported("int8", *ampere)  # type: ignore[arg-type]


def test_the_trial_by_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the operators' CPU forms everything adds up; a kernel that is off by one is found out, one that raises is
    reported with its message, and a PyTorch without cuSPARSELt is named."""
    works.cache_clear()
    fused_scales.cache_clear()
    for backend in cuda_support.CUDA_BACKENDS:
        assert works(backend, torch.bfloat16, "cpu") == (True, f"{backend} runs on cpu")
    assert fused_scales(torch.float16, "cpu") == (True, True)

    from squeezoo.compress.runtime import cuda_ops

    right = cuda_ops.multiply
    works.cache_clear()
    monkeypatch.setattr(cuda_ops, "multiply", lambda *args, **kwargs: right(*args, **kwargs) + 1)
    assert works("dense_int8", torch.bfloat16, "cpu") == (False, "dense_int8 does not add up on cpu")

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("CUDA error: architecture mismatch\nmore")

    works.cache_clear()
    monkeypatch.setattr(cuda_ops, "multiply", fails)
    assert works("sparse_half", torch.float16, "cpu")[1] == "sparse_half fails here: CUDA error: architecture mismatch"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "is built without cuSPARSELt" in works("sparse_int8", torch.float16, "cpu")[1]
    works.cache_clear()
    fused_scales.cache_clear()


def test_nothing_runs_the_asked_kernel() -> None:
    model, sites, gemms, _ = pruned_model("bert")
    dense = {
        n: QuantizedGemm(n, g.weight_q_OI.clone().fill_(1), g.scale_O, g.input, g.bias_O) for n, g in gemms.items()
    }
    with pytest.raises(CudaError, match="sparse_int8 runs for none of the"):
        use_cuda_(model, sites, dense, backend="sparse_int8", options=CPU16)
    assert type(model.bert.encoder.layer[0].output.dense) is nn.Linear
    with pytest.raises(CudaError, match="found 'fast'"):
        use_cuda_(model, sites, gemms, backend="fast", options=CPU16)  # type: ignore[arg-type]


def test_sites_of_another_model() -> None:
    model, _, gemms, _ = pruned_model("bert")
    other, sites, _, _ = pruned_model("bert")
    assert sites_of(other, "bert").gemms
    with pytest.raises(ValueError, match="the sites belong to another model"):
        use_cuda_(model, sites, gemms, options=CPU16)
