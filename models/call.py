"""How a model is called for its scores, whatever its library and head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .describe import library_of
from .errors import DenseError

# What a batch holds for the loss, not for the model.
TARGETS = ("labels", "start_positions", "end_positions")


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's scores for a batch, called the way of its library; targets (``labels``, ``start_positions``,
    ``end_positions``) are left out.

    Args:
        batch: text: input_ids, attention_mask and perhaps token_type_ids [B, L], for encoder-decoders also
            decoder_input_ids [B, D] (made from ``labels`` where there are none, and else from input_ids); images:
            pixel_values [B, C, H, W]; audio: input_values [B, T] and perhaps attention_mask.

    Returns:
        classification [B, labels]; token classification [B, L, labels]; language models [B, L, vocabulary],
        encoder-decoders [B, D, vocabulary]; question answering [B, L, 2], the scores of being the start and the end of
        the answer; CTC [B, frames, symbols].

    Raises:
        DenseError: a model without a head, or of neither library.
    """
    if library_of(model) == "timm":
        scores = model(batch["pixel_values"])
        assert isinstance(scores, Tensor)
        return scores
    output = model(**_inputs(model, batch))
    if getattr(output, "logits", None) is not None:
        return output.logits
    if getattr(output, "start_logits", None) is not None:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    raise DenseError(f"{type(model).__name__} gives no logits: load it with a head, for example kind='classification'")


def _inputs(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name not in TARGETS}
    if model.can_generate():
        inputs["use_cache"] = False  # scores of whole sequences: the keys and values of the past are not needed
        if model.config.is_encoder_decoder and "labels" in batch and "decoder_input_ids" not in batch:
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    return inputs
