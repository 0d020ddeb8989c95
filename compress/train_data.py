"""What a recipe trains on, and the order in which it is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .heads import Batch


@dataclass(frozen=True)
class TrainData:
    """What a recipe trains and calibrates on.

    Args:
        features: one mapping per sample, as ``collate`` takes them.
        collate: list of features -> batch of tensors, with what the task's loss needs (``labels`` of any shape,
            ``start_positions``, ...).
        augment: batch, generator -> batch; training only. It must draw from the generator alone.
        source: what the features are made from, for those that are decoded on access: a resumed run knows its data by
            it without decoding them (`fingerprint.update_data`).
    """

    features: Sequence[Mapping[str, Any]]
    collate: Callable[[list[Mapping[str, Any]]], Batch]
    augment: Callable[[Batch, torch.Generator], Batch] | None = None
    source: Sequence[Any] | None = None

    def lengths(self) -> list[int]:
        """Tokens or audio values per sample, for batches of similar length; all 1 for images."""
        if hasattr(self.features, "lengths"):  # of recordings, which need not be decoded for it
            told: list[int] = self.features.lengths()
            return told
        first = self.features[0]
        key = next((key for key in ("input_ids", "input_values") if key in first), None)
        if key is None:  # images: not decoded for this
            return [1] * len(self.features)
        return [len(feature[key]) for feature in self.features]


class EpochSampler(torch.utils.data.Sampler[int]):
    """Shuffled indices with samples of similar length side by side; the order is a function of (seed, epoch) alone."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = torch.tensor(lengths), batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def at_step(self, step: int) -> list[int]:
        """The samples of the batch at optimizer step ``step``, counted from 0, in a run of one process."""
        of_epoch = EpochSampler(self.lengths.tolist(), self.batch_size, self.seed)
        epoch, batch = divmod(step, -(-len(self) // self.batch_size))
        of_epoch.set_epoch(epoch)
        return list(of_epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self), generator=generator)
        # Sort by length inside chunks of 50 batches: little padding, and still a different order each epoch.
        chunks = [c[self.lengths[c].argsort(stable=True)] for c in order.split(self.batch_size * 50)]
        batches = [b for c in chunks for b in c.split(self.batch_size)]
        full = [b for b in batches if len(b) == self.batch_size]
        rest = [b for b in batches if len(b) < self.batch_size]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()] + rest
        return iter(torch.cat(shuffled).tolist())


class Rows(torch.utils.data.Dataset[Mapping[str, Any]]):
    """The features as the map-style dataset that the Trainer expects."""

    def __init__(self, features: Sequence[Mapping[str, Any]]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.features[index]
