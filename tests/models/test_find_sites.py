"""find_sites: what it finds on real architectures, dense, attached, with and without a head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from squeezoo.models import AdapterError, adapter_for, find_sites
from squeezoo.models.bert import BERT
from squeezoo.models.gpt2 import GPT2
from squeezoo.models.vit import TIMM_VIT
from torch import nn
from torch.nn.utils import parametrize


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=24, n_layer=2, n_head=2))


@pytest.mark.parametrize(
    ("name", "roles", "final"),
    [
        ("bert", ["q", "k", "v", "attn_out", "ffn_up", "ffn_down"], "classifier"),
        ("vit", ["q", "k", "v", "attn_out", "ffn_up", "ffn_down"], "classifier"),
        ("timm_vit", ["qkv", "attn_out", "ffn_up", "ffn_down"], "head"),
    ],
)
def test_sites_of_every_adapter(name: str, roles: list[str], final: str) -> None:
    """Roles in model order, shapes and blocks of the tiny models: width 32, FFN 64, 2 blocks, as tiny.py makes them."""
    model = tiny.TINY[name]()
    sites = find_sites(model, adapter_for(model))
    assert sites.adapter.name == name
    assert [block.index for block in sites.blocks] == [0, 1]
    assert [gemm.role for gemm in sites.gemms] == roles * 2
    assert [gemm.block for gemm in sites.gemms] == [0] * len(roles) + [1] * len(roles)
    shapes = {"qkv": (96, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    for gemm in sites.gemms:
        assert gemm.module is model.get_submodule(gemm.name)
        assert (gemm.out_features, gemm.in_features) == shapes.get(gemm.role, (32, 32)) == tuple(gemm.weight_OI.shape)
        assert gemm.parts == (3 if gemm.role == "qkv" else 1)
    assert [found.block for found in sites.attention] == [0, 1]
    assert {found.kind for found in sites.attention} == {"self"}
    assert sites.final is not None
    assert (sites.final.name, sites.final.role, sites.final.block) == (final, "final", None)
    assert not sites.final_tied


@pytest.mark.parametrize("name", list(tiny.TINY))
def test_attention_site_and_activation_take_part_in_the_forward_pass(name: str) -> None:
    """The named modules are the ones that run: each is called once per block, the activation on [.., FFN width]."""
    model = tiny.TINY[name]()
    sites = find_sites(model, adapter_for(model))
    called: list[str] = []
    widths: set[int] = set()
    for found in sites.attention:
        found.module.register_forward_hook(lambda m, i, o, name=found.name: called.append(name))
    for block in sites.blocks:
        assert block.activation is not None
        model.get_submodule(block.activation).register_forward_hook(lambda m, i, o: widths.add(o.shape[-1]))
    batch = tiny.tiny_batch(name)
    if name == "timm_vit":
        model(batch["pixel_values"])
    else:
        model(**batch)
    assert called == [found.name for found in sites.attention]
    assert widths == {64}


def test_conv1d_is_seen_as_out_in() -> None:
    """GPT-2's Conv1D stores [in, out] (transformers.pytorch_utils): y = x W + b must equal x weight_OI^T + b."""
    model = tiny_gpt2()
    sites = find_sites(model, GPT2)
    qkv = sites.gemms[0]
    assert (qkv.out_features, qkv.in_features, qkv.parts) == (72, 24, 3)
    x = torch.randn(3, 24)
    torch.testing.assert_close(qkv.module(x), nn.functional.linear(x, qkv.weight_OI, qkv.module.bias))
    assert qkv.weight_OI.data_ptr() == qkv.module.weight.data_ptr()  # a view, not a copy
    assert sites.final_tied  # GPT-2 ties lm_head and wte (Radford et al. 2019)


def test_bare_backbone_has_no_final_projection() -> None:
    """BertModel has neither head nor prefix (transformers); timm's head is then an Identity."""
    bert = tiny.TINY["bert"]().bert
    sites = find_sites(bert, adapter_for(bert))
    assert sites.gemms[0].name == "encoder.layer.0.attention.self.query"
    assert sites.final is None
    assert not sites.final_tied

    import timm

    backbone = timm.create_model("vit_tiny_patch16_224", **{**tiny.TIMM_ARGS, "num_classes": 0})
    assert find_sites(backbone, TIMM_VIT).final is None


def test_tied_head() -> None:
    """BertForMaskedLM ties its decoder to the word embedding by default; untied by the config it is its own matrix."""
    from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering

    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    for tie in (True, False):
        sites = find_sites(BertForMaskedLM(BertConfig(**sizes, tie_word_embeddings=tie)), BERT)
        assert sites.final is not None
        assert sites.final.name == "cls.predictions.decoder"
        assert sites.final_tied is tie
    answers = find_sites(BertForQuestionAnswering(BertConfig(**sizes)), BERT)
    assert answers.final is not None
    assert (answers.final.name, answers.final.out_features) == ("qa_outputs", 2)


class Halve(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


@pytest.mark.parametrize("name", list(tiny.TINY))
def test_attached_model_has_the_same_sites(name: str) -> None:
    """A parametrized module is of another class and holds its weight elsewhere (torch.nn.utils.parametrize)."""
    model = tiny.TINY[name]()
    before = find_sites(model, adapter_for(model))
    plain = before.gemms[0].weight_OI.clone()
    for gemm in (*before.gemms, before.final):
        assert gemm is not None
        parametrize.register_parametrization(gemm.module, "weight", Halve())
    after = find_sites(model, adapter_for(model))
    assert after == before
    torch.testing.assert_close(after.gemms[0].weight_OI, plain / 2)


def test_tie_survives_a_parametrization() -> None:
    """register_parametrization keeps the Parameter object, so the embedding is still tied to it."""
    model = tiny_gpt2()
    final = find_sites(model, GPT2).final
    assert final is not None
    parametrize.register_parametrization(final.module, "weight", Halve())
    assert find_sites(model, GPT2).final_tied


def test_distilled_deit() -> None:
    """timm's DeiT has two heads (Touvron et al. 2021, section 4); `head` is the final projection."""
    import timm

    args = {key: value for key, value in tiny.TIMM_ARGS.items() if key != "num_classes"}
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, **args)
    sites = find_sites(model, adapter_for(model))
    assert len(sites.gemms) == 8
    assert sites.final is not None
    assert sites.final.name == "head"


def test_activation_that_does_not_stand_alone() -> None:
    """A norm before fc2 (timm's scale_mlp_norm) or a gate (SwiGLU, half width): fusing would skip it, so None."""
    import timm
    from timm.layers import SwiGLUPacked

    for extra in ({"scale_mlp_norm": True}, {"mlp_layer": SwiGLUPacked}):
        model = timm.create_model("vit_tiny_patch16_224", **tiny.TIMM_ARGS, **extra)
        sites = find_sites(model, TIMM_VIT)
        assert len(sites.gemms) == 8
        assert {block.activation for block in sites.blocks} == {None}


def test_conv1d_with_the_layout_of_linear() -> None:
    """The mistake everybody makes with GPT-2."""
    record = replace(GPT2, gemms=(replace(GPT2.gemms[0], layout="out_in"), *GPT2.gemms[1:]))
    with pytest.raises(AdapterError, match=r"c_attn` is a Conv1D.*write layout='in_out'"):
        find_sites(tiny_gpt2(), record)


def test_permutation_where_a_norm_stands_between() -> None:
    """timm's scale_mlp_norm and scale_attn_norm put a LayerNorm before fc2 and proj: its columns may not be moved."""
    import timm

    for extra, left in (
        ((), ["ffn_down", "attn_out"]),
        (("scale_mlp_norm",), ["attn_out"]),
        (("scale_attn_norm",), ["ffn_down"]),
    ):
        model = timm.create_model("vit_tiny_patch16_224", **tiny.TIMM_ARGS, **dict.fromkeys(extra, True))
        for block in find_sites(model, TIMM_VIT).blocks:
            assert [entry.consumer_role for entry in block.permutable] == left


def test_blocks_of_an_encoder_and_a_decoder() -> None:
    """Indices go on from the encoder to the decoder, so that no two blocks share one, whatever their numbers."""
    from transformers import BartConfig, BartForCausalLM, BartModel

    config = BartConfig(**{**tiny.BART, "encoder_layers": 3, "decoder_layers": 2})
    sites = find_sites(BartModel(config), adapter_for(tiny.ALL["bart"]()))
    assert [(block.index, block.kind) for block in sites.blocks] == [
        (0, "encoder"), (1, "encoder"), (2, "encoder"), (3, "decoder"), (4, "decoder"),
    ]  # fmt: skip
    assert sites.blocks[3].name == "decoder.layers.0"
    assert [sum(gemm.block == index for gemm in sites.gemms) for index in range(5)] == [6, 6, 6, 10, 10]
    alone = find_sites(BartForCausalLM(config), adapter_for(tiny.ALL["bart"]()))  # a decoder without its encoder
    assert [block.index for block in alone.blocks] == [0, 1]
