"""describe and build: a module tree from JSON alone, equal to the original once its state dict is loaded."""

from __future__ import annotations

import copy
import json
import time

import pytest
import tiny
import torch
from squeezoo.models import adapter_for, find_sites
from squeezoo.models.dense import DenseError, build, describe, load_dense, logits
from torch import nn
from torch.nn.utils import parametrize


@pytest.mark.parametrize("name", list(tiny.TINY))
def test_built_model_equals_the_original(name: str) -> None:
    """Through JSON text and back; buffers that no state dict holds must be right by themselves."""
    model = tiny.TINY[name]()
    description = json.loads(json.dumps(describe(model)))
    assert set(description) == {"library", "class", "config"}
    built = build(description)
    assert type(built) is type(model)
    assert not built.training
    built.load_state_dict(model.state_dict())
    batch = tiny.tiny_batch(name)
    with torch.no_grad():
        assert torch.equal(logits(built, batch), logits(model, batch))
    assert describe(built) == describe(model)


def test_buffers_without_state_are_real() -> None:
    """transformers' BertEmbeddings: position_ids = 0..n-1, token_type_ids = 0, both non-persistent."""
    built = build(describe(tiny.TINY["bert"]()))
    embeddings = built.bert.embeddings
    assert embeddings.position_ids.tolist() == [list(range(64))]
    assert not embeddings.token_type_ids.any()
    assert "bert.embeddings.position_ids" not in built.state_dict()
    assert not any(tensor.is_meta for tensor in (*built.parameters(), *built.buffers()))


def test_tied_parameters_are_tied_again() -> None:
    """The decoder and the word embedding of BertForMaskedLM are one parameter, in the built one too."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertForMaskedLM(BertConfig(**sizes)).eval()
    built = build(describe(model))
    built.load_state_dict(model.state_dict())
    assert built.cls.predictions.decoder.weight is built.bert.embeddings.word_embeddings.weight
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(built(ids).logits, model(ids).logits)


def test_bert_base_is_built_without_initialising() -> None:
    """BERT-base, 12 blocks of width 768 (Devlin et al. 2019): 72 GEMMs, 12 x (4 x 768^2 + 2 x 768 x 3072) = 84,934,656
    weights. Random initialisation takes seconds on one core, building less than half a second; the best of three."""
    from transformers import BertConfig

    description = {
        "library": "transformers",
        "class": "BertForSequenceClassification",
        "config": BertConfig().to_dict(),
    }
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model = build(description)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
    sites = find_sites(model, adapter_for(model))
    assert len(sites.gemms) == 72
    assert sum(gemm.out_features * gemm.in_features for gemm in sites.gemms) == 84_934_656


def test_custom_size_survives_copies_and_folders() -> None:
    """The arguments of timm.create_model live on the model: they survive deepcopy and reach the description."""
    args = {key: value for key, value in tiny.TIMM_ARGS.items() if key != "num_classes"}
    model = load_dense("timm/vit_tiny_patch16_224", num_labels=5, model_args=args).model
    config = describe(copy.deepcopy(model))["config"]
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["num_classes"] == 5
    assert config["model_args"] == {**args, "num_classes": 5}
    model.reset_classifier(2)  # a change after creation
    assert build(describe(model)).head.weight.shape == (2, 32)


def test_attached_model_is_described_as_the_plain_one() -> None:
    """A parametrization changes the module's class and keys, not the architecture."""
    for name in tiny.TINY:
        model = tiny.TINY[name]()
        plain = describe(model)
        for gemm in find_sites(model, adapter_for(model)).gemms:
            parametrize.register_parametrization(gemm.module, "weight", nn.Identity())
        assert describe(model) == plain


def test_no_path_or_library_version_in_a_description() -> None:
    """Two machines describe the same model by the same words."""
    assert not {"_name_or_path", "transformers_version"} & set(describe(tiny.TINY["bert"]())["config"])


@pytest.mark.parametrize("change", [{"embed_dim": 64}, {"depth": 3}])
def test_arguments_that_give_another_model(change: dict[str, int]) -> None:
    """A timm model whose arguments are unknown or wrong is found out when it is described, not when it is rebuilt."""
    model = tiny.TINY["timm_vit"]()
    model.squeezoo_model_args = {**tiny.TIMM_ARGS, **change}
    with pytest.raises(DenseError, match=r"cannot be rebuilt.*Set model\.squeezoo_model_args"):
        describe(model)


def test_arguments_that_json_cannot_hold() -> None:
    """timm takes classes as arguments; a file cannot. The message shows the way by name."""
    args = {**tiny.TIMM_ARGS, "act_layer": nn.ReLU}
    model = load_dense("timm/vit_tiny_patch16_224", model_args=args).model
    with pytest.raises(DenseError, match=r"JSON cannot hold.*act_layer='gelu'"):
        describe(model)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, "has the keys library, class, config"),
        ({"library": "keras", "class": "X", "config": {}}, "unknown library 'keras'.*transformers and timm"),
        ({"library": "transformers", "class": "BertForNothing", "config": {}}, "no model class 'BertForNothing'"),
        ({"library": "transformers", "class": "pipeline", "config": {}}, "no model class 'pipeline'"),
        ({"library": "timm", "class": "X", "config": {"architecture": "vit_no"}}, "no architecture 'vit_no'"),
    ],
)
def test_descriptions_that_are_none(description: dict[str, object], message: str) -> None:
    """A description comes from a file: nothing in it may name a class that is no model."""
    with pytest.raises(DenseError, match=message):
        build(description)


def test_model_of_no_library() -> None:
    """Found class and expected kinds are named."""
    with pytest.raises(DenseError, match=r"expected a transformers model .*found torch\.nn"):
        describe(nn.Linear(2, 2))
