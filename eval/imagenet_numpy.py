"""The end of timm's evaluation transform, conversion and normalisation, in NumPy: the same output, bit for bit.

PyTorch starts a team of threads in every thread that decodes, where it takes the processor from the model. What comes
before, resizing and cropping, stays timm's: Pillow chooses the order of its two passes by the image's shape, so that
leaving rows and columns out would change pixels.

Legend: C channels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class NumpyNormalized:
    """``steps`` from image to image, then ``(pixel / 255 - mean) / std``; mean and std are float32 [C, 1, 1]."""

    steps: Sequence[Any]
    mean_C11: np.ndarray
    std_C11: np.ndarray

    def __call__(self, image: Any, place: torch.Tensor | None = None) -> torch.Tensor:
        """An RGB image of PIL as float32 [C, H, W]: ``place``, written to, where it has that shape."""
        for step in self.steps:
            image = step(image)
        image_HWC = np.asarray(image)
        shape = (image_HWC.shape[2], *image_HWC.shape[:2])
        values_CHW = place if place is not None and place.shape == shape else torch.empty(shape)
        self.normalize_into_(values_CHW.numpy(), image_HWC)
        return values_CHW

    def normalize_into_(self, values_CHW: np.ndarray, image_HWC: np.ndarray) -> None:
        """uint8 as float32, rounded after each of the three operations as PyTorch does."""
        np.divide(image_HWC.transpose(2, 0, 1), np.float32(255), out=values_CHW)
        values_CHW -= self.mean_C11
        values_CHW /= self.std_C11


def with_numpy(transform: Any) -> Any:
    """``transform`` with its last two steps in NumPy where they are conversion and normalisation and give the same
    numbers; else itself."""
    from PIL import Image

    steps = list(getattr(transform, "transforms", ()))
    if [type(step).__name__ for step in steps[-2:]] not in (["MaybeToTensor", "Normalize"], ["ToTensor", "Normalize"]):
        return transform
    *before, convert, normalize = steps
    made = NumpyNormalized(tuple(before), _column(normalize.mean), _column(normalize.std))
    # all there is to these two steps: each of the 256 levels in each channel
    levels_HWC = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    wanted_CHW = normalize(convert(Image.fromarray(levels_HWC)))
    if made.mean_C11.shape != (3, 1, 1):
        return transform
    values_CHW = torch.empty(3, 16, 16)
    made.normalize_into_(values_CHW.numpy(), levels_HWC)
    return made if torch.equal(values_CHW, wanted_CHW) else transform


def _column(values: Any) -> np.ndarray:
    return np.asarray(torch.as_tensor(values).tolist(), dtype=np.float32).reshape(-1, 1, 1)
