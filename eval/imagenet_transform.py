"""How an image becomes a model's input: the model's own resizing, crop and constants, by its own library.

Legend: C channels, H rows of pixels, W columns.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from .files import DataError
from .image import declared_shape
from .imagenet_numpy import NumpyNormalized, with_numpy
from .joined import Places
from .lazy_rows import LazyRows
from .task import Feature, Row

Transform = Callable[[Any], Tensor]
_TOLD = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip


def transform_of(processor: Any) -> tuple[Transform, str]:
    """The function from an RGB image of PIL to float32 [C, H, W], and its description for the settings of a score.

    Args:
        processor: an image processor of transformers; or a timm model, whose data configuration (size, crop, share of
            the image, interpolation, mean and deviation) timm's own evaluation transform follows.

    Raises:
        ValueError: neither of them.
    """
    if isinstance(processor, nn.Module) and hasattr(processor, "pretrained_cfg"):
        return _timm(processor)
    if not hasattr(processor, "image_mean"):
        raise ValueError(
            f"ImageNet needs the model's own image processor, which knows size, crop and constants; found "
            f"{type(processor).__name__}: save it in the model's folder (image_processor.save_pretrained)"
        )

    def transform(image: Any) -> Tensor:
        values_CHW: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
        return values_CHW

    return transform, f"{type(processor).__name__}: " + ", ".join(
        f"{name} {_brief(getattr(processor, name))}" for name in _TOLD if getattr(processor, name, None) is not None
    )


def _timm(model: nn.Module) -> tuple[Transform, str]:
    from timm.data import create_transform, resolve_data_config

    # a model made for other images than its weights were (img_size) keeps their configuration in all but the size
    config: dict[str, Any] = resolve_data_config({"input_size": declared_shape(model)}, model=model)
    transform: Transform = with_numpy(create_transform(**config))
    return transform, "timm: " + ", ".join(f"{name} {_brief(value)}" for name, value in sorted(config.items()))


def _brief(value: Any) -> str:
    """Alike for tuples, lists, enumerations and transformers' sizes."""
    if isinstance(value, (tuple, list)):
        return "x".join(f"{item:g}" for item in value)
    if isinstance(value, (bool, str)):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value:.6g}"
    # transformers' sizes are no mappings, but iterate over pairs
    return " ".join(f"{name}={length}" for name, length in dict(value).items() if length is not None)


class TransformedImages(LazyRows[Feature]):
    """Rows as model inputs, read and decoded when accessed: ``{"pixel_values": float32 [C, H, W], "labels": int}``.

    Args:
        size: (height, width) that ``transform`` gives, where it is known: batches are then made in one block of memory.
    """

    def __init__(self, rows: Sequence[Row], transform: Transform, size: tuple[int, int] | None = None) -> None:
        self.rows, self.transform = rows, transform
        self.places = Places(None if size is None else (3, *size))

    def __len__(self) -> int:
        return len(self.rows)

    def make(self, index: int) -> Feature:
        row = self.rows[index]
        return {"pixel_values": self._pixels(decode(row), self.places.take(index)), "labels": int(row["label"])}

    def _pixels(self, image: Any, place_CHW: Tensor | None) -> Tensor:
        if isinstance(self.transform, NumpyNormalized):
            return self.transform(image, place_CHW)
        values_CHW = self.transform(image)
        if place_CHW is None or (place_CHW.shape, place_CHW.dtype) != (values_CHW.shape, values_CHW.dtype):
            return values_CHW
        np.copyto(place_CHW.numpy(), values_CHW.numpy())  # PyTorch's own copy would start a team of threads
        return place_CHW


def decode(row: Row) -> Any:
    """The row's image in RGB, as PIL has it; rotation marks of cameras are ignored, as timm and torchvision do.

    Raises:
        DataError: not a whole image, with its file.
    """
    from PIL import Image

    stored: Path | bytes = row["image"]
    try:
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL: SyntaxError for broken PNG, ValueError for broken sizes
        raise DataError(f"{row['where']}: not a readable image ({error})") from error
