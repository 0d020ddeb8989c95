"""Calibration batches: run a model on them, cut them into pieces, and tell real tokens from padding.

Legend: B rows (calibration sequences), L length, T tokens, I in_features of a GEMM.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models.call import TARGETS

Side = Literal["input", "decoder"]
# Halted forward passes at a time: each keeps a thread, and torch gives each thread its own worker threads.
_MAX_PIECES = 32


class CalibrationDataError(ValueError):
    """Calibration data that cannot be used."""


@dataclass(frozen=True)
class Rows:
    """Calibration sequences of one shape.

    Args:
        tensors: what the model is called with, each [B, ...].
        origins: where each row came from: number of the caller's batch, row in it.
    """

    tensors: Mapping[str, Tensor]
    origins: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows({name: tensor[rows] for name, tensor in self.tensors.items()}, self.origins[rows])


def gather(batches: Iterable[Mapping[str, Any]]) -> list[Rows]:
    """All batches, those of equal shapes put together.

    Raises:
        CalibrationDataError: there is none, or a batch is no mapping of tensors with equal first dimension.
    """
    runs: list[tuple[Any, list[Mapping[str, Tensor]], list[tuple[int, int]]]] = []
    for index, batch in enumerate(batches):
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        sizes = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in tensors.items()}
        if not tensors or len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise CalibrationDataError(
                f"calibration batch {index}: expected tensors with the same number of rows, at least one, found {sizes}"
            )
        shape = {name: (tensor.shape[1:], tensor.dtype) for name, tensor in tensors.items()}
        if not runs or runs[-1][0] != shape:
            runs.append((shape, [], []))
        runs[-1][1].append(tensors)
        runs[-1][2].extend((index, row) for row in range(next(iter(sizes.values()))))
    if not runs:
        raise CalibrationDataError("the calibration set is empty: pass at least one batch, 128 samples are usual")
    return [
        Rows({name: torch.cat([one[name] for one in found]) for name in shape}, tuple(origins))
        for shape, found, origins in runs
    ]


def cut(runs: list[Rows], rows_at_a_time: int) -> list[Rows]:
    """Pieces of at most ``rows_at_a_time`` rows, or larger ones where that would make too many."""
    total = sum(map(len, runs))
    rows_at_a_time = max(1, rows_at_a_time, math.ceil(total / _MAX_PIECES))
    return [run[left : left + rows_at_a_time] for run in runs for left in range(0, len(run), rows_at_a_time)]


def call(model: nn.Module, rows: Rows) -> Any:
    """Run the model on its own device, the way of its library, without targets; with a head or without."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    tensors = {name: tensor.to(device) for name, tensor in rows.tensors.items()}
    labels = tensors.get("labels")
    for name in TARGETS:
        tensors.pop(name, None)
    if type(model).__module__.startswith("timm."):
        return model(tensors["pixel_values"])
    if is_encoder_decoder(model) and labels is not None and labels.dim() == 2 and "decoder_input_ids" not in tensors:
        shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:
            tensors["decoder_input_ids"] = shift(labels=labels)
    return model(**tensors)


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def real_tokens(model: nn.Module, rows: Rows, x: Tensor, side: Side) -> Tensor:
    """The inputs of real tokens, padding left out: [..., I] -> [T, I].

    ``side``: whether a GEMM reads decoder tokens. Then ``decoder_attention_mask``, or labels that are not -100, say
    which are real; else ``attention_mask``. Inputs with one vector per row (a classifier's) are all real.

    Raises:
        CalibrationDataError: there is padding, but the mask does not fit the input.
    """
    mask_BL = _mask(rows.tensors, side)
    if mask_BL is None or bool(mask_BL.all()):
        return x.reshape(-1, x.shape[-1])
    mask_BL = mask_BL.to(x.device)
    if x.shape[:-1] != mask_BL.shape and x.dim() == 3 and x.shape[0] == len(rows):
        mask_BL = _frames(model, mask_BL, x.shape[1])
    if x.shape[:-1] == mask_BL.shape:
        return x[mask_BL]
    if x.shape[:-1] == (mask_BL.numel(),):
        return x[mask_BL.flatten()]
    if x.shape[:-1] == (len(rows),):
        return x
    raise CalibrationDataError(
        f"cannot tell padding: the mask is {list(mask_BL.shape)}, the GEMM's input {list(x.shape)}; "
        f"pass calibration samples of one length, without padding"
    )


def _mask(tensors: Mapping[str, Tensor], side: Side) -> Tensor | None:
    labels = tensors.get("labels")
    if side == "decoder":
        if "decoder_attention_mask" in tensors:
            return tensors["decoder_attention_mask"] != 0
        if labels is not None and labels.dim() == 2:
            return labels != -100
        if "decoder_input_ids" in tensors:
            return None
    mask = tensors.get("attention_mask")  # a decoder without input of its own reads the encoder's
    return None if mask is None or mask.dim() != 2 else mask != 0


def _frames(model: nn.Module, mask_BL: Tensor, frames: int) -> Tensor:
    """A mask of audio samples as one of the frames that transformers' speech models make of them."""
    for module in model.modules():
        convert = getattr(module, "_get_feature_vector_attention_mask", None)
        if convert is not None:
            return convert(frames, mask_BL.long()).bool()
    return mask_BL
