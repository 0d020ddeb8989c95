"""fairseq checkpoints become transformers models with equal outputs and come back exactly, without fairseq.

Expected outputs are those of the stand-ins (tests/standins.py), which compute BART and Wav2Vec2 from the papers; the
same on fairseq's own models is in tests/extras/test_fairseq.py.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from squeezoo.models.dense import DenseError, load_dense
from squeezoo.models.fairseq_checkpoint import FairseqCheckpoint, load_fairseq_checkpoint, save_fairseq_checkpoint
from squeezoo.models.fairseq_convert import from_transformers, read_fairseq, speech_processor, to_transformers
from squeezoo.models.fairseq_wav2vec2_args import conv_layers

VARIANTS = [("default", False, 16), ("layer_norm", True, 24), ("default", True, 24), ("layer_norm", False, 16)]


def loaded(model: Any, path: Path, **file: Any) -> FairseqCheckpoint:
    standins.save(model, path, **file)
    return load_fairseq_checkpoint(path)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.fixture
def bart_file(tmp_path: Path) -> Path:
    standins.save(standins.bart(), tmp_path / "bart.pt", args=Namespace(**standins.BART_ARGS))
    return tmp_path / "bart.pt"


def test_bart_gives_the_same_logits_and_comes_back_exactly(bart_file: Path) -> None:
    model = standins.bart()
    checkpoint = load_fairseq_checkpoint(bart_file)
    converted = to_transformers(checkpoint)
    source, target = standins.tokens()
    with torch.no_grad():
        expected = model(source, target)
        found = converted(input_ids=source, attention_mask=source.ne(1).long(), decoder_input_ids=target).logits
    real = target.ne(standins.PAD)
    assert torch.allclose(found[real], expected[real], atol=1e-5)
    assert expected[real].std() > 0.1  # not all alike
    assert same(from_transformers(converted, like=checkpoint).state, checkpoint.state)


def test_bart_without_the_original_gives_what_fairseq_would_have_stored(bart_file: Path) -> None:
    """Names and tensors equal fairseq's own state dict; the arguments rebuild the same model."""
    checkpoint = load_fairseq_checkpoint(bart_file)
    made = from_transformers(to_transformers(checkpoint))
    assert same(made.state, checkpoint.state)
    assert {key: made.args[key] for key in standins.BART_ARGS if key in made.args and key != "arch"} == {
        key: value for key, value in standins.BART_ARGS.items() if key != "arch"
    }


def test_bart_with_a_classification_head(tmp_path: Path) -> None:
    """Becomes a sequence classifier, which shifts the source itself; the head's name survives the way back."""
    model = standins.bart(head=("mnli", 3))
    checkpoint = loaded(model, tmp_path / "mnli.pt", args=Namespace(**standins.BART_ARGS))
    converted = to_transformers(checkpoint)
    source, target = standins.tokens()
    target[1, 8] = standins.PAD
    with torch.no_grad():
        expected = model(source, target)
        found = converted(input_ids=source, attention_mask=source.ne(1).long()).logits
    assert type(converted).__name__ == "BartForSequenceClassification"
    assert torch.allclose(found, expected, atol=1e-5)
    assert same(from_transformers(converted, like=checkpoint).state, checkpoint.state)
    assert "classification_heads.squeezoo.dense.weight" in from_transformers(converted).state


def test_old_bart_checkpoints_with_fused_qkv(tmp_path: Path) -> None:
    """Early fairseq: in_proj_weight holds Q, K and V; no output projection is stored."""
    model = standins.bart()
    old = dict(model.state_dict())
    del old["decoder.output_projection.weight"]
    for stem in [name.removesuffix(".q_proj.weight") for name in old if name.endswith("q_proj.weight")]:
        for kind in ("weight", "bias"):
            old[f"{stem}.in_proj_{kind}"] = torch.cat([old.pop(f"{stem}.{part}_proj.{kind}") for part in "qkv"])
    holder = Namespace(state_dict=lambda: old)
    checkpoint = loaded(holder, tmp_path / "old.pt", args=Namespace(**standins.BART_ARGS))
    source, target = standins.tokens()
    with torch.no_grad():
        found = to_transformers(checkpoint)(input_ids=source[:1], decoder_input_ids=target[:1]).logits
        assert torch.allclose(found, model(source[:1], target[:1]), atol=1e-5)
    back = from_transformers(to_transformers(checkpoint), like=checkpoint)
    assert same(back.state, dict(model.state_dict()))


@pytest.mark.parametrize(("mode", "norm_first", "width"), VARIANTS)
def test_wav2vec2_gives_the_same_states_and_comes_back_exactly(
    tmp_path: Path, mode: str, norm_first: bool, width: int
) -> None:
    """Group and layer norm extractors, norm before and after, with and without a projection after the convolutions."""
    model, args = standins.wav2vec2(mode, norm_first, width)
    cfg = {"model": {"_name": "wav2vec2", **args}, "task": {"_name": "audio_pretraining", "normalize": True}}
    checkpoint = loaded(model, tmp_path / "w.pt", cfg=cfg)
    converted = to_transformers(checkpoint)
    audio = torch.randn(2, 600, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(audio), converted(audio).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)
    assert same(from_transformers(converted, like=checkpoint).state, checkpoint.state)  # final_proj comes from `like`
    bare = from_transformers(converted)
    assert {name for name in checkpoint.state if name not in bare.state} == {"final_proj.weight", "final_proj.bias"}
    assert conv_layers(bare.args["conv_feature_layers"]) == conv_layers(args["conv_feature_layers"])


@pytest.mark.parametrize("old", [False, True], ids=["cfg", "namespace"])
def test_ctc(tmp_path: Path, old: bool) -> None:
    """Both file formats of fairseq: nested dicts, and a Namespace inside a Namespace."""
    model, inner = standins.wav2vec_ctc(mode="layer_norm", norm_first=True)
    task = {"_name": "audio_finetuning", "normalize": True, "labels": "ltr"}
    outer = {"mask_prob": 0.0, "final_dropout": 0.1}
    if old:
        w2v = Namespace(arch="wav2vec2", task="audio_pretraining", **inner, normalize=True)
        flat = Namespace(
            arch="wav2vec_ctc", task="audio_pretraining", labels="ltr", normalize=True, w2v_args=w2v, **outer
        )
        checkpoint = loaded(model, tmp_path / "c.pt", args=flat)
    else:
        w2v_args = {"model": {"_name": "wav2vec2", **inner}, "task": {"_name": "audio_pretraining", "normalize": True}}
        cfg = {"model": {"_name": "wav2vec_ctc", "w2v_args": w2v_args, **outer}, "task": task}
        checkpoint = loaded(model, tmp_path / "c.pt", cfg=cfg)
    converted = to_transformers(checkpoint)
    audio = torch.randn(2, 600, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(converted(audio).logits, model(audio), atol=1e-5)
    assert same(from_transformers(converted, like=checkpoint).state, checkpoint.state)
    assert checkpoint.task["_name"] == "audio_finetuning"
    assert checkpoint.args["w2v_args"]["model"]["_name"] == "wav2vec2"
    assert converted.config.final_dropout == 0.1


def test_a_written_file_reads_back(tmp_path: Path) -> None:
    """Symbols, arguments and tensors; torch.load reads a Wav2Vec2 file with its defaults, that is without classes."""
    model, inner = standins.wav2vec_ctc()
    w2v_args = {"model": {"_name": "wav2vec2", **inner}, "task": {"_name": "audio_pretraining"}}
    args = {"_name": "wav2vec_ctc", "w2v_args": w2v_args}
    task = {"_name": "audio_finetuning", "normalize": False}
    checkpoint = FairseqCheckpoint("wav2vec_ctc", args, task, dict(model.state_dict()), standins.SYMBOLS)
    save_fairseq_checkpoint(checkpoint, tmp_path / "new.pt")
    again = load_fairseq_checkpoint(tmp_path / "new.pt")
    assert (again.kind, again.args, again.task, again.symbols) == ("wav2vec_ctc", args, task, standins.SYMBOLS)
    assert same(again.state, checkpoint.state)
    assert [path.name for path in tmp_path.iterdir()] == ["new.pt"]
    assert torch.load(tmp_path / "new.pt", weights_only=True)["squeezoo_symbols"] == list(standins.SYMBOLS)


def test_the_processor_of_a_ctc_model(tmp_path: Path) -> None:
    """fairseq's blank is `<s>`, index 0, transformers' is `<pad>`; repeats collapse, blanks go, `|` is a space."""
    model, inner = standins.wav2vec_ctc()
    w2v_args = {"model": {"_name": "wav2vec2", **inner}, "task": {"_name": "audio_pretraining"}}
    cfg = {"model": {"_name": "wav2vec_ctc", "w2v_args": w2v_args}, "task": {"normalize": True, "sample_rate": 8000}}
    standins.save(model, tmp_path / "c.pt", cfg=cfg)
    file = torch.load(tmp_path / "c.pt", weights_only=True) | {"squeezoo_symbols": list(standins.SYMBOLS)}
    torch.save(file, tmp_path / "c.pt")
    converted, processor = read_fairseq(tmp_path / "c.pt", "ctc")
    assert processor.tokenizer.decode([6, 0, 5, 5, 0, 5, 4, 7, 8, 9]) == "TEE AON"
    assert processor.tokenizer.pad_token_id == converted.config.pad_token_id == 0
    assert (processor.feature_extractor.do_normalize, processor.feature_extractor.sampling_rate) == (True, 8000)
    without = FairseqCheckpoint("wav2vec2", {}, {}, {})
    assert type(speech_processor(without)).__name__ == "Wav2Vec2FeatureExtractor"


def test_half_precision_files_come_back_in_half_precision(tmp_path: Path) -> None:
    checkpoint = loaded(standins.bart().half(), tmp_path / "h.pt", args=Namespace(**standins.BART_ARGS))
    model = to_transformers(checkpoint)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same(from_transformers(model, like=checkpoint).state, checkpoint.state)
    with torch.no_grad():
        model.model.encoder.layers[0].fc1.weight[0, 0] = 1 / 3  # no half precision number
    back = from_transformers(model, like=checkpoint).state["encoder.layers.0.fc1.weight"]
    assert back.dtype == torch.float32
    assert back[0, 0] == torch.tensor(1 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_normalize_before": True}, "layer norms after each part"),
        ({"activation_fn": "mish"}, "activation_fn 'mish' of fairseq has no equal"),
        ({"pooler_activation_fn": "relu"}, "pooler_activation_fn tanh"),
        ({"encoder_attention_heads": None}, "lack 'encoder_attention_heads'"),
        ({"arch": "transformer_lm"}, "architecture 'transformer_lm'.*compressed live"),
    ],
)
def test_variants_that_transformers_does_not_compute_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DenseError, match=message):
        to_transformers(loaded(standins.bart(), tmp_path / "b.pt", args=Namespace(**standins.BART_ARGS | change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_type": "conformer"}, "transformer blocks"),
        ({"pos_conv_depth": 5}, "one positional convolution"),
        ({"quantize_input": True}, "raw features"),
        ({"conv_feature_layers": "[(16, 10, 5)] + [(16, 4, 2)] * 2"}, "conv_feature_layers says"),
    ],
)
def test_variants_of_wav2vec2_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model, args = standins.wav2vec2()
    cfg = {"model": {"_name": "wav2vec2", **args, **change}}
    with pytest.raises(DenseError, match=message):
        to_transformers(loaded(model, tmp_path / "w.pt", cfg=cfg))


def test_no_tensor_is_lost_or_made_up(tmp_path: Path) -> None:
    args = Namespace(**standins.BART_ARGS)
    model = standins.bart()
    model.encoder.extra = torch.nn.Linear(2, 2)
    with pytest.raises(DenseError, match=r"encoder\.extra\.weight has no place"):
        to_transformers(loaded(model, tmp_path / "more.pt", args=args))
    model = standins.bart()
    del model.decoder.layers[0].encoder_attn
    with pytest.raises(DenseError, match=r"decoder\.layers\.0\.encoder_attn\.q_proj\.weight is missing"):
        to_transformers(loaded(model, tmp_path / "less.pt", args=args))
    model = standins.bart()
    model.decoder.output_projection.weight = torch.nn.Parameter(torch.randn(40, 16))
    with pytest.raises(DenseError, match="one embedding for encoder, decoder and output"):
        to_transformers(loaded(model, tmp_path / "untied.pt", args=args))


def test_what_cannot_go_back_is_refused(bart_file: Path) -> None:
    import tiny

    with pytest.raises(DenseError, match="BertForSequenceClassification cannot become a fairseq checkpoint"):
        from_transformers(tiny.TINY["bert"]())
    model = to_transformers(load_fairseq_checkpoint(bart_file))
    with pytest.raises(DenseError, match="`like` is a wav2vec2"):
        from_transformers(model, like=FairseqCheckpoint("wav2vec2", {}, {}, {}))
    model.final_logits_bias[0, 3] = 1.0
    with pytest.raises(DenseError, match="final_logits_bias of zeros"):
        from_transformers(model)


def test_kinds_of_heads(bart_file: Path) -> None:
    for kind in ("auto", "seq2seq-lm"):
        assert type(read_fairseq(bart_file, kind)[0]).__name__ == "BartForConditionalGeneration"
    assert type(read_fairseq(bart_file, "base")[0]).__name__ == "BartModel"
    with pytest.raises(DenseError, match=r"holds a BartForConditionalGeneration.*kind='auto'"):
        read_fairseq(bart_file, "classification")
    standins.save(standins.bart(head=("mnli", 3)), bart_file, args=Namespace(**standins.BART_ARGS))
    assert read_fairseq(bart_file, "classification", 3)[0].config.num_labels == 3
    with pytest.raises(DenseError, match=r"with 3 labels, not kind='classification' with 2 labels"):
        read_fairseq(bart_file, "classification", 2)


def test_load_dense_takes_fairseq_files(bart_file: Path) -> None:
    dense = load_dense(bart_file, kind="seq2seq-lm")
    assert (dense.name, dense.library, dense.processor) == ("bart.pt", "transformers", None)
    assert type(dense.model).__name__ == "BartForConditionalGeneration"


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('false')",
        "[(1, 2, 3)] * 10**9",
        "[(1, 2)]",
        "open('x')",
        "[(i, 2, 3) for i in (1,)]",
        "",
    ],
)
def test_convolutions_are_read_and_not_run(text: str) -> None:
    """fairseq evaluates this string as Python."""
    with pytest.raises(DenseError, match="conv_feature_layers"):
        conv_layers(text)


def test_convolutions_of_the_published_models() -> None:
    """The default of fairseq's Wav2Vec2Config: seven convolutions, 320 samples a frame."""
    layers = conv_layers("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]")
    assert layers == [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
    assert conv_layers("[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] * 2") == layers
