"""Greedy CTC decoding against every path's text, and beam search through pyctcdecode where it is installed."""

from __future__ import annotations

import builtins
import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speech_folders import ctc_model, librispeech
from squeezoo.eval import get_task
from squeezoo.eval.run import evaluate
from squeezoo.eval.speech_decode import SETTINGS, Alphabet, decoder_for
from squeezoo.eval.speech_vocabulary import LETTERS, with_vocabulary

TINY = Alphabet(0, (None, " ", "A", "B"))
BEAM = {**SETTINGS, "beam_width": 100}


def _scores(path: list[int], width: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(path), width).float()


@cache
def _tokenizer() -> Any:
    return ctc_model(False)[1].tokenizer


@given(st.lists(st.integers(4, len(LETTERS) - 1) | st.just(0), min_size=1, max_size=30))
@settings(deadline=None)
def test_greedy_is_the_tokenizers_own_decoding(path: list[int]) -> None:
    """transformers' Wav2Vec2CTCTokenizer groups, drops the blank and replaces the delimiter; it strips the text."""
    tokenizer = _tokenizer()
    text = Alphabet.of(tokenizer, len(LETTERS)).greedy(_scores(path, len(LETTERS)))
    assert text.strip() == tokenizer.decode(path)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ([0, 0, 0], ""),
        ([2, 2, 0, 2, 3], "AAB"),
        ([2, 1, 1, 3, 3, 0], "A B"),
        ([1, 2, 0, 0, 2], " AA"),
    ],
)
def test_greedy_by_hand(path: list[int], text: str) -> None:
    """Graves et al. 2006, section 3.1: B(a-ab-) = B(-aa--abb) = aab."""
    assert TINY.greedy(_scores(path, 4)) == text


def test_alphabet_and_text() -> None:
    """Special tokens write nothing, letters come in the case that the tokenizer has, all unknown ones are named."""
    tokenizer = _tokenizer()
    alphabet = Alphabet.of(tokenizer, 40)
    assert (alphabet.blank, len(alphabet.symbols)) == (0, 40)
    assert alphabet.symbols[:6] == (None, None, None, None, " ", "E")
    assert alphabet.encode("It's") == tokenizer("IT'S")["input_ids"]
    assert TINY.greedy(_scores(TINY.encode("ab a"), 4)) == "AB A"
    with pytest.raises(ValueError, match="no symbol for 'ß', '€'"):
        alphabet.encode("ß€ß A")


def test_vocabulary(tmp_path: Path) -> None:
    """A saved processor reads back alike; what already has a tokenizer is left alone."""
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Processor

    made = with_vocabulary(Wav2Vec2FeatureExtractor(), (*LETTERS, "Ä"))
    made.save_pretrained(tmp_path)
    read = Wav2Vec2Processor.from_pretrained(tmp_path)
    assert read.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert Alphabet.of(read.tokenizer).encode("ä e") == [32, 4, 5]
    assert with_vocabulary(read) is read
    with pytest.raises(ValueError, match=r"missing are \['<unk>', '\|'\]"):
        with_vocabulary(Wav2Vec2FeatureExtractor(), ("<pad>", "A"))
    with pytest.raises(ValueError, match=r"feature extractor, found NoneType"):
        with_vocabulary(None)


def test_settings_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="set beam_width"):
        decoder_for(TINY, {**SETTINGS, "language_model": "lm.arpa"})
    with pytest.raises(ValueError, match="at least 1, found 0"):
        decoder_for(TINY, {**SETTINGS, "beam_width": 0})
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "pyctcdecode":
            raise ModuleNotFoundError("No module named 'pyctcdecode'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    librispeech(tmp_path)
    model, processor = ctc_model(True)
    with pytest.raises(ValueError, match="pip install --no-deps pyctcdecode"):
        evaluate(model, "librispeech/clean", processor, data_dir=tmp_path, settings={"beam_width": 10}, progress=False)


def _best_text(scores: torch.Tensor) -> str:
    """The most probable text by summing over all paths (Graves et al. 2006, equation 3)."""
    probabilities = scores.softmax(-1).tolist()
    texts: dict[str, float] = {}
    for path in itertools.product(range(4), repeat=len(probabilities)):
        p = math.prod(row[symbol] for row, symbol in zip(probabilities, path))
        text = TINY.greedy(_scores(list(path), 4))
        texts[text] = texts.get(text, 0.0) + p
    return max(texts, key=texts.__getitem__)


def test_beam_search_sums_over_paths() -> None:
    """Where the best path and the best text differ: two frames, blank 0.4, A 0.35, B 0.25: the best path is empty
    (0.16), the text A has 0.35 * 0.4 * 2 + 0.35 ** 2 = 0.40."""
    pytest.importorskip("pyctcdecode")
    scores = torch.tensor([[0.4, 1e-9, 0.35, 0.25]]).log().repeat(2, 1)
    decode, told = decoder_for(TINY, BEAM)
    assert TINY.greedy(scores) == ""
    assert decode(scores) == _best_text(scores) == "A"
    assert told["beam_width"] == 100
    assert str(told["decoder"]).startswith("pyctcdecode ")


def test_a_language_model_decides(tmp_path: Path) -> None:
    """Frames that cannot tell AB from BA: the n-gram model's only word wins, whichever that is, and the score names
    the file and its contents."""
    pytest.importorskip("pyctcdecode")
    pytest.importorskip("kenlm")
    scores = torch.tensor([[0.02, 0.01, 0.485, 0.485]]).log().repeat(2, 1)
    digests = set()
    for word in ("AB", "BA"):
        path = tmp_path / "lm.arpa"
        path.write_text(
            "\\data\\\nngram 1=4\nngram 2=2\n\n\\1-grams:\n-3\t<unk>\t0\n0\t<s>\t-0.3\n-0.3\t</s>\t0\n"
            f"-0.3\t{word}\t-0.3\n\n\\2-grams:\n-0.1\t<s> {word}\n-0.1\t{word} </s>\n\n\\end\\\n",
            encoding="utf-8",
        )
        decode, told = decoder_for(TINY, {**BEAM, "language_model": str(path)})
        assert decode(scores) == word
        assert (told["lm_weight"], told["word_bonus"]) == (0.5, 1.5)
        digests.add(told["language_model"])
    assert len(digests) == 2
    assert all(str(digest).startswith("lm.arpa sha256:") for digest in digests)
    with pytest.raises(ValueError, match="does not exist"):
        decoder_for(TINY, {**BEAM, "language_model": str(tmp_path / "none.arpa")})
    (tmp_path / "broken.arpa").write_text("no model", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken\.arpa' and the model's alphabet make no decoder"):
        decoder_for(TINY, {**BEAM, "language_model": str(tmp_path / "broken.arpa")})


def test_beam_search_in_a_score(tmp_path: Path) -> None:
    """The settings stand in the score, and one frame's best symbol stays the best where all else is impossible."""
    pytest.importorskip("pyctcdecode")
    librispeech(tmp_path)
    model, processor = ctc_model(True)
    task = get_task("librispeech/clean")
    wer, _ = evaluate(model, task, processor, data_dir=tmp_path, settings={"beam_width": 5}, progress=False)
    assert wer.settings["beam_width"] == 5
    assert "lm_weight" not in wer.settings
