"""Whole models on a GPU: compressed, saved, loaded with ``device="cuda"``, against the reference on the CPU.

Largest errors, relative to the largest logit: 3 % in bfloat16, whose rounding (1/256 of a value) between the modules
moves inputs to neighbouring levels; in float32 2 % where a last bit moves one, and 1e-4 in at least a quarter of the
samples, where none is moved.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cuda_models import DEVICE, moved, pruned_model, saved
from emulated import emulating
from squeezoo.bench_gpu import captured
from squeezoo.compress.checkpoint import load
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.runtime.cuda import use_cuda_
from squeezoo.compress.runtime.cuda_modules import runtime_modules
from squeezoo.compress.runtime.cuda_source import CudaOptions
from squeezoo.models.dense import logits
from torch import Tensor, nn

pytestmark = pytest.mark.gpu

NAMES = ["bert", "vit", "gpt2", "opt", "bart"]
RECIPES = ["gpusq-gemm-int8", "gpusq-gemm-mha-int8"]
BF16 = 0.03


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint of a tiny model and a recipe, made when first asked for."""

    @cache
    def folder(name: str, recipe: str) -> Path:
        return saved(name, Recipe.load(recipe), tmp_path_factory.mktemp("tiny") / "c")

    return folder


@pytest.fixture(autouse=True)
def _true_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions (patches of images) are TF32 on a GPU otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def far(found: Tensor, expected: Tensor) -> float:
    """NaN where anything is NaN."""
    return float((found.float().cpu() - expected).abs().max() / expected.abs().max())


def part(batch: dict[str, Tensor], rows: int, tokens: int | None = None) -> dict[str, Tensor]:
    """The first rows, and tokens of texts."""
    return {
        name: tensor[:rows] if tensor.ndim != 2 or tokens is None else tensor[:rows, :tokens]
        for name, tensor in batch.items()
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_loaded_model_agrees_with_the_reference(name: str, recipe: str, folders: Any) -> None:
    """bfloat16, as ``load`` gives it: a batch, a batch of 1, and a text of one token; equal bits when called again."""
    model, reference = (
        load(folders(name, recipe), device=DEVICE, backend="cuda"),
        load(folders(name, recipe), backend="reference"),
    )
    assert any("sparse_int8" in module.gemm.kernels() for module in runtime_modules(model))
    whole = tiny.tiny_batch(name, n=8, seed=5)
    batches = [whole, part(whole, 1)]
    if name in ("bert", "gpt2", "opt"):
        batches.append(part(whole, 1, 1))
    for batch in batches:
        found, expected = logits(model, moved(batch)), logits(reference, batch)
        assert found.dtype == torch.bfloat16
        assert far(found, expected) <= BF16
        for _ in range(3):
            assert torch.equal(logits(model, moved(batch)), found)


@pytest.mark.parametrize("name", ["bert", "timm_vit", "gpt2_token", "bart_classification", "wav2vec2"])
@torch.inference_mode()
def test_float32_agrees_but_for_single_levels(name: str) -> None:
    """Exact integer sums, on the same kernels."""
    model, sites, gemms, _ = pruned_model(name)
    reference = load_reference(name)
    report = use_cuda_(model, sites, gemms, options=CudaOptions(dtype=torch.float32, device=DEVICE))
    assert report.kernels["sparse_int8"] >= 4
    batch = tiny.tiny_batch(name, n=8, seed=5)
    found, expected = logits(model, moved(batch)).cpu(), logits(reference, batch)
    errors = ((found - expected).abs() / expected.abs().max()).flatten(1).amax(1)
    assert float(errors.max()) <= 0.02
    assert float(errors.sort().values[1]) <= 1e-4


def load_reference(name: str) -> nn.Module:
    """The reference with the same integers."""
    from squeezoo.compress.runtime import use_reference_

    model, sites, gemms, _ = pruned_model(name)
    use_reference_(model, sites, gemms)
    return model


@pytest.mark.parametrize("backend", ["dense_int8", "sparse_half", "dense_half", "sparse_fp8"])
@torch.inference_mode()
def test_every_kernel_can_be_forced(backend: Any) -> None:
    """GEMMs that cannot run it (a head of 3 labels) keep their own. float8 has 3 bits of mantissa: 10 %."""
    from squeezoo.compress.runtime.cuda_support import works

    runs, reason = works(backend, torch.bfloat16, DEVICE)
    if not runs and backend == "sparse_fp8":
        pytest.skip(reason)
    model, sites, gemms, expected = pruned_model("bert")
    report = use_cuda_(model, sites, gemms, backend=backend, options=CudaOptions(device=DEVICE))
    assert report.kernels[backend] >= 12
    found = logits(model, moved(tiny.tiny_batch("bert", seed=5)))
    assert far(found, expected) <= (0.1 if backend == "sparse_fp8" else BF16)


@torch.inference_mode()
def test_the_reference_backend_on_the_gpu(folders: Any) -> None:
    """Float32 there as on the CPU, but for single levels."""
    batch = tiny.tiny_batch("bert", n=8, seed=5)
    expected = logits(load(folders("bert", RECIPES[0]), backend="reference"), batch)
    found = logits(load(folders("bert", RECIPES[0]), device=DEVICE, backend="reference"), moved(batch))
    assert far(found, expected) <= 0.02


@pytest.mark.parametrize(("name", "recipe"), [("bert", RECIPES[0]), ("bert", RECIPES[1]), ("gpt2", RECIPES[0])])
@torch.inference_mode()
def test_a_cuda_graph_replays_with_new_inputs(name: str, recipe: str, folders: Any) -> None:
    """Expected: the bits of an eager call. N:M maps without a padding mask: transformers' own construction of that of
    eager attention copies a number from the host, in some versions, which a capture forbids."""
    model = load(folders(name, recipe), device=DEVICE, backend="cuda")

    def batch(seed: int) -> dict[str, Tensor]:
        found = moved(tiny.tiny_batch(name, n=4, seed=seed))
        return {"input_ids": found["input_ids"]} if recipe == RECIPES[1] else found

    fixed = batch(5)
    replay, output = captured(lambda: logits(model, fixed))
    seen = []
    for seed in (6, 7):
        for key, value in batch(seed).items():
            fixed[key].copy_(value)
        replay()
        seen.append(output.clone())
        assert torch.equal(seen[-1], logits(model, batch(seed)))
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.skipif(emulating(), reason="torch.compile writes code for a real GPU")
@torch.inference_mode()
def test_a_compiled_model_agrees(folders: Any) -> None:
    """Compiled before any other call, then for another batch size; equal bits when called again."""
    model = load(folders("bert", RECIPES[0]), device=DEVICE, backend="cuda")
    reference = load(folders("bert", RECIPES[0]), backend="reference")
    torch._dynamo.reset()
    compiled = torch.compile(model)
    for rows in (4, 7):
        batch = tiny.tiny_batch("bert", n=rows, seed=5)
        batch.pop("labels")
        found = compiled(**moved(batch)).logits
        assert far(found, logits(reference, batch)) <= BF16
        assert far(logits(model, moved(batch)), found.float().cpu()) <= BF16
        assert torch.equal(compiled(**moved(batch)).logits, found)
    torch._dynamo.reset()


def test_gradients_do_not_have_to_be_switched_off(folders: Any) -> None:
    """Called without ``inference_mode``: the same bits, and nothing to differentiate."""
    model = load(folders("bert", RECIPES[0]), device=DEVICE, backend="cuda")
    batch = moved(tiny.tiny_batch("bert", seed=5))
    found = logits(model, batch)
    assert not found.requires_grad
    with torch.inference_mode():
        assert torch.equal(logits(model, batch), found)


@torch.inference_mode()
def test_two_loads_agree(folders: Any) -> None:
    """Each searches its own algorithms; integer sums are exact with all of them, so only the float32 behind may differ
    in its last bit before it is rounded."""
    batch = moved(tiny.tiny_batch("bert", n=8, seed=5))
    first, second = (logits(load(folders("bert", RECIPES[0]), device=DEVICE, backend="cuda"), batch) for _ in range(2))
    assert far(first, second.float().cpu()) <= BF16


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["bert", "vit", "opt", "timm_vit", "wav2vec2"])
@torch.inference_mode()
def test_a_call_never_waits_for_the_device(name: str, recipe: str, folders: Any) -> None:
    """Once the first call has searched its algorithms: PyTorch's own watch refuses every wait. Models in which
    transformers itself does not wait, without padding masks, which it looks at."""
    model = load(folders(name, recipe), device=DEVICE, backend="cuda")
    batch = moved(tiny.tiny_batch(name, n=4, seed=5))
    batch = {key: value for key, value in batch.items() if key in ("input_ids", "pixel_values", "input_values")}
    expected = logits(model, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = logits(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
