"""BERTScore with a local encoder: what is asked for and when, and the library itself against the paper's equations."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from squeezoo.eval import get_task
from squeezoo.eval.dialogue import predict
from squeezoo.eval.dialogue_bertscore import BertScorer
from squeezoo.eval.dialogue_score import Reply, score
from squeezoo.eval.runner import Runner
from writing import writer

REASON = "bert-score is not installed: make test-extras builds an environment that has it"
WORDS = ("a", "test", ".", "good", "morning", "evening", "to", "you", "all", "my", "friends")
ROW: dict[str, Any] = {
    "id": "0", "persona": ("i am 0.",), "turns": (("them", "hi"), ("you", "good morning to you")), "replies": (1,),
    "distractors": (("no",),), "candidates_from": "file",
}  # fmt: skip


def _encoder(folder: Path, **said: Any) -> Path:
    """A tiny random BERT of two blocks, whose tokenizer knows `WORDS`."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*special, *WORDS))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **said).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def _settings(folder: Path | str, layer: int = 0) -> dict[str, Any]:
    return {"bertscore_model": str(folder), "bertscore_layer": layer}


def _runner(**settings: Any) -> Runner:
    model, tokenizer = writer("causal-lm")
    return Runner(model, tokenizer, "cpu", 4, 200, {**get_task("personachat").settings, "max_target": 4, **settings})


def test_nothing_is_asked_for_by_default() -> None:
    assert BertScorer.of(_settings(""), "cpu", 4) is None


def test_what_is_missing_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is never run: its forward fails."""

    def forward(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was run before the settings were checked")

    for settings, message in (
        (_settings(tmp_path / "none"), r"expected a folder with an encoder \(config\.json\)"),
        (_settings(_encoder(tmp_path / "my-bert")), "pip install bert-score"),
    ):
        monkeypatch.setitem(sys.modules, "bert_score", None)  # as if it were not installed
        runner = _runner(**settings)
        monkeypatch.setattr(runner.model, "forward", forward)
        with pytest.raises(ValueError, match=message):
            predict(runner, [ROW])


def test_the_mean_over_replies() -> None:
    found = score([[Reply("a", 1, -1.0, 1, 0.5), Reply("", 1, -1.0, 1, 0.0)]], [["a", "c"]])
    assert found["bertscore"] == 0.25
    assert "bertscore" not in score([[Reply("a", 1, -1.0, 1)]], [["a"]])


def _expected_f1(folder: Path, layer: int, text: str, reference: str) -> float:
    """Zhang et al. 2020, section 3: P and R are means over tokens of the largest cosine, those of [CLS] and [SEP] left
    out as the authors' code does (their weight is 0)."""
    import transformers

    model: Any = transformers.BertModel.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def states(words: str) -> torch.Tensor:
        with torch.no_grad():
            found = model(**tokenizer(words, return_tensors="pt"), output_hidden_states=True).hidden_states[layer][0]
        return torch.nn.functional.normalize(found, dim=-1)

    # the special tokens of the other side are there to be matched with
    text_LH, reference_LH = states(text), states(reference)
    cosine_LL = text_LH @ reference_LH.T
    precision = float(cosine_LL.amax(1)[1:-1].mean())
    recall = float(cosine_LL.amax(0)[1:-1].mean())
    return 2 * precision * recall / (precision + recall)


def test_the_library_on_a_local_encoder(tmp_path: Path) -> None:
    """Against the equations; empty replies and references have 0 and move no other pair's value."""
    pytest.importorskip("bert_score", reason=REASON)
    folder = _encoder(tmp_path / "tiny", model_max_length=32)
    for layer in (1, 2):
        settings = _settings(folder, layer)
        scorer = BertScorer.of(settings, "cpu", 2)
        assert scorer is not None
        pairs = [("good evening", "good morning to you"), ("", "my friends"), (" ", "a"), ("to all .", "")]
        pairs += [("my friends", "my friends"), ("", "")]
        found = scorer.f1(*map(list, zip(*pairs)))
        assert found[0] == pytest.approx(_expected_f1(folder, layer, *pairs[0]), abs=1e-5)
        assert [found[i] for i in (1, 2, 3, 5)] == [0, 0, 0, 0]
        assert found[4] == pytest.approx(1, abs=1e-5)
        assert scorer.f1(["", ""], ["a", "you"]) == [0, 0]
        assert settings["bertscore_model"] == "tiny"  # no path of this machine in a score
        assert settings["bertscore_layer"] == layer
        assert str(settings["bertscore"]).startswith("bert-score ")


def test_layers_and_encoders_that_do_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("bert_score", reason=REASON)
    folder = _encoder(tmp_path / "tiny", model_max_length=32)
    with pytest.raises(ValueError, match="knows no layer for a model named 'tiny'"):
        BertScorer.of(_settings(folder), "cpu", 2)
    with pytest.raises(ValueError, match=r"cannot use layer 3 of .*between 0 and 2"):
        BertScorer.of(_settings(folder, 3), "cpu", 2)
    with pytest.raises(ValueError, match="write model_max_length into"):
        BertScorer.of(_settings(_encoder(tmp_path / "boundless"), 1), "cpu", 2)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="bert-score cannot use layer 1"):
        BertScorer.of(_settings(folder, 1), "cpu", 2)


def test_a_model_that_writes_nothing_has_a_score(tmp_path: Path) -> None:
    """Every reply is the line break alone, so every reply is empty; the right ones are not."""
    pytest.importorskip("bert_score", reason=REASON)
    runner = _runner(**_settings(_encoder(tmp_path / "tiny", model_max_length=32), 2))
    newline = runner.processor.get_vocab()["\n"]
    model: Any = runner.model
    final = model.get_output_embeddings()
    head = torch.nn.Linear(final.in_features, final.out_features)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(newline), final.out_features) * 5.0)
    model.set_output_embeddings(head)
    ((reply,),) = predict(runner, [ROW])
    assert (reply.text, reply.bertscore) == ("", 0.0)
    assert math.isfinite(score([[reply]], [["good morning to you"]])["bertscore"])
