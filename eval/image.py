"""Image classification, top-1 (``accuracy``) and top-5: scikit-learn's digits (no file needed) and CIFAR-10.

The files of CIFAR-10 are those of `eval.cifar10_files`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, metrics
from .ahead import Ahead
from .augment import flip_and_crop, shift_one_pixel
from .cifar10_files import SPLITS, cifar10_rows
from .lazy_rows import LazyRows
from .task import Feature, Row, Task, nearest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from .runner import Runner

    Encode = Callable[[Sequence[Row], Any, int], Sequence[Feature]]

TOP = 5
DIGITS_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Pixels:
    """How stored pixels become model inputs: ``(pixel / full - mean) / std``, per channel."""

    channels: int
    full: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


# 4-bit counts 0..16 -> [-1, 1]
DIGITS_PIXELS = Pixels(1, 16.0, (0.5,), (0.5,))
# mean and standard deviation of the 50,000 training images (Krizhevsky 2009), as used throughout the literature
CIFAR10_PIXELS = Pixels(3, 255.0, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


class ImageFeatures(LazyRows[Feature]):
    """Rows as model inputs, decoded when accessed.

    Item: ``{"pixel_values": float32 [C, H, W], "labels": int}``.
    """

    def __init__(self, rows: Sequence[Row], pixels: Pixels, size: tuple[int, int] | None) -> None:
        import numpy as np

        from .joined import Places

        self.rows, self.pixels, self.size = rows, pixels, size
        self.places = Places(None if size is None else (pixels.channels, *size))
        self._mean_C11 = np.array(pixels.mean, np.float32)[:, None, None] * np.float32(pixels.full)
        self._std_C11 = np.array(pixels.std, np.float32)[:, None, None] * np.float32(pixels.full)

    def __len__(self) -> int:
        return len(self.rows)

    def make(self, index: int) -> Feature:
        import numpy as np
        import torch

        row = self.rows[index]
        image_CHW = self._decode(row).transpose(2, 0, 1)
        place_CHW = self.places.take(index)
        values_CHW = torch.empty(image_CHW.shape) if place_CHW is None else place_CHW
        # PyTorch would start a team of threads in every thread that decodes
        np.subtract(image_CHW, self._mean_C11, out=values_CHW.numpy())
        np.divide(values_CHW.numpy(), self._std_C11, out=values_CHW.numpy())
        return {"pixel_values": values_CHW, "labels": int(row["label"])}

    def _decode(self, row: Row) -> np.ndarray:
        """The image as uint8 or (resized from an array) float32 [H, W, C], in the wanted size."""
        import numpy as np
        from PIL import Image

        stored = row["image"]
        if isinstance(stored, np.ndarray) and self.size in (None, stored.shape[:2]):
            return stored.reshape(*stored.shape[:2], self.pixels.channels)
        try:
            if isinstance(stored, np.ndarray):
                # 17 grey levels must not be rounded to when resized; 256 are the images' own
                image = Image.fromarray(stored if stored.ndim == 3 else stored.astype(np.float32))
            else:
                image = Image.open(io.BytesIO(stored)).convert("RGB" if self.pixels.channels == 3 else "L")
        except OSError as error:
            raise files.DataError(f"{row['where']}: not a readable image ({error})") from error
        if self.size is not None and (image.height, image.width) != self.size:
            image = image.resize((self.size[1], self.size[0]), Image.Resampling.BICUBIC)
        return np.array(image).reshape(image.height, image.width, self.pixels.channels)


def encode_images(rows: Sequence[Row], processor: Any, max_length: int = 0, *, pixels: Pixels) -> ImageFeatures:
    """Rows as lazily decoded inputs of the size that ``processor`` asks for, normalised with the data set's constants.

    Args:
        processor: anything `input_size` understands; None keeps the stored size.
        max_length: unused, images have no length.
    """
    return ImageFeatures(rows, pixels, input_size(processor))


def input_size(processor: Any) -> tuple[int, int] | None:
    """(height, width) wanted by ``processor``; None when it does not say.

    Understands an integer, (height, width) or (channels, height, width), timm's data configuration (a mapping with
    ``input_size`` as channels, height, width), a transformers image processor (``crop_size`` where it crops, else
    ``size``) and an image model.
    """
    from torch import nn

    if processor is None:
        return None
    if isinstance(processor, int):
        return (processor, processor)
    if isinstance(processor, (tuple, list)):
        return (int(processor[-2]), int(processor[-1]))
    if isinstance(processor, Mapping):
        if "height" in processor and "width" in processor:
            return (int(processor["height"]), int(processor["width"]))
        return input_size(processor.get("input_size", processor.get("shortest_edge")))
    if isinstance(processor, nn.Module):
        return input_size(declared_shape(processor))
    cropped = getattr(processor, "do_center_crop", False)
    size: Any = getattr(processor, "crop_size" if cropped else "size", None)
    # transformers' SizeDict is no mapping, but iterates over pairs as dict() wants them
    return input_size(size if size is None or isinstance(size, (int, tuple, list)) else dict(size))


def declared_shape(model: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) of the images that ``model`` reads; None for a text model."""
    from ..models.example import example_batch

    batch = example_batch(model)
    if "pixel_values" not in batch:
        return None
    channels, height, width = batch["pixel_values"].shape[1:]
    return channels, height, width


def digits_rows(split: str, data_dir: str | Path | None = None) -> list[Row]:
    """scikit-learn's digits: 1,797 scans of 8 x 8 pixels, values 0 to 16, in the bundled order.

    The split needs no random number: within each class, in the bundled order, the 5th, 10th, ... image is
    ``validation`` (355 images), the 2nd, 7th, ... is ``test`` (362), the others are ``train`` (1,080). It keeps the
    class proportions; the data does not name the writers, so the same hand may be in all parts, as in any random split
    of this set. Version 1 had no validation split: its test images are the validation images now.

    Args:
        data_dir: unused, the data comes with scikit-learn.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    if split not in DIGITS_SPLITS:
        raise ValueError("digits: " + nearest("split", split, DIGITS_SPLITS))
    bunch = load_digits()
    seen = np.zeros(10, dtype=int)
    rows: list[Row] = []
    for index, (image, label) in enumerate(zip(bunch.images.astype(np.uint8), bunch.target)):
        seen[label] += 1
        if {0: "validation", 2: "test"}.get(int(seen[label]) % 5, "train") == split:
            rows.append({"image": image, "label": int(label), "where": f"scikit-learn digits, image {index}"})
    return rows


def predict_ranks(
    runner: Runner, rows: Sequence[Row], *, encode: Encode, classes: int, decode_ahead: bool = False
) -> list[list[int]]:
    """The five classes of the largest logits of each row, the largest first; of equal ones the lower class.

    Args:
        encode: the task's. classes: width of the logits.
        decode_ahead: several threads decode, for images whose decoding takes longer than reading memory.

    Raises:
        ValueError: logits of another width, or such that are not finite.
    """
    features = encode(rows, runner.model if runner.processor is None else runner.processor, runner.max_length)

    def best(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[list[int]]:
        from ..models.dense import logits

        scores_BC = logits(model, batch)
        if scores_BC.dim() != 2 or scores_BC.shape[1] != classes:
            raise ValueError(
                f"the task needs logits [rows, {classes}], the model gives {list(scores_BC.shape)}: load it with "
                f"num_labels={classes} and fine-tune it on this task"
            )
        if not scores_BC.isfinite().all():
            raise ValueError("the model gives NaN or infinite logits")
        return best_classes(scores_BC.float())

    if not decode_ahead:
        return runner.map(features, best, drop=("labels",))
    with Ahead.of(features, runner.batch_size, runner.device) as ahead:
        return runner.map(ahead, best, drop=("labels",))


def best_classes(scores_BC: torch.Tensor) -> list[list[int]]:
    """The classes of the `TOP` largest scores of each row, the largest first; of equal ones the lower class."""
    found = scores_BC.topk(min(TOP + 1, scores_BC.shape[1]))
    if bool((found.values[:, 1:] == found.values[:, :-1]).any()):  # topk leaves open which of equal ones comes first
        return scores_BC.sort(descending=True, stable=True).indices[:, :TOP].tolist()
    return found.indices[:, :TOP].tolist()


def ranked_accuracy(
    predictions: Sequence[Sequence[int]], labels: Sequence[int], first: str = "accuracy"
) -> dict[str, float]:
    """Share of rows whose class is the best one (under the name ``first``) and among the five best (``top5``)."""
    among = sum(label in ranks for ranks, label in zip(predictions, labels, strict=True))
    return {first: metrics.accuracy([ranks[0] for ranks in predictions], labels), "top5": among / len(labels)}


_ENCODE_DIGITS = partial(encode_images, pixels=DIGITS_PIXELS)
_ENCODE_CIFAR10 = partial(encode_images, pixels=CIFAR10_PIXELS)
DIGITS = Task(
    name="digits",
    version=2,
    source="Alpaydin and Kaynak 1998 (UCI Optical Recognition of Handwritten Digits), as bundled with scikit-learn",
    kind="image-classification",
    num_labels=10,
    splits=DIGITS_SPLITS,
    sizes=(1_080, 355, 362),
    metric="accuracy",
    higher_is_better=True,
    rows=digits_rows,
    encode=_ENCODE_DIGITS,
    score=ranked_accuracy,
    predict=partial(predict_ranks, encode=_ENCODE_DIGITS, classes=10),
    augment=shift_one_pixel,
)
CIFAR10 = Task(
    name="cifar10",
    version=1,
    source="Krizhevsky 2009 (Learning Multiple Layers of Features from Tiny Images)",
    kind="image-classification",
    num_labels=10,
    splits=SPLITS,
    sizes=(50_000, 10_000),
    metric="accuracy",
    higher_is_better=True,
    rows=cifar10_rows,
    encode=_ENCODE_CIFAR10,
    score=ranked_accuracy,
    predict=partial(predict_ranks, encode=_ENCODE_CIFAR10, classes=10, decode_ahead=True),
    augment=flip_and_crop,
)
