"""What text tasks share: one text or a pair of texts per row, as the model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .task import Feature, Row

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def require_tokenizer(processor: Any) -> None:
    """Raises ValueError when there is no tokenizer."""
    if processor is None or not callable(processor):
        raise ValueError(
            f"a text task needs the model's tokenizer, got {type(processor).__name__}: "
            "save the tokenizer in the model's folder (tokenizer.save_pretrained)"
        )


def allowed_length(processor: Any, max_length: int) -> int:
    """``max_length``, or what the tokenizer says that its model can read, whichever is less."""
    return min(max_length, getattr(processor, "model_max_length", max_length))


def encode_texts(rows: Sequence[Row], processor: Any, max_length: int = 128) -> list[Feature]:
    """Tokenize one text or a pair per row, truncated to ``max_length`` tokens, not padded.

    Returns:
        One dict per row: ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer makes them (lists of
        int of the row's own length), and ``labels`` (the row's ``label``, an int or a float).

    Raises:
        ValueError: there is no tokenizer.
    """
    require_tokenizer(processor)
    if not rows:
        return []
    columns = [list(column) for column in zip(*(row["texts"] for row in rows))]
    encoded = processor(*columns, truncation=True, max_length=allowed_length(processor, max_length))
    names = [name for name in INPUTS if name in encoded]
    return [{**{name: encoded[name][i] for name in names}, "labels": row["label"]} for i, row in enumerate(rows)]


def score_with(**functions: Callable[[Sequence[Any], Sequence[Any]], float]) -> Callable[..., dict[str, float]]:
    """A task's ``score`` from metrics by name, the primary one first."""

    def score(predictions: Sequence[Any], labels: Sequence[Any]) -> dict[str, float]:
        return {name: function(predictions, labels) for name, function in functions.items()}

    return score
