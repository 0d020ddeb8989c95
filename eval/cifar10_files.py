"""CIFAR-10 (Krizhevsky 2009): where its images stand, and whether they are the original pixels.

Folder layouts, in this order:

* the official binary version, ``DIR/cifar-10-batches-bin/`` (or below ``DIR/cifar10/``): ``data_batch_1.bin`` to ``_5``
  and ``test_batch.bin``, each image 1 byte of label and 3,072 of red, green and blue;
* ``DIR/cifar10/{train,test}.parquet``, columns ``image`` (encoded bytes) and ``label``.

On the Hub: uoft-cs/cifar10, PNG. The official Python version is pickled, so reading it could run anything: it is
refused with a pointer to the binary one.

JPEG copies are not the original images, and numbers on them do not compare: the setting ``images`` of every score says
``original pixels`` (binary, PNG) or ``JPEG (lossy)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import files
from .task import Row, nearest

HUB = "uoft-cs/cifar10"
SPLITS = ("train", "test")
BATCHES = {"train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)), "test": ("test_batch.bin",)}
BINARY, PICKLED = "cifar-10-batches-bin", "cifar-10-batches-py"
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE
ORIGINAL, LOSSY, UNKNOWN = "original pixels", "JPEG (lossy)", "another encoding"
_MAGIC = {b"\x89PNG": ORIGINAL, b"\xff\xd8\xff": LOSSY}


def cifar10_rows(split: str, data_dir: str | Path | None = None) -> list[Row]:
    """``[{"image": bytes or uint8 [32, 32, 3], "label": int, "where": str, "settings": {"images": str}}]``.

    Raises:
        ValueError: unknown split.
        DataError: not found, a damaged file, a column missing, an empty image or a wrong label.
    """
    if split not in SPLITS:
        raise ValueError("cifar10: " + nearest("split", split, SPLITS))
    folder = files.resolve_data_dir(data_dir)
    if folder is None:
        # `.data.table` would miss an indices mapping; select nothing and read the plain columns without decoding
        table = files.load_from_hub("cifar10", HUB, None, split).with_format("arrow")[:]  # type: ignore[attr-defined]
        return _encoded(table, f"{HUB} {split}", "img")
    for place in (folder, folder / "cifar10"):
        if (place / BINARY).is_dir():
            return [row for name in BATCHES[split] for row in read_binary(place / BINARY / name)]
    try:
        path = files.find_file(f"cifar10, split {split},", folder, (f"cifar10/{split}.parquet",))
    except files.MissingDataError:
        for place in (folder, folder / "cifar10"):
            if (place / PICKLED).is_dir():
                raise files.DataError(
                    f"{place / PICKLED} is the pickled version of CIFAR-10, and unpickling can run any code: expected "
                    f"the binary version, the folder {BINARY} of cifar-10-binary.tar.gz, beside it"
                ) from None
        raise
    return _encoded(_read_parquet(path), str(path), "image")


def read_binary(path: Path) -> list[Row]:
    """One official batch, whole images of 3,073 bytes. Raises DataError: missing, cut off or a label above 9."""
    import numpy as np

    if not path.is_file():
        raise files.MissingDataError(f"{path} is missing: expected the files of cifar-10-binary.tar.gz beside it")
    data = path.read_bytes()
    if not data or len(data) % RECORD:
        raise files.DataError(f"{path}: expected images of {RECORD:,} bytes, found {len(data):,} bytes")
    records_NR = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    images_NHWC = np.ascontiguousarray(records_NR[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    rows: list[Row] = []
    for index, (label, image_HWC) in enumerate(zip(records_NR[:, 0].tolist(), images_NHWC)):
        where = f"{path} image {index}"
        label = files.parse_label(label, 10, where)
        rows.append({"image": image_HWC, "label": label, "where": where, "settings": {"images": ORIGINAL}})
    return rows


def _read_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise files.DataError(f"{path}: not a readable parquet file ({error})") from error


def _encoded(table: Any, place: str, image: str) -> list[Row]:
    absent = [name for name in (image, "label") if name not in table.column_names]
    if absent:
        raise files.DataError(f"{place}: expected the columns {[image, 'label']}, found {table.column_names}")
    images, labels = table.column(image).to_pylist(), table.column("label").to_pylist()
    found: list[tuple[bytes, int, str]] = []
    for index, (stored, value) in enumerate(zip(images, labels)):
        where = f"{place} row {index}"
        encoded = stored["bytes"] if isinstance(stored, dict) else stored
        if not encoded:
            raise files.DataError(f"{where}: column {image!r} is empty")
        found.append((encoded, files.parse_label(value, 10, where), where))
    settings = {"images": _kind([encoded for encoded, _, _ in found])}
    return [{"image": e, "label": label, "where": where, "settings": settings} for e, label, where in found]


def _kind(images: Sequence[bytes]) -> str:
    """What all of them are; one lossy image makes the whole lossy."""
    kinds = {next((kind for magic, kind in _MAGIC.items() if image.startswith(magic)), UNKNOWN) for image in images}
    return next((kind for kind in (LOSSY, UNKNOWN) if kind in kinds), ORIGINAL)
