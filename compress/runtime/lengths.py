"""Inputs longer than a model's table of positions: one clear error instead of a library's, and before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

_TABLES = ("position_embeddings", "embed_positions", "wpe")
_TEXTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_PADDING_FIRST = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm")


def limit_length_(model: nn.Module) -> None:
    """Let ``model`` refuse texts that are longer than its table of positions, where it has one: on a GPU an index
    outside of a table would stop the whole process."""
    longest = longest_text(model)
    if longest is not None:
        model.register_forward_pre_hook(LengthLimit(longest), with_kwargs=True)


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

    Raises:
        ValueError: a text of more than ``longest`` tokens.
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for text in (*args[:1], *(kwargs.get(name) for name in _TEXTS)):
            if isinstance(text, torch.Tensor) and text.ndim >= 2 and text.shape[1] > self.longest:
                raise ValueError(
                    f"expected at most {self.longest} tokens for this {type(model).__name__}, found {text.shape[1]}: "
                    "truncate the input"
                )
