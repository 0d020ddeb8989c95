"""The lines that a card prints really load and run the model, for every kind of task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
from speech_folders import ctc_model, sound
from squeezoo.compress.engine import compress
from squeezoo.compress.recipe import Recipe
from squeezoo.models.dense import Dense
from squeezoo.zoo_cards.card import Card
from squeezoo.zoo_cards.datasets import describe_task
from squeezoo.zoo_cards.render import render_card
from tiny import ALL

RECIPE = Recipe.parse({
    "name": "test", "description": "-", "source": "-", "rules": [{"roles": ("block",), "sparsity": "2:4"}],
    "stages": [{"stage": "prune"}],
})  # fmt: skip


def lines_of(card: Card) -> str:
    code = render_card(card).split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 5
    return code


def run(card: Card, made: Dense, folder: Path) -> dict[str, Any]:
    """Squeeze the model and execute its card's lines, with the folder for the name."""
    compress(made, RECIPE, None, folder / "small")
    names: dict[str, Any] = {}
    exec(lines_of(card).replace(card.name, str(folder / "small")), names)
    assert isinstance(names["model"], type(made.model))
    assert not names["model"].training
    return names


@pytest.mark.parametrize(
    ("name", "task", "shown"),
    [
        ("timm_vit", "digits", "tensor([["),
        ("vit", "digits", "tensor([["),
        ("bert", "glue/mrpc", "tensor([["),
        ("bert", "glue/stsb", "tensor([["),
        ("bert_token", "wnut17", "tensor([["),
        ("bert_qa", "squad1", "start_logits=tensor([["),
        ("bert_mlm", "wikitext2/masked", "['"),
        ("gpt2", "wikitext2/word", "['"),
        ("bart", "xsum", "['"),
        ("gpt2", "personachat", "['"),
    ],
)
def test_the_printed_lines_run(
    name: str, task: str, shown: str, tmp_path: Path, new_card: Callable[..., Card], capsys: pytest.CaptureFixture[str]
) -> None:
    """Source: the card itself: its Python block is executed on a real checkpoint."""
    library = "timm" if name == "timm_vit" else "transformers"
    card = new_card(data=(describe_task(task),), scores=())
    card = replace(card, base=replace(card.base, library=library))
    processor = None if task == "digits" else _tokenizer(tmp_path)
    run(card, Dense(ALL[name](), processor, name, None, library), tmp_path)
    assert shown in capsys.readouterr().out


def test_a_regression_is_not_shown_as_a_probability(new_card: Callable[..., Card]) -> None:
    """Source: STS-B has one output; the softmax of one number is always 1."""
    assert "softmax" not in lines_of(new_card(data=(describe_task("glue/stsb"),), scores=()))
    assert "softmax" in lines_of(new_card(data=(describe_task("glue/rte"),), scores=()))


@pytest.mark.parametrize("masked", [False, True])
def test_a_recording_is_transcribed(
    masked: bool,
    tmp_path: Path,
    new_card: Callable[..., Card],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Source: the same model and processor called by hand; a recording of another rate is refused by the processor."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("recording.flac", sound(0.6), 16_000)
    model, processor = ctc_model(masked)
    card = new_card(data=(describe_task("librispeech/clean"),), scores=())
    names = run(card, Dense(model, processor, "speech", None, "transformers"), tmp_path)
    (text,) = eval(capsys.readouterr().out)  # the printed list of one text
    assert text
    inputs = processor(soundfile.read("recording.flac", dtype="float32")[0], sampling_rate=16_000, return_tensors="pt")
    assert [text] == processor.batch_decode(names["model"](**inputs).logits.argmax(-1))
    soundfile.write("recording.flac", sound(0.6, rate=8_000), 8_000)
    with pytest.raises(ValueError, match="16000"):
        exec(lines_of(card).replace(card.name, str(tmp_path / "small")), {})


def _tokenizer(folder: Path) -> object:
    import transformers as hf

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the firm sold its london office in was by ."
    (folder / "vocab.txt").write_text(words.replace(" ", "\n"), encoding="utf-8")
    tokenizer: Any = hf.BertTokenizerFast  # type: ignore[attr-defined]
    return tokenizer(str(folder / "vocab.txt"), model_input_names=["input_ids", "attention_mask"])
