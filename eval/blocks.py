"""Text as blocks of equal length to train and score language models on, and the masking of BERT.

Legend: B blocks, L tokens of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from .data import IGNORED
from .lazy_rows import LazyRows
from .task import Feature

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .task import Batch

MASK_RATE = 0.15
_TEXTS_AT_A_TIME = 256


class Blocks(LazyRows[Feature]):
    """A long row of tokens as features of ``length`` tokens each; the rest that fills no block is left out.

    Args:
        tokens: int32 [T], the whole text; kept as it is, so that 100 million tokens take 400 MB.
        length: tokens of a block, ``start`` and ``end`` included.
        start, end: special tokens around each block.
        labels: give the tokens themselves as labels, for causal models (which shift them).
    """

    def __init__(
        self, tokens: np.ndarray, length: int, start: Sequence[int] = (), end: Sequence[int] = (), labels: bool = True
    ) -> None:
        self.tokens, self.start, self.end, self.labels = tokens, list(start), list(end), labels
        self.room = length - len(self.start) - len(self.end)
        if self.room < 1 or len(tokens) < self.room:
            raise ValueError(
                f"expected a text that fills a block of {length} tokens, found {len(tokens)} tokens: lower max_length"
            )

    def __len__(self) -> int:
        return len(self.tokens) // self.room

    def make(self, index: int) -> Feature:
        begin = index * self.room
        ids = self.start + self.tokens[begin : begin + self.room].tolist() + self.end
        feature: dict[str, Any] = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        return {**feature, "labels": list(ids)} if self.labels else feature


def causal_blocks(texts: Iterable[str], processor: Any, length: int) -> Blocks:
    """Blocks of the texts joined one after another, without special tokens, for causal language models."""
    return Blocks(_tokens(texts, processor), length)


def masked_blocks(texts: Iterable[str], processor: Any, length: int) -> Blocks:
    """Blocks between the tokenizer's special tokens ([CLS] ... [SEP]), without labels: `token_masker` makes them."""
    empty: list[int] = processor("")["input_ids"]
    return Blocks(_tokens(texts, processor), length, empty[: len(empty) // 2], empty[len(empty) // 2 :], labels=False)


def _tokens(texts: Iterable[str], processor: Any) -> np.ndarray:
    import numpy as np

    if processor is None or not callable(processor):
        raise ValueError(f"a language task needs the model's tokenizer, found {type(processor).__name__}")
    parts, waiting = [], list(texts)
    for begin in range(0, len(waiting), _TEXTS_AT_A_TIME):
        some = processor(waiting[begin : begin + _TEXTS_AT_A_TIME], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        parts.append(np.fromiter(chain.from_iterable(some), dtype=np.int32))
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def token_masker(processor: Any, rate: float = MASK_RATE) -> Callable[[Batch, torch.Generator], Batch]:
    """``augment(batch, generator)`` that hides tokens and makes them the labels (Devlin et al. 2019, section 3.1).

    Each token that is not special is chosen with probability ``rate``; of the chosen, 80 % become the mask token, 10 %
    a random token, 10 % stay. Labels are -100 at all other positions. It draws from the generator alone, so a resumed
    training sees the same masks, and each epoch others.

    Raises:
        ValueError: the tokenizer has no mask token.
    """
    mask_token = getattr(processor, "mask_token_id", None)
    if mask_token is None:
        raise ValueError(
            f"masked language models need a tokenizer with a mask token, {type(processor).__name__} has none: take a "
            "causal task, or the model's own tokenizer"
        )
    special, vocabulary = sorted(set(processor.all_special_ids)), len(processor)

    def mask(batch: Batch, generator: torch.Generator) -> Batch:
        import torch

        original_BL = batch["input_ids"].cpu()
        draw_BL, way_BL = torch.rand(2, *original_BL.shape, generator=generator)
        random_BL = torch.randint(vocabulary, original_BL.shape, generator=generator)
        chosen_BL = (draw_BL < rate) & ~torch.isin(original_BL, torch.tensor(special))
        hidden_BL = torch.where(chosen_BL & (way_BL < 0.8), mask_token, original_BL)
        hidden_BL = torch.where(chosen_BL & (way_BL >= 0.9), random_BL, hidden_BL)
        labels_BL = original_BL.masked_fill(~chosen_BL, IGNORED)
        device = batch["input_ids"].device
        return {**batch, "input_ids": hidden_BL.to(device), "labels": labels_BL.to(device)}

    return mask
