"""Writing texts with a task's settings, alike for decoders and encoder-decoders, dense and compressed.

Settings that every task which writes has (they stand in its scores):

* ``num_beams``: width of the beam search, 1 is greedy; never sampled, so that batches cannot change the result;
* ``min_target``, ``max_target``: tokens of the written text, counted as transformers' ``min_length`` and ``max_length``
  count: with the start token of an encoder-decoder, the lower one without the end token and the upper one with it;
* ``length_penalty``: finished beams compare by the sum of log-probabilities / length ** length_penalty;
* ``no_repeat_ngram_size``: no sequence of so many tokens twice in the written text, 0 allows all. (transformers alone
  would forbid a decoder those of its prompt too, so that a summary could not quote the document);
* ``early_stopping``: 1 stops as soon as ``num_beams`` texts are finished, 0 when no better one is likely.

Start, end and forced tokens are the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .task import Feature, Setting

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .runner import Runner


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model reads the source with an encoder (BART) rather than before its own text (GPT-2)."""
    config: Any = model.config
    return bool(config.is_encoder_decoder)


def source_length(model: nn.Module, wanted: int, target: int) -> int:
    """Tokens that the source may have: at most ``wanted``, and so many that the model has positions for it and, in a
    decoder, for a text of ``target`` tokens after it.

    Raises:
        ValueError: the model has not even the positions for the text.
    """
    from .perplexity import context_length

    limit = context_length(model)
    if limit is None:
        return wanted
    room = limit if is_encoder_decoder(model) else limit - target
    if room < 1 or target > limit:
        raise ValueError(
            f"{type(model).__name__} has {limit} positions, which leaves none beside a text of {target} tokens: give a "
            "smaller max_target"
        )
    return min(wanted, room)


def search_arguments(settings: Mapping[str, Setting], encoder_decoder: bool) -> dict[str, Any]:
    """The task's settings as keyword arguments of transformers' ``generate``.

    Raises:
        ValueError: a setting out of its range.
    """
    beams, shortest, longest = (int(settings[name]) for name in ("num_beams", "min_target", "max_target"))
    if beams < 1 or not 0 <= shortest <= longest or longest < 2:
        raise ValueError(
            f"expected num_beams of at least 1 and min_target from 0 to max_target, which is at least 2; found "
            f"num_beams {beams}, min_target {shortest}, max_target {longest}"
        )
    start = int(encoder_decoder)
    how: dict[str, Any] = {
        "do_sample": False,
        "num_beams": beams,
        "num_return_sequences": 1,
        "min_new_tokens": max(shortest - start, 0),
        "max_new_tokens": longest - start,
        "no_repeat_ngram_size": 0,  # see write_tokens
        "repetition_penalty": 1.0,
    }
    if beams > 1:
        how["length_penalty"] = float(settings["length_penalty"])
        how["early_stopping"] = bool(settings["early_stopping"])
    return how


def write_texts(runner: Runner, features: Sequence[Feature]) -> list[str]:
    """`write_tokens` as texts, without special tokens and surrounding spaces."""
    return [runner.processor.decode(ids, skip_special_tokens=True).strip() for ids in write_tokens(runner, features)]


def write_tokens(runner: Runner, features: Sequence[Feature]) -> list[list[int]]:
    """What the model writes from or after each feature by the settings: without the prompt, with an encoder-decoder's
    start token and with the padding that follows the end.

    Args:
        features: ``input_ids`` and ``attention_mask``.

    Raises:
        ValueError: no tokenizer, a model that writes no text, settings out of range.
    """
    from transformers.generation.logits_process import LogitsProcessorList, NoRepeatNGramLogitsProcessor

    tokenizer, model = require_tokenizer(runner.processor), runner.model
    if not getattr(model, "can_generate", bool)():
        raise ValueError(f"{type(model).__name__} writes no text: load it with kind='causal-lm' or 'seq2seq-lm'")
    encoder_decoder = is_encoder_decoder(model)
    how = search_arguments(runner.settings, encoder_decoder)
    size = int(runner.settings["no_repeat_ngram_size"])

    def write(model: Any, batch: Mapping[str, torch.Tensor]) -> list[list[int]]:
        prompt = 0 if encoder_decoder else batch["input_ids"].shape[1]
        rules = LogitsProcessorList()
        if size:
            forbid = NoRepeatNGramLogitsProcessor(size)
            rules.append(lambda ids, scores: forbid(ids[:, prompt:], scores))
        written = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_processor=rules, **how,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        tokens: list[list[int]] = written[:, prompt:].tolist()
        return tokens

    return runner.map(features, write, side="right" if encoder_decoder else "left")


def prompt_ids(texts: Sequence[str], processor: Any, max_length: int | None = None) -> list[list[int]]:
    """Prompts for a decoder to continue: with the start token where the tokenizer has one, never with an end token;
    longer ones lose their end.

    Raises:
        ValueError: no tokenizer.
    """
    tokenizer = require_tokenizer(processor)
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    # room for the end token that some tokenizers add
    encoded = tokenizer(list(texts), truncation=max_length is not None, max_length=max_length and max_length + 1)
    return [(ids[:-1] if len(ids) > 1 and ids[-1] in ends else ids)[:max_length] for ids in encoded["input_ids"]]


def continuation_ids(text: str, tokenizer: Any) -> list[int]:
    """A text that a decoder writes after a prompt, closed by its end token.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    if require_tokenizer(tokenizer).eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no end-of-sequence token: set tokenizer.eos_token")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id]


def require_tokenizer(processor: Any) -> Any:
    """The tokenizer itself. Raises ValueError when there is none."""
    if processor is None or not callable(processor):
        raise ValueError(
            f"a text task needs the model's tokenizer, got {type(processor).__name__}: "
            "save the tokenizer in the model's folder (tokenizer.save_pretrained)"
        )
    return processor


def with_target(prompt: Sequence[int], target: Sequence[int], max_length: int) -> Feature:
    """A decoder's training sequence: the prompt and the text after it, which alone has labels (-100 elsewhere).

    What is longer than ``max_length`` loses the beginning of its prompt, then the end of its target.
    """
    target = list(target)[:max_length]
    prompt = list(prompt)[max(len(prompt) + len(target) - max_length, 0) :]
    ids = [*prompt, *target]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + target}
