"""How likely a model holds given texts after given prompts.

Legend: B rows, L positions, V vocabulary, N positions that have a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .lazy_rows import LazyRows
from .task import Feature

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .runner import Runner


@dataclass(frozen=True)
class Likelihood:
    """Sum of the natural log-probabilities of a text's tokens, and how many those are."""

    total: float
    tokens: int


class Pairs(LazyRows[Feature]):
    """Prompt and target as model inputs, joined when accessed: the candidates of a reply share their prompt.

    Item: ``input_ids``, ``attention_mask``, ``labels``; of a decoder -100 over the prompt.
    """

    def __init__(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], encoder_decoder: bool) -> None:
        self.pairs, self.encoder_decoder = pairs, encoder_decoder

    def __len__(self) -> int:
        return len(self.pairs)

    def make(self, index: int) -> Feature:
        prompt, target = self.pairs[index]
        if self.encoder_decoder:
            return {"input_ids": list(prompt), "attention_mask": [1] * len(prompt), "labels": list(target)}
        ids = [*prompt, *target]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + list(target)}


def log_likelihoods(runner: Runner, pairs: Pairs) -> list[Likelihood]:
    """Of each target after its prompt, in the order of ``pairs``.

    Raises:
        ValueError: log-probabilities that are not finite.
    """
    import torch
    from torch.nn import functional as F

    from ..models.dense import logits

    def totals(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[Likelihood]:
        scores_BLV, labels_BL = logits(model, batch), batch["labels"]
        if not pairs.encoder_decoder:  # position i says what stands at i + 1
            scores_BLV, labels_BL = scores_BLV[:, :-1], labels_BL[:, 1:]
        labelled_BL = labels_BL != -100
        loss_N = F.cross_entropy(scores_BLV[labelled_BL].float(), labels_BL[labelled_BL], reduction="none").double()
        rows_N = labelled_BL.nonzero()[:, 0]
        total_B = torch.zeros(len(labels_BL), dtype=torch.float64, device=loss_N.device).index_add_(0, rows_N, -loss_N)
        if not bool(total_B.isfinite().all()):
            raise ValueError("the model gives NaN or infinite log-probabilities")
        return [
            Likelihood(total, tokens)
            for total, tokens in zip(total_B.tolist(), labelled_BL.sum(1).tolist(), strict=True)
        ]

    return runner.map(pairs, totals, title=f"{runner.title} (likelihood)")
