"""Folders for what is made once per machine: compiled kernels, measured times.

First the user's cache ($XDG_CACHE_HOME, else ~/.cache), then, where that cannot be written, a folder of the user's own
in the system's temporary one. What lies there is loaded as code, so nobody else may be able to write into either.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

_logger = logging.getLogger("squeezoo")


def user_cache(part: str) -> Path | None:
    """The folder of ``part`` in the user's cache, made or not; None where the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification: others are invalid and to be ignored
        return Path(base) / "squeezoo" / part
    try:
        return Path.home() / ".cache" / "squeezoo" / part
    except RuntimeError:
        return None


def is_safe(folder: Path) -> bool:
    """Whether only this user (or root) can have written into ``folder``, as far as its mode says: no link, ours or
    root's, and not writable for everybody."""
    found = folder.lstat()
    mine = not hasattr(os, "getuid") or found.st_uid in (os.getuid(), 0)
    return stat.S_ISDIR(found.st_mode) and mine and not found.st_mode & stat.S_IWOTH


def readable_folders(part: str) -> Iterator[Path]:
    """Existing folders that can be trusted, the user's cache first."""
    usual = user_cache(part)
    with suppress(OSError):
        if usual is not None and is_safe(usual):
            yield usual
    with suppress(OSError):
        root = _shared_root()
        if _is_private(root) and is_safe(root / part):
            yield root / part


def writable_folders(part: str) -> Iterator[Path]:
    """Folders to write into, made if need be: the user's cache, then a private one, of which it says once that it is
    taken. Whoever finds that he cannot write into one asks for the next."""
    usual = user_cache(part)
    why = "there is no home folder"
    if usual is not None:
        why = f"{usual} cannot be written"
        try:
            usual.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not is_safe(usual):
                why = f"{usual} is another user's, or everybody may write into it"
            elif os.access(usual, os.W_OK | os.X_OK):
                yield usual
        except OSError as error:
            why = f"{usual} cannot be made ({error.strerror or error})"
    with suppress(OSError):
        private = _private_root() / part
        private.mkdir(mode=0o700, exist_ok=True)
        _say_private(part, why, private)
        yield private


@cache
def _say_private(part: str, why: str, private: Path) -> None:
    """Once per process."""
    _logger.warning("%s, so Squeezoo keeps its folder %r in %s", why, part, private.parent)


@cache
def _private_root() -> Path:
    """One that other processes of this user find again or, where another user was there first, one for this process."""
    root = _shared_root()
    with suppress(OSError):
        root.mkdir(mode=0o700, exist_ok=True)
        if _is_private(root) and os.access(root, os.W_OK | os.X_OK):
            return root
    return Path(tempfile.mkdtemp(prefix="squeezoo-"))


def _shared_root() -> Path:
    return Path(tempfile.gettempdir()) / f"squeezoo-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


def _is_private(folder: Path) -> bool:
    """No link, this user's own, and closed to all others."""
    found = folder.lstat()
    mine = not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o077)
    return stat.S_ISDIR(found.st_mode) and mine
