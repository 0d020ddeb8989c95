"""Compile the kernels with the system's C++ compiler, once per machine, into the user's cache.

The file is named by a hash of the sources, the compiler and its flags, so a new version never meets an old library. It
is written whole or not at all, under a lock, so several processes may start at once. OpenMP's functions stay undefined
in it: they are those that PyTorch has loaded, which makes one pool of threads for both.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = (
    "attention.cpp", "attention_bf16.cpp", "attention_int8.cpp", "block.cpp", "gemm.cpp", "pack.cpp", "rows.cpp",
    "tiles.cpp",
)  # fmt: skip
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w",
    "-mavx512f", "-mavx512cd", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c", "-mbmi2",
)  # fmt: skip
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 300


class BuildError(Exception):
    """The kernels cannot be compiled here; the text says why, in one line."""


def library_path() -> Path:
    """The compiled library, compiled now if it is not in the cache.

    Raises:
        BuildError: another system than Linux on x86, no compiler, a compiler that fails, or a cache that cannot be
            written.
    """
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"the native kernels are for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    compiler = find_compiler()
    folder = cache_folder()
    path = folder / f"kernels-{_fingerprint(compiler)}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():  # another process may have been here first
                _compile(compiler, path)
    except OSError as error:
        raise BuildError(f"the native kernels cannot be written to {folder}: {error}") from error
    return path


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "squeezoo" / "native"


def find_compiler() -> str:
    """The full path of a C++ compiler: ``CXX`` where it is set, else the first of c++, g++ and clang++.

    Raises:
        BuildError: there is none.
    """
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else _COMPILERS:
        if found := shutil.which(name):
            return found
    raise BuildError(
        f"no C++ compiler ({wanted or ', '.join(_COMPILERS)}) for the native kernels: install g++ (Debian, Ubuntu: "
        "apt install g++), and they are compiled at the next start"
    )


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for path in sorted(_here().iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    binary = os.stat(compiler)  # asking for its version would start it at every load
    digest.update(repr((compiler, binary.st_size, binary.st_mtime_ns, _FLAGS)).encode())
    return digest.hexdigest()[:20]


def _compile(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [Path(scratch) / f"{source}.o" for source in SOURCES]
        commands = [(compiler, *_FLAGS, "-c", str(_here() / s), "-o", str(made)) for s, made in zip(SOURCES, objects)]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(lambda command: _run(*command), commands))
        linked = Path(scratch) / "kernels.so"
        _run(compiler, "-shared", *map(str, objects), "-o", str(linked))  # without -fopenmp: no second OpenMP
        os.replace(linked, path)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took more than {_SECONDS} seconds for the native kernels") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        line = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
        raise BuildError(f"{command[0]} cannot compile the native kernels: {line}")


def _here() -> Path:
    return Path(__file__).parent
