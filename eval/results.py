"""Result files: complete or not there."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def atomic_write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as JSON so that a reader finds the old file or the whole new one, whenever the writer dies.

    Raises:
        ValueError, TypeError: ``obj`` is not JSON (NaN and infinity are not); nothing was touched.
        OSError: e.g. disk full; the old file is as it was.
    """
    atomic_write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, the old one or the whole new one; raises OSError as `atomic_write_json`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, because a rename is atomic only within one file system
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raises OSError when a file could not be written there, before hours of work are lost to it; makes its folder."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {str(path)!r}: it is a folder, expected the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"cannot write {str(path)!r}: {error.strerror or error}") from error
