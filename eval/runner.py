"""How a task runs a model: features in, one result for each out, whatever the batches were."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .data import Side, batches, collator
from .progress import progress_bar
from .task import Feature, Setting


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


@dataclass
class Runner:
    """A model and the conditions under which a task runs it; given to ``Task.predict``.

    Args:
        model: moved to ``device`` when it first runs.
        processor: its tokenizer, image or speech processor, or None.
        max_length: truncation in tokens, 0 for tasks without one.
        settings: the task's, with the user's values. ``predict`` may write what it settled itself (the window that the
            model allows): everything in here is recorded in the scores.
        progress: show a bar with the time left, on the error stream and only when that is a terminal.
        title: what the bar says.
    """

    model: nn.Module
    processor: Any
    device: str | torch.device = "cpu"
    batch_size: int = 32
    max_length: int = 0
    settings: dict[str, Setting] = field(default_factory=dict)
    progress: bool = False
    title: str = "evaluate"

    def map(
        self,
        features: Sequence[Feature],
        function: Callable[[nn.Module, dict[str, torch.Tensor]], Sequence[Any] | torch.Tensor],
        *,
        side: Side = "right",
        drop: Sequence[str] = (),
        max_tokens: int | None = None,
        title: str | None = None,
    ) -> list[Any]:
        """``function`` over all features in batches of like length, in evaluation mode without gradients.

        Args:
            features: mappings as ``collate`` takes them; any number of them for a row.
            function: ``function(model, batch)`` gives one result per row of the batch, off the device. The batch holds
                tensors on the device, targets included (``models.dense.logits`` leaves those out).
            side: of the padding.
            drop: keys that are left out of the batches.
            max_tokens: a batch holds fewer rows where its rows times its longest length would be more than this.

        Returns:
            One result per feature, in the order of ``features``; they depend on the batches only by rounding.

        Raises:
            ValueError: no features, or ``function`` gives another number of results than rows.
        """
        if not len(features):
            raise ValueError("nothing to predict: there are no features")
        self.model.to(self.device)
        join = collator(self.processor, side=side)
        results: list[Any] = [None] * len(features)
        with progress_bar(self.progress) as bar, evaluating(self.model):
            line = bar.add_task(title or self.title, total=len(features))
            for indices, chosen in batches(features, self.batch_size, max_tokens):
                joined = join(chosen)
                batch = {name: tensor.to(self.device) for name, tensor in joined.items() if name not in drop}
                found = function(self.model, batch)
                if len(found) != len(indices):
                    raise ValueError(f"expected {len(indices)} results for a batch of as many rows, found {len(found)}")
                for index, result in zip(indices, found, strict=True):
                    results[index] = result
                bar.advance(line, len(indices))
        return results

    def generate(self, features: Sequence[Feature], **how: Any) -> list[list[int]]:
        """The tokens that the model writes after (decoders) or from (encoder-decoders) each feature.

        Args:
            features: ``input_ids`` and ``attention_mask``; decoders get them padded on the left. Targets stay out.
            how: keyword arguments of transformers' ``generate``: ``num_beams``, ``max_new_tokens``, ``do_sample``, ...

        Returns:
            Token ids of each, without the prompt, with the padding that follows the end: decode them with
            ``skip_special_tokens=True``.

        Raises:
            ValueError: the model writes no text.
        """
        model: Any = self.model
        if not (hasattr(model, "can_generate") and model.can_generate()):
            raise ValueError(f"{type(model).__name__} writes no text: load it with kind='causal-lm' or 'seq2seq-lm'")
        from_scratch = bool(model.config.is_encoder_decoder)

        def write(model: Any, batch: Mapping[str, torch.Tensor]) -> list[list[int]]:
            written = model.generate(**batch, **how)
            tokens: list[list[int]] = (written if from_scratch else written[:, batch["input_ids"].shape[1] :]).tolist()
            return tokens

        return self.map(features, write, side="right" if from_scratch else "left", drop=("labels", "token_type_ids"))
