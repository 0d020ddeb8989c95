"""Folders that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; when the block ends well, it takes the place of ``path``.

    An error (disk full) or a kill inside the block leaves the old ``path`` untouched. A kill between the two renames at
    the end leaves it under ``.<name>.old``, from where ``recover_`` brings it back.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_(path)
    fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    old = _old(path)
    try:
        yield fresh
        for file in fresh.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors makes its files private, mkdtemp the folder
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        fresh.chmod(0o755)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        recover_(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover_(path: Path) -> None:
    """Finish what an interrupted ``replaced_folder`` left: bring the old folder back if the new one never arrived."""
    path = path.absolute()
    old = _old(path)
    if old.exists():
        if path.exists():
            shutil.rmtree(old)
        else:
            old.rename(path)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
