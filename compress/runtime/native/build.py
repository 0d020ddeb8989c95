"""Compile the kernels with the system's C++ compiler, once per machine, into the user's cache.

The file is named by a hash of the sources, the compiler and its flags, so a new version never meets an old library. It
is written whole or not at all, under a lock, so several processes may start at once. A failure leaves nothing: the next
process tries again. OpenMP's functions stay undefined in it: they are those that PyTorch has loaded, which makes one
pool of threads for both.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..caches import readable_folders, writable_folders
from .compiler import BuildError, find_compiler, identity, run_all

__all__ = ["BuildError", "built_library", "find_compiler", "is_linux_x86", "library_path"]

SOURCES = (
    "attention.cpp", "attention_bf16.cpp", "attention_int8.cpp", "block.cpp", "gemm.cpp", "pack.cpp", "rows.cpp",
    "tiles.cpp",
)  # fmt: skip
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w",
    "-mavx512f", "-mavx512cd", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c", "-mbmi2",
)  # fmt: skip
_BUILD_S = 300.0  # for the whole build; on two cores it takes some 8
_WAIT_S = 310.0  # for another process's build
_POLL_S = 0.05

_logger = logging.getLogger("squeezoo")


def library_path() -> Path:
    """The compiled library, compiled now if it is in no cache; then it says so.

    Raises:
        BuildError: another system than Linux on x86, no compiler, a compiler that fails or takes too long, no folder
            that can be written, or another process that compiles and does not end.
    """
    name, compiler = _named()
    for folder in readable_folders("native"):
        if (folder / name).exists():
            return folder / name
    why = "neither the user's cache nor a temporary folder can be written"
    for folder in writable_folders("native"):
        path = folder / name
        try:
            with _lock(folder):
                if not path.exists():  # another process may have been here first
                    _logger.warning("compiling the native kernels, once; some 10 seconds")
                    _compile(compiler, path)
            return path
        except OSError as error:
            why = f"{folder}: {error}"
    raise BuildError(f"the native kernels cannot be written: {why}")


def built_library() -> Path | None:
    """The compiled library where it is in a cache already.

    Raises:
        BuildError: see `library_path`; nothing is compiled.
    """
    name, _ = _named()
    return next((folder / name for folder in readable_folders("native") if (folder / name).exists()), None)


def is_linux_x86() -> bool:
    """Whether this is the one system that the kernels are written for."""
    return sys.platform.startswith("linux") and platform.machine() in ("x86_64", "AMD64")


def _named() -> tuple[str, tuple[str, ...]]:
    """The library's file name and the compiler that makes it."""
    if not is_linux_x86():
        raise BuildError(f"the native kernels are for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    compiler = find_compiler()
    return f"kernels-{_fingerprint(compiler)}.so", compiler


def _fingerprint(compiler: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(_here().iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((identity(compiler), _FLAGS)).encode())
    return digest.hexdigest()[:20]


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """The right to compile into ``folder``. The system takes it from a process that dies."""
    import fcntl

    with (folder / "lock").open("w") as lock:
        end, said = time.monotonic() + _WAIT_S, False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not said:
                    _logger.warning("waiting for another process that compiles the native kernels, once")
                    said = True
                if time.monotonic() > end:
                    raise BuildError(
                        f"another process has held {folder / 'lock'} for {_WAIT_S:.0f} s, so the native kernels are "
                        "not compiled: end it, and they are at the next start"
                    ) from None
                time.sleep(_POLL_S)
        yield


def _compile(compiler: tuple[str, ...], path: Path) -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent) as made:
        scratch = Path(made)
        objects = [scratch / f"{source}.o" for source in SOURCES]
        commands = [(*compiler, *_FLAGS, "-c", str(_here() / s), "-o", str(o)) for s, o in zip(SOURCES, objects)]
        run_all(commands, scratch, start, _BUILD_S)
        linked = scratch / "kernels.so"
        link = (*compiler, "-shared", *map(str, objects), "-o", str(linked))  # without -fopenmp: no second OpenMP
        run_all([link], scratch, start, _BUILD_S)
        os.replace(linked, path)


def _here() -> Path:
    return Path(__file__).parent
