"""The ImageNet-1k folders: which files, and the class of each, in the order of the sorted WordNet ids.

Nothing is decoded here. timm, torchvision and transformers number the classes alike: by the sorted WordNet ids (wnids).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from . import files
from .lazy_rows import LazyRows
from .task import Row

IMAGES = (".jpeg", ".jpg", ".png")
WNID = re.compile(r"n\d{8}")
DEVKIT = "ILSVRC2012_devkit_t12/data"
GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
SYNSET_LABELS = ("imagenet_2012_validation_synset_labels.txt", "synset_labels.txt")
LABEL_FILES = ("val.txt", *SYNSET_LABELS, "LOC_val_solution.csv", f"{DEVKIT}/{GROUND_TRUTH}")


@cache
def class_indices() -> dict[str, int]:
    """wnid: class, for the 1,000 classes, as timm's own list has them."""
    from ..models.torchvision_guard import ensure_torchvision_importable

    ensure_torchvision_importable()
    from timm.data import ImageNetInfo

    return {wnid: index for index, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}


class ImageFiles(LazyRows[Row]):
    """Image files as rows ``{"image": Path, "label": int, "where": str}``, made when they are accessed."""

    def __init__(self, names: Sequence[str], labels: Sequence[int], folder: Path) -> None:
        self.names, self.labels, self.folder = names, labels, folder

    def __len__(self) -> int:
        return len(self.names)

    def make(self, index: int) -> Row:
        path = self.folder / self.names[index]
        return {"image": path, "label": self.labels[index], "where": str(path)}


def read_folder(folder: Path, root: Path) -> ImageFiles:
    """The images of a split's folder: in folders named by wnid, or all in it, with their labels elsewhere.

    Args:
        folder: of the split. root: where files of labels are looked for too.

    Raises:
        DataError: an unknown or empty class folder, no images, no labels, or labels that do not fit.
    """
    entries = sorted(folder.iterdir())
    classes = [path for path in entries if path.is_dir()]
    if classes:
        return _class_folders(folder, classes)
    names = [path.name for path in entries if path.suffix.lower() in IMAGES]
    if not names:
        raise files.DataError(f"{folder}: expected folders named by WordNet id (n01440764) or images, found neither")
    return ImageFiles(names, _flat_labels(names, folder, root), folder)


def _class_folders(folder: Path, classes: Sequence[Path]) -> ImageFiles:
    names: list[str] = []
    labels: list[int] = []
    for path in classes:
        label = _class_of(path.name, str(path))
        images = sorted(image.name for image in path.iterdir() if image.suffix.lower() in IMAGES)
        if not images:
            raise files.DataError(f"{path}: expected images, found none")
        names += [f"{path.name}/{name}" for name in images]
        labels += [label] * len(images)
    return ImageFiles(names, labels, folder)


def _class_of(wnid: str, where: str) -> int:
    classes = class_indices()
    if wnid not in classes:
        if WNID.fullmatch(wnid):
            raise files.DataError(f"{where}: {wnid} is none of the 1,000 classes of ImageNet-1k")
        raise files.DataError(f"{where}: expected a WordNet id such as n01440764, found {wnid!r}")
    return classes[wnid]


def _flat_labels(names: Sequence[str], folder: Path, root: Path) -> list[int]:
    """The class of each image, from the first file of labels that there is."""
    for name in LABEL_FILES:
        for place in (root, folder):
            path = place / name
            if path.is_file():
                return _readers()[path.name](path, names)
    raise files.DataError(
        f"{folder}: the images stand in no folders named by WordNet id, so their classes must stand in one of "
        f"{', '.join(LABEL_FILES)}, in {str(root)!r} or beside them; none is there"
    )


def _readers() -> dict[str, Callable[[Path, Sequence[str]], list[int]]]:
    in_order = {name: _synset_labels for name in SYNSET_LABELS}
    return {"val.txt": _val_txt, "LOC_val_solution.csv": _kaggle, GROUND_TRUTH: _devkit, **in_order}


def _val_txt(path: Path, names: Sequence[str]) -> list[int]:
    """``NAME INDEX`` or ``NAME WNID`` a line; the index is the class, as Caffe's list of that name has it."""
    found: dict[str, int] = {}
    for number, line in _lines(path):
        where, cells = f"{path}:{number}", line.split()
        if len(cells) != 2:
            raise files.DataError(f"{where}: expected the name of an image and its class, found {line!r}")
        label = _class_of(cells[1], where) if WNID.fullmatch(cells[1]) else files.parse_label(cells[1], 1000, where)
        found[Path(cells[0]).name] = label
    return _by_name(found, names, path)


def _kaggle(path: Path, names: Sequence[str]) -> list[int]:
    """``ImageId,PredictionString``: the name without its ending, and the wnid before the boxes."""
    reader = csv.DictReader(io.StringIO(files.read_text(path), newline=""))
    if reader.fieldnames is None or not {"ImageId", "PredictionString"} <= set(reader.fieldnames):
        raise files.DataError(f"{path}:1: expected the columns ImageId, PredictionString, found {reader.fieldnames}")
    found: dict[str, int] = {}
    for row in reader:
        where = f"{path}:{reader.line_num}"
        found[row["ImageId"]] = _class_of((row["PredictionString"] or " ").split(" ")[0], where)
    return _by_name({name: found[Path(name).stem] for name in names if Path(name).stem in found}, names, path)


def _by_name(found: dict[str, int], names: Sequence[str], path: Path) -> list[int]:
    absent = [name for name in names if name not in found]
    if absent:
        raise files.DataError(f"{path}: no class for {absent[0]} ({len(absent):,} of {len(names):,} images have none)")
    return [found[name] for name in names]


def _synset_labels(path: Path, names: Sequence[str]) -> list[int]:
    """One wnid a line, in the order of the images' names."""
    labels = [_class_of(line.strip(), f"{path}:{number}") for number, line in _lines(path)]
    return _by_number(labels, names, path)


def _devkit(path: Path, names: Sequence[str]) -> list[int]:
    """The development kit: one ILSVRC2012_ID a line, in the order of the images' names; ``meta.mat`` says its wnid."""
    import numpy as np
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    meta = path.parent / META
    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        wnids = {int(i): str(wnid) for i, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    except (OSError, KeyError, ValueError, TypeError, IndexError, MatReadError) as error:
        raise files.DataError(f"{meta}: expected the development kit's synsets ({error})") from error
    assert isinstance(synsets, np.ndarray)
    labels = []
    for number, line in _lines(path):
        where, text = f"{path}:{number}", line.strip()
        if not text.isdigit() or int(text) not in wnids:
            raise files.DataError(f"{where}: expected an ILSVRC2012_ID of {META}, found {text!r}")
        labels.append(_class_of(wnids[int(text)], where))
    return _by_number(labels, names, path)


def _by_number(labels: Sequence[int], names: Sequence[str], path: Path) -> list[int]:
    """Line n belongs to ILSVRC2012_val_0000000n, so that a part of the images can be scored too."""
    chosen = []
    for name in names:
        number = re.search(r"_(\d{8})\.", name)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise files.DataError(
                f"{path}: its {len(labels):,} lines belong to ILSVRC2012_val_00000001 and so on, which {name} is not"
            )
        chosen.append(labels[int(number[1]) - 1])
    return chosen


def _lines(path: Path) -> list[tuple[int, str]]:
    lines = [(n, line) for n, line in enumerate(files.read_text(path).split("\n"), start=1) if line.strip()]
    if not lines:
        raise files.DataError(f"{path}:1: expected lines, found none")
    return lines


class HubImages(LazyRows[Row]):
    """The rows of a Hub data set with the columns ``image`` and ``label``, read when they are accessed."""

    def __init__(self, table: Any, place: str) -> None:
        self.table, self.place = table, place

    def __len__(self) -> int:
        return len(self.table)

    def make(self, index: int) -> Row:
        row, where = self.table[index], f"{self.place} row {index}"
        if not row["image"]["bytes"]:
            raise files.DataError(f"{where}: column 'image' is empty")
        return {"image": row["image"]["bytes"], "label": files.parse_label(row["label"], 1000, where), "where": where}


def hub_images(what: str, repository: str, split: str) -> HubImages:
    """One split of a Hub data set; ``datasets`` fetches all splits when it is first used.

    Raises:
        MissingDataError: neither reachable nor cached (its terms must have been accepted). DataError: a column is
            missing.
    """
    from datasets import Image

    table: Any = files.load_from_hub(what, repository, None, split)
    place = f"{repository} {split}"
    absent = [name for name in ("image", "label") if name not in table.column_names]
    if absent:
        raise files.DataError(f"{place}: expected the columns ['image', 'label'], found {table.column_names}")
    return HubImages(table.cast_column("image", Image(decode=False)), place)
