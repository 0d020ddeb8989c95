"""From single features to batches: padding, and batches of like length.

Legend: B rows, L tokens of the longest row, C channels, H rows of pixels, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .task import Feature

if TYPE_CHECKING:
    from .task import Batch


def collate(features: Sequence[Feature], pad_token_id: int | None = 0, pad_to_multiple_of: int | None = None) -> Batch:
    """Stack features into one batch, text padded on the right to the longest row.

    Args:
        features: dicts of the same keys, from ``Task.encode``.
        pad_token_id: fills ``input_ids``; everything else of a token (mask, segment) is filled with 0.
        pad_to_multiple_of: round the padded length up to a multiple of this, e.g. 8 for GPU kernels.

    Returns:
        ``input_ids``, ``attention_mask``, (``token_type_ids``) int64 [B, L] or ``pixel_values`` float32 [B, C, H, W],
        and ``labels`` [B] where the features have them.

    Raises:
        ValueError: no features, different keys, or rows of different length without a padding token.
    """
    if not features:
        raise ValueError("collate needs at least one feature, got none")
    keys = list(features[0])
    for index, feature in enumerate(features):
        if list(feature) != keys:
            raise ValueError(f"all features of a batch must have the keys {keys}, number {index} has {list(feature)}")
    batch: Batch = {}
    for key in keys:
        values = [feature[key] for feature in features]
        if isinstance(values[0], torch.Tensor):
            batch[key] = torch.stack(values)
        elif isinstance(values[0], (list, tuple)):
            batch[key] = _pad(values, pad_token_id if key == "input_ids" else 0, pad_to_multiple_of)
        else:
            batch[key] = torch.tensor(values)
    return batch


def _pad(values: Sequence[Sequence[int]], fill: int | None, multiple: int | None) -> torch.Tensor:
    longest = max(len(value) for value in values)
    length = -(-longest // multiple) * multiple if multiple else longest
    if fill is None and any(len(value) != length for value in values):
        raise ValueError("rows of different length need a padding token: set tokenizer.pad_token before encoding")
    return torch.tensor([[*value, *[fill or 0] * (length - len(value))] for value in values])


def collator(processor: Any, pad_to_multiple_of: int | None = None) -> Callable[[Sequence[Feature]], Batch]:
    """`collate` with the padding token of this tokenizer; for image processors and None there is nothing to pad."""
    pad_token_id = processor.pad_token_id if hasattr(processor, "pad_token_id") else 0
    return partial(collate, pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of)


def batches(features: Sequence[Feature], batch_size: int) -> Iterator[tuple[list[int], list[Feature]]]:
    """Batches for evaluation, rows of like length together, the longest first.

    The longest first, so that memory runs out at the start or never. Images are decoded when their batch is due.

    Yields:
        The positions of the rows in ``features`` (to restore their order) and the rows.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = list(range(len(features)))
    if order and "input_ids" in features[0]:
        order.sort(key=lambda index: len(features[index]["input_ids"]), reverse=True)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, [features[index] for index in indices]
