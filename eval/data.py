"""From single features to batches: padding, and batches of like length.

Legend: B rows, L tokens or audio values of the longest row, C channels, H rows of pixels, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from .joined import stacked
from .task import IGNORED, Feature

if TYPE_CHECKING:
    from .task import Batch

Side = Literal["right", "left"]


def collate(
    features: Sequence[Feature],
    pad_token_id: int | None = 0,
    pad_to_multiple_of: int | None = None,
    side: Side = "right",
) -> Batch:
    """Stack features into one batch, sequences padded to the longest row.

    Args:
        features: dicts of the same keys, from ``Task.encode``; keys that begin with ``_`` stay out.
        pad_token_id: fills ``input_ids`` and ``decoder_input_ids``; ``labels`` of tokens are filled with -100,
            everything else (mask, segment, waveform) with 0.
        pad_to_multiple_of: round the padded length up to a multiple of this, e.g. 8 for GPU kernels.
        side: where the filling goes; ``left`` for prompts that a decoder continues.

    Returns:
        ``input_ids``, ``attention_mask``, (``token_type_ids``) int64 [B, L], ``pixel_values`` float32 [B, C, H, W] or
        ``input_values`` float32 [B, L], and ``labels`` [B] or [B, L] where the features have them.

    Raises:
        ValueError: no features, different keys, or rows of different length without a padding token.
    """
    if not features:
        raise ValueError("collate needs at least one feature, got none")
    keys = _keys(features[0])
    for index, feature in enumerate(features):
        if _keys(feature) != keys:
            raise ValueError(f"all features of a batch must have the keys {keys}, number {index} has {_keys(feature)}")
    batch: Batch = {}
    for key in keys:
        values = [feature[key] for feature in features]
        fill = pad_token_id if key.endswith("input_ids") else IGNORED if key == "labels" else 0
        if isinstance(values[0], torch.Tensor):
            batch[key] = _pad_waveforms(values) if values[0].dim() == 1 else stacked(values)
        elif isinstance(values[0], (list, tuple)):
            batch[key] = _pad(values, fill, pad_to_multiple_of, side)
        else:
            batch[key] = torch.tensor(values)
    return batch


def _keys(feature: Feature) -> list[str]:
    return [key for key in feature if not key.startswith("_")]


def _pad(values: Sequence[Sequence[int]], fill: int | None, multiple: int | None, side: Side) -> torch.Tensor:
    longest = max(len(value) for value in values)
    length = -(-longest // multiple) * multiple if multiple else longest
    if fill is None and any(len(value) != length for value in values):
        raise ValueError("rows of different length need a padding token: set tokenizer.pad_token before encoding")
    padding = [[fill or 0] * (length - len(value)) for value in values]
    if side == "left":
        return torch.tensor([[*rest, *value] for rest, value in zip(padding, values, strict=True)])
    return torch.tensor([[*value, *rest] for rest, value in zip(padding, values, strict=True)])


def _pad_waveforms(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(values), batch_first=True)


def collator(
    processor: Any, pad_to_multiple_of: int | None = None, side: Side = "right"
) -> Callable[[Sequence[Feature]], Batch]:
    """`collate` with the padding token of this tokenizer or speech processor; images have nothing to pad."""
    tokenizer = getattr(processor, "tokenizer", processor)
    pad_token_id = tokenizer.pad_token_id if hasattr(tokenizer, "pad_token_id") else 0
    return partial(collate, pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of, side=side)


def batches(
    features: Sequence[Feature], batch_size: int, max_tokens: int | None = None
) -> Iterator[tuple[list[int], list[Feature]]]:
    """Batches for evaluation, rows of like length together, the longest first.

    The longest first, so that memory runs out at the start or never. Images are decoded when their batch is due.

    Args:
        max_tokens: most tokens of a padded batch, of at least one row.

    Yields:
        The positions of the rows in ``features`` (to restore their order) and the rows.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = list(range(len(features)))
    told = getattr(features, "lengths", None)  # of recordings and images, which need not be decoded for it
    lengths = [1] * len(order) if told is None else told()
    first = features[0] if order and told is None else {}
    key = next((key for key in ("input_ids", "input_values") if key in first), None)
    if key is not None:
        lengths = [len(feature[key]) for feature in features]
    order.sort(key=lambda index: lengths[index], reverse=True)
    start = 0
    while start < len(order):
        rows = (
            batch_size if max_tokens is None else min(batch_size, max(1, max_tokens // max(1, lengths[order[start]])))
        )
        indices = order[start : start + rows]
        start += rows
        yield indices, [features[index] for index in indices]
