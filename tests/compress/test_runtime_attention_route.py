"""Decoders attend by the native kernel: the same numbers as PyTorch's attention, but for bfloat16."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tiny
import torch
from squeezoo import bench_models
from squeezoo.compress.runtime import native
from squeezoo.compress.runtime.native import attention_route
from squeezoo.compress.runtime.native.attention_route import NATIVE_ATTENTION
from squeezoo.models.dense import logits

AVAILABLE, WHY_NOT = native.available()
pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason=WHY_NOT),
    pytest.mark.skipif(AVAILABLE and not native.has_bfloat16(), reason="the CPU has no AVX512_BF16 with VBMI"),
]
LENGTH = 20


def squeezed(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, torch.Tensor], list[int]]:
    """The int8 model of a tiny one, a batch of which the second row ends in padding, and the calls of the kernel."""
    ids = torch.randint(5, 100, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    model = bench_models.squeeze(tiny.make(name), [batch]).build("int8")
    calls: list[int] = []
    kernel: Any = attention_route.attention
    monkeypatch.setattr(attention_route, "attention", lambda *a, **k: (calls.append(1), kernel(*a, **k))[1])
    return model, batch, calls


# Attention modules outside of fused blocks: of BART's decoder two in each of two blocks, its encoder is fused.
@pytest.mark.parametrize(("name", "count"), [("opt", 2), ("gpt2", 2), ("llama", 2), ("qwen2", 2), ("bart", 4)])
def test_decoders_attend_by_the_kernel(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expected: the model with PyTorch's attention, but for bfloat16 and inputs that fall to a neighbouring level; with
    padding and without, so with a mask and by causality alone; grouped heads too (Llama's two share one)."""
    model, batch, calls = squeezed(name, monkeypatch)
    assert model.config._attn_implementation == NATIVE_ATTENTION
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("sdpa")
    valid = batch["attention_mask"].bool()
    with torch.inference_mode():
        for given in (batch, {"input_ids": batch["input_ids"]}):
            calls.clear()
            found = logits(model, given)
            assert len(calls) == count
            expected = logits(plain, given)
            assert len(calls) == count
            rows = valid if given is batch else torch.ones_like(valid)
            assert float((found - expected)[rows].norm()) <= 0.03 * float(expected[rows].norm())
            assert not torch.equal(found, expected)


def test_tokens_after_a_prompt_and_gradients_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, calls = squeezed("opt", monkeypatch)
    with torch.inference_mode():
        cache = model(input_ids=batch["input_ids"], use_cache=True).past_key_values
        calls.clear()
        model(input_ids=batch["input_ids"][:, :1], past_key_values=cache, use_cache=True)
        assert not calls
        model(input_ids=batch["input_ids"][:, :10])
        assert not calls
    scores = torch.zeros(1, 2, LENGTH, 8, requires_grad=True)
    attention_route._attention(model.model.decoder.layers[0].self_attn, scores, scores, scores, None)
    assert not calls


def test_a_model_unpickled_elsewhere_knows_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh process is played by taking the name out of transformers' table."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, batch, _ = squeezed("opt", monkeypatch)
    stored = pickle.dumps(model)
    monkeypatch.delitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, NATIVE_ATTENTION)
    again = pickle.loads(stored)
    with torch.inference_mode():
        assert torch.equal(logits(again, batch), logits(model, batch))


def test_exact_attention_stays_pytorch_s() -> None:
    """`attention="float32"`, another implementation, and models that are all fused."""
    from squeezoo.compress.checkpoint import assemble

    batch = {"input_ids": torch.randint(5, 100, (1, LENGTH), generator=torch.Generator().manual_seed(3))}
    packed = bench_models.squeeze(tiny.make("opt"), [batch])
    exact: Any = assemble(packed.description, packed.tensors, packed.plan, "int8", attention="float32")
    assert exact.config._attn_implementation == "sdpa"
    fused: Any = bench_models.squeeze(tiny.make("bert"), [batch]).build("int8")
    assert fused.config._attn_implementation == "sdpa"
    eager: Any = tiny.make("opt")
    eager.set_attn_implementation("eager")
    assert not attention_route.route_attention_(eager)
    assert eager.config._attn_implementation == "eager"
