"""What the scores of a model are scores of: the kind of its task, its labels and its real positions.

Shapes: z [B, C]; [B, L, C] for tokens; [B, L, 2] for spans (start, end); [B, T, V] for CTC frames. Masks are true at
real positions, false at padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
TaskKind = Literal["classification", "regression", "span", "token", "causal", "masked", "seq2seq", "ctc"]
IGNORED = -100
_AUDIO = ("input_values", "input_features")


class DistillError(ValueError):
    """Teacher, student and batch that give no loss."""


@dataclass(frozen=True)
class Supervision:
    """What the loss of one batch needs beside the scores.

    Args:
        kind: the task.
        labels: at the positions of the scores, -100 where there is none: classes [B], values [B] or [B, C], tokens
            [B, L] (of causal models already shifted by one), start and end [B, 2], symbols [B, S] for CTC. Or None.
        mask: real positions of the scores [B, L] or [B, T]; None where all are.
        blank, zero_infinity: of the CTC loss.
    """

    kind: TaskKind
    labels: Tensor | None
    mask: Tensor | None
    blank: int = 0
    zero_infinity: bool = False


def supervision(model: nn.Module, batch: Mapping[str, Tensor], scores: Tensor) -> Supervision:
    """Labels and mask of a batch, put at the positions of the model's scores.

    Raises:
        DistillError: scores of no known kind, a mask of another length than the scores, labels of another shape.
    """
    kind = task_kind(model, batch, scores)
    labels = _labels(kind, batch)
    if kind in ("classification", "regression"):
        return Supervision(kind, labels, None)
    mask = side_masks(model, batch)["decoder" if kind == "seq2seq" else "encoder"]
    mask = aligned(model, mask, scores.shape[1])
    if kind == "span":
        return Supervision(kind, _inside(labels, scores.shape[1]), mask)
    if kind == "ctc":
        config: Any = unwrapped(model).config
        return Supervision(kind, labels, mask, config.pad_token_id, bool(getattr(config, "ctc_zero_infinity", False)))
    if labels is not None and labels.shape != scores.shape[:2]:
        raise DistillError(
            f"labels of shape {tuple(labels.shape)} for scores at {tuple(scores.shape[:2])}: expected one label per "
            f"position, {IGNORED} where there is none"
        )
    if labels is not None and kind == "causal":  # position i predicts token i + 1
        labels = labels if mask is None else labels.masked_fill(~mask, IGNORED)
        labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if labels is not None and mask is not None:
        labels = labels.masked_fill(~mask, IGNORED)
    return Supervision(kind, labels, mask)


def task_kind(model: nn.Module, batch: Mapping[str, Tensor], scores: Tensor) -> TaskKind:
    """The task, from the model's head, its inputs and the shape of its scores; never from the architecture's name.

    Raises:
        DistillError: scores of no known shape, or several labels per sample.
    """
    base: Any = unwrapped(model)
    config: Any = getattr(base, "config", None)
    if scores.dim() == 2:
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            raise DistillError("problem_type multi_label_classification: expected one label per sample")
        return "regression" if scores.shape[1] == 1 or problem == "regression" else "classification"
    if scores.dim() != 3:
        raise DistillError(f"expected scores [B, C] or [B, L, C], {type(base).__name__} gives {tuple(scores.shape)}")
    if "start_positions" in inspect.signature(base.forward).parameters:
        return "span"
    if hasattr(base, "can_generate") and base.can_generate():
        return "seq2seq" if config.is_encoder_decoder else "causal"
    if any(name in batch for name in _AUDIO):
        return "ctc"
    has_vocabulary = hasattr(base, "get_output_embeddings") and base.get_output_embeddings() is not None
    return "masked" if has_vocabulary else "token"


def side_masks(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Real input positions on each side of a model; ``block`` and ``encoder`` are the same.

    The decoder's are, in this order: ``decoder_attention_mask``, labels other than -100, decoder inputs other than
    padding (the first always counts), and for classifiers, whose decoder reads the encoder's input, the encoder's.
    """
    mask = batch.get("attention_mask")
    encoder = None if mask is None else mask.bool()
    config: Any = getattr(unwrapped(model), "config", None)
    decoder = encoder
    if "decoder_attention_mask" in batch:
        decoder = batch["decoder_attention_mask"].bool()
    elif getattr(config, "is_encoder_decoder", False) and unwrapped(model).can_generate():  # type: ignore[operator]
        if "labels" in batch:
            decoder = batch["labels"] != IGNORED
        elif "decoder_input_ids" in batch:
            decoder = batch["decoder_input_ids"] != config.pad_token_id
            decoder[:, 0] = True
    return {"block": encoder, "encoder": encoder, "decoder": decoder}


def aligned(model: nn.Module, mask: Tensor | None, positions: int) -> Tensor | None:
    """A mask of input positions as one of ``positions`` positions: speech models shorten waveforms to frames.

    Raises:
        DistillError: the lengths differ and the model does not tell how.
    """
    if mask is None or mask.shape[1] == positions:
        return mask
    base: Any = unwrapped(model)
    if hasattr(base, "_get_feature_vector_attention_mask"):
        frames: Tensor = base._get_feature_vector_attention_mask(positions, mask.long()).bool()
        return frames
    raise DistillError(
        f"the mask has {mask.shape[1]} positions, the outputs of {type(base).__name__} have {positions}: padding "
        "cannot be told from data; leave the mask out of batches without padding"
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s wrapper."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def _labels(kind: TaskKind, batch: Mapping[str, Tensor]) -> Tensor | None:
    if kind != "span":
        return batch.get("labels")
    given = [batch[name] for name in ("start_positions", "end_positions") if name in batch]
    if len(given) == 1:
        raise DistillError("the batch has one of start_positions and end_positions: expected both or none")
    return torch.stack(given, dim=1) if given else None


def _inside(labels_B2: Tensor | None, length: int) -> Tensor | None:
    """Answers that lie outside the window count as no label."""
    if labels_B2 is None:
        return None
    return labels_B2.masked_fill((labels_B2 < 0) | (labels_B2 >= length), IGNORED)
