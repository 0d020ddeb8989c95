"""Attached models where people use them: integer kernels, torch.compile, DDP; and GPT-2's Conv1D against nn.Linear."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from squeezed import FIRST, GPUSQ, PRUNE, TWO_FOUR, pruned, scores
from squeezoo.compress.attach import attach_, compressed_weights, prune_
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.checkpoint import load, save_checkpoint
from squeezoo.compress.masks import check_nm, magnitude_mask
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.runtime import int8_supported
from squeezoo.compress.verify import INT8_TOLERANCE
from squeezoo.models import adapter_for, find_sites
from squeezoo.models.dense import logits
from squeezoo.models.gpt2 import GPT2
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(not int8_supported()[0], reason=f"no int8 backend: {int8_supported()[1]}")
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "bart", "wav2vec2"])
def test_int8_kernels_agree(name: str, tmp_path: Path) -> None:
    """The integer backend against the reference arithmetic, where blocks differ from those that tests/compress runs on;
    tolerance: see INT8_TOLERANCE."""
    model = pruned(name, GPUSQ)
    save_checkpoint(
        model, make_plan(tiny.ALL[name](), GPUSQ), GPUSQ, tmp_path / "c", name="n", base={"name": "t", "revision": None}
    )
    reference = scores(load(tmp_path / "c", backend="reference"), name)
    integer = scores(load(tmp_path / "c", backend="int8"), name)
    assert (integer - reference).abs().max() <= INT8_TOLERANCE * reference.abs().max()


QUICK_TO_COMPILE = ("timm_vit",)


@pytest.mark.parametrize(
    "name", [n if n in QUICK_TO_COMPILE else pytest.param(n, marks=pytest.mark.slow) for n in sorted(FIRST.values())]
)
def test_torch_compile_runs_an_attached_model(name: str) -> None:
    """Forward and backward through AOTAutograd's graphs equal eager ones."""
    model = pruned(name, GPUSQ)
    compiled = torch.compile(lambda batch: logits(model, batch), backend="aot_eager")
    batch = tiny.tiny_batch(name)
    torch.testing.assert_close(compiled(batch), logits(model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles with g++")
@pytest.mark.parametrize("name", ["bert", "timm_vit", "gpt2"])
def test_inductor_takes_an_attached_model_as_one_graph(name: str) -> None:
    """The default backend of torch.compile: no graph break, outputs and gradients as in eager mode."""
    model = pruned(name, GPUSQ)
    batch = tiny.tiny_batch(name)
    compiled = torch.compile(lambda batch: logits(model, batch), fullgraph=True)
    found, wanted = compiled(batch), logits(model, batch)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weights = list(model.parameters())
    grads = [torch.autograd.grad(y.square().mean(), weights, allow_unused=True) for y in (found, wanted)]
    for one, other in zip(*grads):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)  # int8 steps amplify rounding


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_distributed_data_parallel_trains_an_attached_model(name: str, tmp_path: Path) -> None:
    """One gloo process: the same gradients as without DDP, zero under the mask, masks not broadcast away."""
    import torch.distributed as dist

    alone, model = pruned(name), pruned(name)
    batch = tiny.tiny_batch(name)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(**batch).loss.backward()
        alone(**batch).loss.backward()
    finally:
        dist.destroy_process_group()
    found = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, parameter in alone.named_parameters():
        assert (parameter.grad is None) == (found[key] is None)
        if parameter.grad is not None:
            torch.testing.assert_close(found[key], parameter.grad, atol=1e-7, rtol=1e-6)
    for gemm in find_sites(model, adapter_for(model)).gemms:
        assert check_nm(gemm.weight_OI, TWO_FOUR)


def as_linears(model: nn.Module) -> nn.Module:
    """GPT-2 with every Conv1D replaced by the nn.Linear that computes the same: weight transposed, bias as it is."""
    from transformers.pytorch_utils import Conv1D

    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.weight.shape[0], module.nf)
            linear.weight.data.copy_(module.weight.data.t())
            linear.bias.data.copy_(module.bias.data)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


@pytest.mark.parametrize("recipe", [PRUNE, GPUSQ], ids=lambda recipe: recipe.name)
def test_conv1d_and_linear_forms_are_exactly_equal(recipe: Recipe) -> None:
    """Masks, scales and weights to the bit; outputs up to float rounding of the two matrix products (1e-6)."""
    conv, linear = tiny.ALL["gpt2"](), as_linears(tiny.ALL["gpt2"]())
    record = replace(GPT2, gemms=tuple(replace(site, layout="out_in") for site in GPT2.gemms))
    for model, adapter in ((conv, GPT2), (linear, record)):
        attach_(model, make_plan(model, recipe, adapter))
        prune_(model)
        if recipe is GPUSQ:
            calibrate_(model, [tiny.tiny_batch("gpt2")])
    for (_, _, one), (_, _, other) in zip(compressed_weights(conv), compressed_weights(linear), strict=True):
        assert torch.equal(one.mask_OI, other.mask_OI)
    pairs = zip(find_sites(conv, GPT2).gemms, find_sites(linear, record).gemms, strict=True)
    for one, other in pairs:
        assert torch.equal(one.weight_OI, other.weight_OI)
    torch.testing.assert_close(
        scores(conv, "gpt2"), scores(linear, "gpt2"), atol=1e-5 if recipe is GPUSQ else 1e-6, rtol=0
    )


def test_fused_and_separate_qkv_have_the_same_masks() -> None:
    """ALGORITHMS A.3: groups run along in_features and rows are independent."""
    for name in ("gpt2", "timm_vit"):
        fused = next(g for g in find_sites(tiny.ALL[name](), adapter_for(tiny.ALL[name]())).gemms if g.role == "qkv")
        parts = [magnitude_mask(part, TWO_FOUR) for part in fused.weight_OI.chunk(fused.parts)]
        assert torch.equal(magnitude_mask(fused.weight_OI, TWO_FOUR), torch.cat(parts))


def test_mms_language_adapters_stay_dense() -> None:
    """Wav2vec2 with attention adapters (MMS): two small linears a block that the record leaves dense on purpose."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    model = Wav2Vec2ForCTC(Wav2Vec2Config(**{**tiny.SPEECH, "adapter_attn_dim": 4, "do_stable_layer_norm": True}))
    assert len(find_sites(model, adapter_for(model)).gemms) == 12
