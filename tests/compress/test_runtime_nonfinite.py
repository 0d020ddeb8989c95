"""NaN and infinity in the CUDA runtime: integers cannot carry them, the results must. On the operators' CPU forms."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import squeezoo
import tiny
import torch
from cuda_models import pruned_model, sites_of, two_of_four
from gemms import DYNAMIC, asymmetric, inputs, random_gemm, symmetric
from squeezoo.compress.checkpoint import WEIGHTS, assemble, load_manifest, load_tensors
from squeezoo.compress.runtime import triton_support
from squeezoo.compress.runtime.cuda import CastInputs, use_cuda_
from squeezoo.compress.runtime.cuda_linear import CudaGemm
from squeezoo.compress.runtime.cuda_source import CudaOptions
from squeezoo.compress.runtime.nonfinite import MarkedForward, NonFinite
from squeezoo.models.dense import logits
from torch import nn

CPU32 = CudaOptions(dtype=torch.float32, device="cpu")
NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


def in_one_place(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone()
    x.view(-1)[x.numel() // 2] = value
    return x


@pytest.mark.parametrize("value", NOT_FINITE)
@torch.no_grad()
def test_the_results_of_a_whole_model_show_it_and_the_next_call_does_not(value: float) -> None:
    """One pixel of a batch. The call after it gives what it gave before; copies remember nothing of it."""
    model, sites, gemms, _ = pruned_model("timm_vit")
    use_cuda_(model, sites, gemms, options=CPU32)
    x = tiny.tiny_batch("timm_vit", seed=5)["pixel_values"]
    expected = model(x)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other(in_one_place(x, value)).isnan().all()
        assert torch.equal(other(x), expected)


@torch.no_grad()
def test_what_arises_in_the_middle_and_reaches_no_residual_is_shown() -> None:
    """An FFN's own NaN (a bias), between two integer GEMMs, where nothing of it is left in the integers; and the head's
    input, behind which no float follows."""
    for name in ("bert.encoder.layer.0.intermediate.dense", "classifier"):
        model, sites, gemms, _ = pruned_model("bert")
        use_cuda_(model, sites, gemms, options=CPU32)
        batch = tiny.tiny_batch("bert", seed=5)
        assert logits(model, batch).isfinite().all()
        module: Any = model.get_submodule(name)
        if name == "classifier":
            module.register_forward_pre_hook(lambda module, args: (in_one_place(args[0], float("nan")),))
        else:
            for bias in ("bias", "whole_bias"):
                module.gemm._vectors[bias] = in_one_place(module.gemm._vectors[bias], float("nan"))
        found = model(**{key: value for key, value in batch.items() if key != "labels"})
        assert type(found).__name__ == "SequenceClassifierOutput"
        assert found.logits.isnan().all()


@torch.no_grad()
def test_generation_shows_what_the_encoder_met() -> None:
    """``generate`` calls BART's encoder by itself; a whole call counts the encoder's as its own. And transformers still
    finds the arguments of ``forward``."""
    writes = tiny.ALL["bart"]()
    use_cuda_(writes, sites_of(writes, "bart"), {}, options=CPU32)
    assert writes.generate(torch.full((4, 5), 7), max_new_tokens=4, do_sample=False).shape[0] == 4
    assert "decoder_input_ids" in inspect.signature(writes.forward).parameters
    model, sites, gemms, _ = pruned_model("bart_classification")
    use_cuda_(model, sites, gemms, options=CPU32)
    batch = tiny.tiny_batch("bart_classification", seed=5)
    expected = model(**batch).logits
    table = model.model.encoder.embed_positions.weight.data
    kept = table.clone()
    table[5] = float("nan")
    assert model.model.encoder(batch["input_ids"]).last_hidden_state.isnan().all()
    assert model(**batch).logits.isnan().all()
    table.copy_(kept)
    assert torch.equal(model(**batch).logits, expected)
    decoder: Any = model.model.decoder.layers[1].fc1
    handle = decoder.register_forward_pre_hook(lambda module, args: (in_one_place(args[0], float("inf")),))
    assert model(**batch).logits.isnan().all()  # behind the encoder, whose call has ended
    handle.remove()


@torch.no_grad()
def test_a_call_that_fails_leaves_nothing_behind() -> None:
    seen = NonFinite("cpu")

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor, fail: bool) -> torch.Tensor:
            seen.see(x)
            if fail:
                raise KeyError("in the middle")
            return x.nan_to_num()

    module = Fails()
    module.__dict__["forward"] = MarkedForward(module, seen)
    bad = torch.full((2, 2), float("nan"))
    with pytest.raises(KeyError):
        module(bad, True)
    assert module(torch.ones(2, 2), False).isfinite().all()
    assert module(bad, False).isnan().all()


@torch.no_grad()
def test_compiled_models_show_it_in_the_same_graph() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model, sites, gemms, _ = pruned_model("timm_vit")
    use_cuda_(model, sites, gemms, options=CPU32)
    x = tiny.tiny_batch("timm_vit", seed=5)["pixel_values"]
    assert model(in_one_place(x, float("nan"))).isnan().all()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = model(x)
    for _ in range(2):
        assert torch.equal(compiled(x), expected)
        assert compiled(in_one_place(x, float("inf"))).isnan().all()
    assert counter.frame_count == 2  # the model with the mark, and the cast of the pixels, which is a hook
    torch._dynamo.reset()


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("dynamic", ["tensor", "token"])
@torch.no_grad()
def test_dynamic_ranges_carry_it_themselves(dynamic: Any, value: float) -> None:
    """By token: that row alone. By tensor: everything."""
    for found in (DYNAMIC, type(DYNAMIC)("dynamic", 8, None, 0, -127, 127)):
        gemm = CudaGemm(
            random_gemm(40, 48, input=found), CudaOptions(dtype=torch.float32, device="cpu", dynamic=dynamic)
        )
        bad = gemm.run("dense_int8", in_one_place(inputs(9, 48), value)).isnan()
        assert bad[4].all()
        assert bool(bad.all()) == (dynamic == "tensor")
        assert gemm.run("dense_int8", inputs(9, 48)).isfinite().all()


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("found", [symmetric(0.25), asymmetric(0.25, 100)], ids=["lsq", "minmax"])
@torch.no_grad()
def test_kernels_without_integers_carry_it_in_its_row(found: Any, value: float) -> None:
    options = CudaOptions(dtype=torch.bfloat16, device="cpu", allow_fp8=True)
    gemm = CudaGemm(two_of_four(random_gemm(64, 64, input=found)), options)
    for kernel in ("dense_half", "sparse_half", "sparse_fp8"):
        bad = gemm.run(kernel, in_one_place(inputs(9, 64), value).bfloat16()).isnan()
        assert bad[4].all()
        assert not bad[[0, 1, 2, 3, 5, 6, 7, 8]].any()


def test_loading_with_check_finite_names_the_gemm(tmp_path: Path) -> None:
    """As the CPU's int8 backend always does."""
    squeezoo.compress(tiny.ALL["bert"](), "gpusq-gemm-int8", _data(), tmp_path / "c")
    manifest, tensors = load_manifest(tmp_path / "c"), load_tensors(tmp_path / "c" / WEIGHTS)
    embeds = torch.randn(1, 5, 32)
    for check in (False, True):
        model = assemble(manifest.model, tensors, manifest.plan, "cuda", "cpu", check_finite=check)
        with torch.no_grad():
            assert model(inputs_embeds=embeds).logits.isfinite().all()
            if check:
                with pytest.raises(ValueError, match=r"input of .*query.*expected finite values, found 32 of 160"):
                    model(inputs_embeds=in_one_place(embeds, float("nan")))
            else:
                assert model(inputs_embeds=in_one_place(embeds, float("nan"))).logits.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_masks_lowest_number_stays_finite(dtype: torch.dtype) -> None:
    """float32's lowest number would become -infinity in 16 bits, and a row of them has no softmax. Pixels are cast."""
    low = torch.full((1, 1, 2, 3), torch.finfo(torch.float32).min)
    hook = CastInputs(dtype)
    args, kwargs = hook(nn.Identity(), (low, low), {"attention_mask": low, "pixel_values": low, "use_cache": True})
    assert args[0].isinf().all()
    for mask in (args[1], kwargs["attention_mask"]):
        assert mask.dtype == dtype
        assert mask.float().softmax(-1).eq(1 / 3).all()
    assert kwargs["pixel_values"].isinf().all()
    assert kwargs["use_cache"] is True
    ids = torch.ones(2, 3, dtype=torch.long)
    assert hook(nn.Identity(), (), {"attention_mask": ids})[1]["attention_mask"] is ids


@pytest.mark.skipif(bool(triton_support.triton_missing()), reason=triton_support.triton_missing())
@pytest.mark.skipif(triton_support.interpreting(), reason="Triton interprets here, so nothing is compiled")
@pytest.mark.parametrize("name", ["quantize_kernel", "round_kernel", "quantize_rows_kernel", "finish_kernel"])
def test_the_kernels_that_mark_compile_for_gpus(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton needs no GPU to compile for one: the mark is one store under a condition."""
    from squeezoo.compress.runtime import triton_quantize_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel: Any = getattr(triton_quantize_kernels, name)
    constants: dict[str, Any] = dict(
        BLOCK=2048, SEE=True, EMIT=True, STEP=True, ROW=True, CORRECTION=True, BIAS=True, ACTIVATION="gelu", BLOCK_T=8,
        BLOCK_O=256,
    )  # fmt: skip
    types = {"level_ptr": "*i8", "out_ptr": "*i8" if name == "finish_kernel" else "*bf16", "sum_ptr": "*i32"}
    types |= {key: "*fp32" for key in ("mark_ptr", "scale_ptr", "step_ptr", "row_ptr", "bias_ptr")}
    types |= {key: "fp32" for key in ("scale", "low", "high", "highest")} | {"correction_ptr": "*i32"}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {
        key: "constexpr" if key in constants else types.get(key, "*bf16" if key.endswith("_ptr") else "i32")
        for key in kernel.arg_names
    }
    compiled = compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", 90, 32)
    )
    assert "st.global" in compiled.asm["ptx"]


def _data() -> Any:
    from squeezoo.compress.train_data import TrainData

    batch = tiny.tiny_batch("bert", n=8)
    return TrainData([{key: value[row] for key, value in batch.items()} for row in range(8)], _collate)


def _collate(rows: Any) -> Any:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
