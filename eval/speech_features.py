"""Rows of recordings as a speech model's inputs, with transcripts as the symbols to train a CTC head on.

Legend: T values of a waveform.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import files
from .lazy_rows import LazyRows
from .speech_decode import Alphabet
from .speech_sound import Header, read_header, read_waveform, resampled_length
from .task import Feature, Row

Normal = Callable[[str], str]


class SpeechFeatures(LazyRows[Feature]):
    """Rows as a speech model's inputs, decoded when accessed; lengths come from the files' headers.

    Item: ``input_values`` float32 [T], ``attention_mask`` int64 [T] where the feature extractor gives one, and what
    ``extra`` says of the row.
    """

    def __init__(
        self, rows: Sequence[Row], processor: Any, rate: int | None, extra: Sequence[Mapping[str, Any]]
    ) -> None:
        self.extractor = getattr(processor, "feature_extractor", processor)
        if not hasattr(self.extractor, "sampling_rate"):
            raise ValueError(
                f"a speech task needs the model's audio processor, found {type(processor).__name__}: save it in the "
                "model's folder (processor.save_pretrained)"
            )
        self.rows, self.extra = rows, extra
        self.masked = bool(self.extractor.return_attention_mask)
        self.headers: list[Header] = [read_header(row, rate) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> list[int]:
        """Values of each waveform at the model's rate."""
        return [resampled_length(header, self.extractor.sampling_rate) for header in self.headers]

    def make(self, index: int) -> Feature:
        import torch

        rate = self.extractor.sampling_rate
        waveform_T = read_waveform(self.rows[index], self.headers[index], rate)
        values_T = self.extractor(waveform_T, sampling_rate=rate, return_attention_mask=False)["input_values"][0]
        feature: dict[str, Any] = {"input_values": torch.from_numpy(values_T).float()}
        if self.masked:
            feature["attention_mask"] = torch.ones(len(values_T), dtype=torch.long)
        return {**feature, **self.extra[index]}


def encode_speech(
    rows: Sequence[Row], processor: Any, max_length: int = 0, *, normal: Normal, rate: int | None
) -> SpeechFeatures:
    """Recordings with their transcripts as the head's symbols in ``labels``, to train on.

    Args:
        processor: feature extractor and CTC tokenizer in one.
        max_length: unused, nothing is cut.

    Raises:
        ValueError: no such processor. DataError: a character without a symbol, with its line; a broken recording.
    """
    alphabet = Alphabet.of(getattr(processor, "tokenizer", None))
    extra = []
    for row in rows:
        try:
            extra.append({"labels": alphabet.encode(spoken(row, normal))})
        except ValueError as error:
            raise files.DataError(f"{row['where']}: {error}: spell the transcript out in its letters") from error
    return SpeechFeatures(rows, processor, rate, extra)


def spoken(row: Row, normal: Normal) -> str:
    """The normalised transcript of a row. Raises DataError, with its line, where nothing is left of it."""
    text = normal(row["text"])
    if not text:
        raise files.DataError(f"{row['where']}: nothing is left of the transcript {row['text']!r} without punctuation")
    return text
