"""Inputs longer than a model's table of positions: one clear error instead of a library's, and before anything runs.

On a GPU an index outside of a table would stop the whole process. Counted are shapes only: no device waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_TABLES = ("position_embeddings", "embed_positions", "wpe")
_TEXTS = ("input_ids", "inputs_embeds")
_DECODER_TEXTS = ("decoder_input_ids", "decoder_inputs_embeds")
_PADDING_FIRST = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm")


def limit_length_(model: nn.Module) -> None:
    """Let ``model`` refuse texts that are longer than its table of positions, where it has one: a whole text, and one
    that grows token by token behind a cache. The encoder of an encoder-decoder, which ``generate`` calls by itself,
    refuses them too."""
    longest = longest_text(model)
    if longest is None:
        return
    with_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    model.register_forward_pre_hook(LengthLimit(longest, with_decoder), with_kwargs=True)
    encoder = model.get_encoder() if with_decoder else None  # type: ignore[operator]
    if isinstance(encoder, nn.Module) and encoder is not model:
        encoder.register_forward_pre_hook(LengthLimit(longest), with_kwargs=True)


def longest_text(model: nn.Module) -> int | None:
    """Tokens that the table of positions has room for; None without one (rotary positions, images, sound)."""
    if not any(name.rpartition(".")[2] in _TABLES for name, _ in model.named_modules()):
        return None
    config: Any = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(longest, int) or not hasattr(config, "vocab_size"):
        return None
    if getattr(config, "model_type", None) in _PADDING_FIRST:  # positions begin behind that of the padding
        longest -= config.pad_token_id + 1
    return longest


class LengthLimit:
    """A forward pre-hook.

    Args:
        longest: tokens that a text may have, those in the cache included.
        with_decoder: the cache is that of the decoder's text; else of the only one.

    Raises:
        ValueError: a text of more than ``longest`` tokens.
    """

    def __init__(self, longest: int, with_decoder: bool = False) -> None:
        self.longest, self.with_decoder = longest, with_decoder

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        past = _cached(kwargs.get("past_key_values"))
        whole = 0 if self.with_decoder else past
        for text in (*args[:1], *(kwargs.get(name) for name in _TEXTS)):
            self._check(model, text, whole)
        for text in (kwargs.get(name) for name in _DECODER_TEXTS):
            self._check(model, text, past)

    def _check(self, model: nn.Module, text: Any, past: int) -> None:
        if not isinstance(text, torch.Tensor) or text.ndim < 2 or text.shape[1] + past <= self.longest:
            return
        grown = f" ({text.shape[1]} after {past} of the cache)" if past else ""
        raise ValueError(
            f"expected at most {self.longest} tokens for this {type(model).__name__}, found "
            f"{text.shape[1] + past}{grown}: {'ask for fewer new tokens, or ' if past else ''}truncate the input"
        )


def _cached(cache: Any) -> int:
    """Tokens in a cache of transformers. The length of a static one on a GPU is known there only: 0 then."""
    if not hasattr(cache, "get_seq_length"):
        return 0
    length = cache.get_seq_length()
    if isinstance(length, torch.Tensor):
        return int(length) if length.is_cpu and not torch.compiler.is_compiling() else 0
    return int(length)
