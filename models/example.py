"""A small input that any model of this room can take: for golden outputs, tracing and smoke tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .describe import library_of, timm_model_args
from .errors import DenseError

_TOKENS = 16


def example_batch(model: nn.Module, *, padded: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """A random batch of two sequences of 16 tokens, or of one or two images.

    Args:
        padded: the second half of the second sequence is padding.

    Returns:
        text: input_ids and attention_mask [2, 16]; images: pixel_values [B, C, H, W], one image
        when it is large, else two.

    Raises:
        DenseError: the model takes neither input_ids nor pixel_values.
    """
    generator = torch.Generator().manual_seed(seed)
    if library_of(model) == "timm":
        args = timm_model_args(model)
        channels, *size = model.pretrained_cfg["input_size"]  # type: ignore[index]
        return _images(args.get("in_chans", channels), args.get("img_size", size), generator)
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        return _images(config.num_channels, config.image_size, generator)
    if model.main_input_name == "input_ids":
        length = min(_TOKENS, getattr(config, "max_position_embeddings", _TOKENS))
        input_ids = torch.randint(config.vocab_size, (2, length), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        if padded:
            attention_mask[1, length // 2 :] = 0
        return {"input_ids": input_ids, "attention_mask": attention_mask}
    raise DenseError(
        f"expected a model of input_ids or pixel_values, {type(model).__name__} takes {model.main_input_name}"
    )


def _images(channels: int, size: int | list[int] | tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    height, width = (size, size) if isinstance(size, int) else size
    count = 1 if channels * height * width > 10_000 else 2
    return {"pixel_values": torch.randn(count, channels, height, width, generator=generator)}
