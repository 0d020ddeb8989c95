"""How an image becomes a model's input: the model's own resizing, crop and constants, by its own library.

Legend: C channels, H rows of pixels, W columns.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn

from .files import DataError
from .image import declared_shape
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

    from .imagenet_numpy import with_numpy

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


class TransformedImages(Sequence[Feature]):
    """Rows as model inputs, read and decoded when accessed: ``{"pixel_values": float32 [C, H, W], "labels": int}``."""

    def __init__(self, rows: Sequence[Row], transform: Transform) -> None:
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Feature: ...
    @overload
    def __getitem__(self, index: slice) -> list[Feature]: ...
    def __getitem__(self, index: int | slice) -> Feature | list[Feature]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        return {"pixel_values": self.transform(decode(row)), "labels": int(row["label"])}


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
