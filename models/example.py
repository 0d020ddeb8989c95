"""A small input that any model of this room can take: for golden outputs, tracing and smoke tests."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .describe import library_of, timm_model_args
from .errors import DenseError

_TOKENS = 16
_FRAMES = 16


def example_batch(model: nn.Module, *, padded: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """A random batch of two sequences of 16 tokens, of one or two images, or of two waveforms of some 16 frames.

    Args:
        padded: the second half of the second sequence is padding. Waveforms are padded only for models that read an
            attention mask (``feat_extract_norm`` "layer"); images never are.

    Returns:
        text: input_ids and attention_mask [2, 16], one sequence where the model classifies by the last token and knows
        no padding token; encoder-decoders with a language head also decoder_input_ids [2, 8]. Images: pixel_values
        [B, C, H, W], one image when it is large, else two. Audio: input_values [2, T] and perhaps attention_mask.

    Raises:
        DenseError: the model takes none of these.
    """
    generator = torch.Generator().manual_seed(seed)
    if library_of(model) == "timm":
        args = timm_model_args(model)
        channels, *size = model.pretrained_cfg["input_size"]  # type: ignore[index]
        return _images(args.get("in_chans", channels), args.get("img_size", size), generator)
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        return _images(config.num_channels, config.image_size, generator)
    if model.main_input_name == "input_values":
        return _audio(config, padded, generator)
    if model.main_input_name == "input_ids":
        batch = _text(config, padded, generator)
        if config.is_encoder_decoder and model.can_generate():  # type: ignore[operator]
            ids = torch.randint(config.vocab_size, (2, _TOKENS // 2), generator=generator)
            ids[:, 0] = config.decoder_start_token_id or 0
            return {**batch, "decoder_input_ids": ids}
        if _reads_last_token(model) and config.pad_token_id is None:
            return {name: tensor[:1] for name, tensor in batch.items()}
        return batch
    raise DenseError(
        f"expected a model of input_ids, pixel_values or input_values, {type(model).__name__} takes "
        f"{model.main_input_name}"
    )


def _text(config: Any, padded: bool, generator: torch.Generator) -> dict[str, Tensor]:
    length = min(_TOKENS, getattr(config, "max_position_embeddings", _TOKENS))
    input_ids = torch.randint(config.vocab_size, (2, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if padded:
        attention_mask[1, length // 2 :] = 0
    pad, eos = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    if config.is_encoder_decoder and isinstance(eos, int):
        # BART classifies by the last end-of-sequence token, and wants as many of them in each row.
        input_ids[input_ids == eos] = next(i for i in range(config.vocab_size) if i not in (eos, pad))
        input_ids[torch.arange(2), attention_mask.sum(1) - 1] = eos
    if isinstance(pad, int):
        input_ids[attention_mask == 0] = pad
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def _reads_last_token(model: nn.Module) -> bool:
    """Whether this is a decoder's sequence classifier: it takes the last token that is not padding, by its id."""
    return type(model).__name__.endswith("ForSequenceClassification") and hasattr(model, "score")


def _audio(config: Any, padded: bool, generator: torch.Generator) -> dict[str, Tensor]:
    samples = _FRAMES * prod(config.conv_stride) + sum(config.conv_kernel)
    input_values = torch.randn(2, samples, generator=generator)
    if not padded or config.feat_extract_norm != "layer":
        return {"input_values": input_values}
    attention_mask = torch.ones(2, samples, dtype=torch.long)
    attention_mask[1, samples // 2 :] = 0
    return {"input_values": input_values * attention_mask, "attention_mask": attention_mask}


def _images(channels: int, size: int | list[int] | tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    height, width = (size, size) if isinstance(size, int) else size
    count = 1 if channels * height * width > 10_000 else 2
    return {"pixel_values": torch.randn(count, channels, height, width, generator=generator)}
