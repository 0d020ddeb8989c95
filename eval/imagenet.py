"""ImageNet-1k (ILSVRC 2012), top-1 and top-5.

Folder layouts below ``DIR/imagenet``, ``DIR/imagenet-1k``, ``DIR/ILSVRC2012`` or ``DIR`` itself; the split's folder is
``train``, or ``val`` or ``validation``:

* ``SPLIT/WNID/*.JPEG``, one folder a class, named by its WordNet id; some of the classes are enough;
* ``val/ILSVRC2012_val_00000001.JPEG`` ... as the archive unpacks, with the classes in one of these files beside ``val``
  or in it: ``val.txt`` (name and class a line), ``imagenet_2012_validation_synset_labels.txt`` or
  ``synset_labels.txt`` (one WordNet id a line), ``LOC_val_solution.csv`` (Kaggle), or the development kit,
  ``ILSVRC2012_devkit_t12/data/`` with its ground truth and ``meta.mat``.

Classes are numbered by the sorted WordNet ids, as timm, torchvision and transformers number them. Images go through the
model's own preprocessing (timm's data configuration, transformers' image processor), which the score records, and are
read and decoded by a few threads just before they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files
from .augment import flip_and_crop
from .image import input_size, predict_ranks, ranked_accuracy
from .imagenet_files import hub_images, read_folder
from .task import FinetuneDefaults, Row, Task, nearest

if TYPE_CHECKING:
    from .imagenet_transform import TransformedImages
    from .runner import Runner

HUB = "ILSVRC/imagenet-1k"
ROOTS = ("imagenet", "imagenet-1k", "ILSVRC2012", ".")
FOLDERS = {"train": ("train",), "validation": ("val", "validation")}
CLASSES = 1000


def imagenet_rows(split: str, data_dir: str | Path | None = None) -> Sequence[Row]:
    """One split as ``{"image": Path or bytes, "label": int, "where": str}``, nothing decoded.

    Raises:
        ValueError: unknown split. DataError: not found, or folders and labels that do not fit.
    """
    if split not in FOLDERS:
        raise ValueError("imagenet: " + nearest("split", split, FOLDERS))
    folder = files.resolve_data_dir(data_dir)
    if folder is None:
        return hub_images("imagenet", HUB, split)
    tried = [f"{root}/{name}" for root in ROOTS for name in FOLDERS[split]]
    for name in tried:
        if (folder / name).is_dir():
            return read_folder(folder / name, (folder / name).parent)
    raise files.missing(f"imagenet, split {split},", f"in {str(folder)!r} for the folders {', '.join(tried)}")


def encode_images(rows: Sequence[Row], processor: Any, max_length: int = 0) -> TransformedImages:
    """Rows as inputs that are decoded on access, preprocessed as `imagenet_transform.transform_of` says.

    Raises:
        ValueError: ``processor`` is no image processor and no timm model.
    """
    from .imagenet_transform import TransformedImages, transform_of

    return TransformedImages(rows, transform_of(processor)[0], input_size(processor))


def predict_images(runner: Runner, rows: Sequence[Row]) -> list[list[int]]:
    """The five best classes of each image; the preprocessing is recorded."""
    from .imagenet_transform import transform_of

    runner.settings["preprocessing"] = transform_of(runner.model if runner.processor is None else runner.processor)[1]
    return predict_ranks(runner, rows, encode=encode_images, classes=CLASSES, decode_ahead=True)


IMAGENET = Task(
    name="imagenet",
    version=1,
    source="Russakovsky et al. 2015 (ImageNet-1k, ILSVRC 2012)",
    kind="image-classification",
    num_labels=CLASSES,
    splits=tuple(FOLDERS),
    sizes=(1_281_167, 50_000),
    metric="top1",
    higher_is_better=True,
    rows=imagenet_rows,
    encode=encode_images,
    score=partial(ranked_accuracy, first="top1"),
    augment=flip_and_crop,
    predict=predict_images,
    finetune=FinetuneDefaults(
        8, 0.01, 512, 0, "Deep Compression, ViT-base/16 at 384 pixels, pre-trained on ImageNet-21k",
        optimizer="sgd", schedule="cosine", max_grad_norm=1.0,
    ),
)  # fmt: skip
