"""Texts that are longer than a model's table of positions are refused before anything runs."""

from __future__ import annotations

import pickle

import pytest
import squeezoo
import torch
from squeezoo.compress.runtime.lengths import LengthLimit, limit_length_, longest_text
from tiny import make


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "opt", "gpt2", "bart"])
def test_the_longest_text_runs_and_one_token_more_is_refused(name: str) -> None:
    """The bound is the library's own: with it the model runs, beyond it transformers fails somewhere inside."""
    model = make(name).eval()
    longest = longest_text(model)
    assert longest is not None
    inputs = torch.full((1, longest + 1), 5)
    with torch.no_grad():
        model(input_ids=inputs[:, :-1])
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=inputs)
        limit_length_(model)
        model(input_ids=inputs[:, :-1])
        for call in (lambda: model(input_ids=inputs), lambda: model(inputs)):
            with pytest.raises(ValueError, match=f"at most {longest} tokens .*, found {longest + 1}: truncate"):
                call()


@pytest.mark.parametrize("name", ["llama", "vit", "wav2vec2", "timm_vit"])
def test_models_without_a_table_of_positions_for_texts_have_no_limit(name: str) -> None:
    model = make(name)
    assert longest_text(model) is None
    limit_length_(model)
    assert not model._forward_pre_hooks


def test_a_loaded_checkpoint_has_the_limit_and_keeps_it_in_a_copy(tmp_path) -> None:
    squeezoo.compress(make("bert"), "magnitude-2-4", None, tmp_path / "out")
    model = squeezoo.load(tmp_path / "out", backend="reference")
    longest = longest_text(model)
    inputs = torch.full((1, longest + 1), 5)
    for loaded in (model, pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="truncate the input"):
            loaded(input_ids=inputs)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(("name", "prompt"), [("opt", 20), ("gpt2", 20), ("bart", 1)])
def test_generation_stops_with_a_clear_error_behind_the_last_position(name: str, prompt: int, cache, tmp_path) -> None:
    """Token by token behind a cache, 64 positions: 80 new tokens are too many, and all 64 positions can be used (the
    last token is not fed back). BART's own text begins with one token, whatever its input is."""
    squeezoo.compress(make(name), "magnitude-2-4", None, tmp_path / "out")
    model = squeezoo.load(tmp_path / "out", backend="reference")
    inputs = torch.full((2, 20), 5)
    how = dict(do_sample=False, cache_implementation=cache)
    found = r"at most 64 tokens .*, found 65 \(1 after 64 of the cache\): ask for fewer new tokens"
    with pytest.raises(ValueError, match=found):
        model.generate(inputs, max_new_tokens=80, min_new_tokens=80, **how)
    fits = 65 - prompt
    assert model.generate(inputs, max_new_tokens=fits, min_new_tokens=fits, **how).shape == (2, 65)


def test_the_encoder_that_generate_calls_has_the_limit() -> None:
    model = make("bart")
    limit_length_(model)
    with pytest.raises(ValueError, match="at most 64 tokens for this BartEncoder, found 65: truncate the input"):
        model.generate(torch.full((1, 65), 5), max_new_tokens=2)
    assert model.generate(torch.full((1, 64), 5), max_new_tokens=2).shape[0] == 1


def test_no_length_is_fetched_from_a_device() -> None:
    """A static cache on a GPU counts in a tensor there: asking for its value would wait for the device."""

    class Static:
        def get_seq_length(self):
            return torch.empty((), dtype=torch.long, device="meta")  # int() of it raises

    LengthLimit(4)(torch.nn.Identity(), (), {"input_ids": torch.zeros(1, 4), "past_key_values": Static()})


def test_the_first_argument_counts_only_where_it_is_a_text() -> None:
    limit = LengthLimit(4)
    limit(torch.nn.Identity(), (torch.zeros(9),), {})
    limit(torch.nn.Identity(), (), {"attention_mask": torch.zeros(1, 9)})
    with pytest.raises(ValueError, match="expected at most 4 tokens for this Identity, found 5"):
        limit(torch.nn.Identity(), (), {"decoder_input_ids": torch.zeros(1, 5)})
