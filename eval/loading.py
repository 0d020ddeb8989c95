"""How long a model takes to load and how much memory it needs, in fresh processes on named hardware."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .environment import device_name, library_versions
from .fields import checked_fields, require_bool, require_count, require_libraries, require_text
from .timing import Timing, is_positive, require_size

PACKAGE = __name__.partition(".")[0]
DENSE_LOADER = f"{PACKAGE}.models.dense:load_dense"


@dataclass(frozen=True)
class Loading:
    """Time from the call of the loader to the model on the device, with what it imports itself.

    Args:
        source, loader: what was loaded by which ``module:function``.
        device, dtype, threads, libraries: see `Speed`.
        first_seconds: in a process that finds no caches of this package, of PyTorch's compilers and of Triton.
        evicted: whether the operating system had been told to drop the files from its memory before.
        warm: milliseconds of later processes, which find both.
        import_seconds: median time before that, for PyTorch and the loader's module.
        repeats: number of warm loads.
    """

    source: str
    loader: str
    device: str
    dtype: str
    threads: int
    first_seconds: float
    evicted: bool
    warm: Timing
    import_seconds: float
    repeats: int
    libraries: Mapping[str, str]

    def __post_init__(self) -> None:
        require_text(self, "source", "loader", "device", "dtype")
        require_count(self, "threads", "repeats")
        require_bool(self, "evicted")
        require_libraries(self)
        if not isinstance(self.warm, Timing):
            raise ValueError(f"Loading: warm must be a Timing, got {self.warm!r}")
        for name in ("first_seconds", "import_seconds"):
            if not is_positive(getattr(self, name)):
                raise ValueError(f"Loading: {name} must be positive, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Loading:
        """Build from `to_dict`'s data. Raises ValueError naming unknown or missing keys."""
        values = checked_fields(cls, data)
        return cls(**{**values, "warm": Timing(**checked_fields(Timing, values["warm"]))})


@dataclass(frozen=True)
class Memory:
    """Memory of a process that loads a model and runs it, in bytes; the libraries' own share is ``baseline``.

    Args:
        source, loader: what was loaded by which ``module:function``.
        device, backend, dtype, threads, libraries, batch, sequence, image_size, audio_seconds: see `Speed`.
        tensors: of all parameters and buffers; kernels that pack weights at load may hold more, outside of tensors.
        baseline: resident before loading. loaded: after it, with what the loader imports; weights that are mapped from
            a file are resident only once they are used. load_peak: most while loading.
        run_peak: most while running ``repeats`` batches: what a process needs.
        cuda_loaded, cuda_peak: of PyTorch's allocator on the GPU; None on CPUs.
    """

    source: str
    loader: str
    device: str
    backend: str
    dtype: str
    threads: int
    batch: int
    sequence: int | None
    image_size: tuple[int, int] | None
    audio_seconds: float | None
    repeats: int
    tensors: int
    baseline: int
    loaded: int
    load_peak: int
    run_peak: int
    cuda_loaded: int | None
    cuda_peak: int | None
    libraries: Mapping[str, str]

    def __post_init__(self) -> None:
        require_text(self, "source", "loader", "device", "backend", "dtype")
        require_count(self, "threads", "batch", "repeats", "tensors", "baseline", "loaded", "load_peak", "run_peak")
        require_libraries(self)
        require_size(self)
        if (self.cuda_loaded is None) != (self.cuda_peak is None):
            raise ValueError("Memory: cuda_loaded and cuda_peak are both known or both None")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Memory:
        """Build from `to_dict`'s data. Raises ValueError naming unknown or missing keys."""
        return cls(**checked_fields(cls, data))


def measure_loading(
    source: str | Path,
    *,
    loader: str = DENSE_LOADER,
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    repeats: int = 5,
    timeout: float = 600.0,
) -> Loading:
    """Load a model once with empty caches and ``repeats`` times with what that left, each in a fresh process.

    Args:
        source: what the loader takes first. loader: ``module:function``, gives a module or something with a ``.model``.
        options: further keyword arguments of the loader.

    Raises:
        ValueError: fewer than 3 repeats. RuntimeError: a process failed; with the end of what it said.
    """
    if repeats < 3:
        raise ValueError(f"a median of loads needs at least 3 repeats, got {repeats}")
    with tempfile.TemporaryDirectory() as caches:
        evicted = _evict(Path(source))
        runs = [
            _probe(source, loader, options, device, threads, timeout, caches=Path(caches)) for _ in range(repeats + 1)
        ]
    first, *warm = runs
    return Loading(
        source=_name(source), loader=loader, device=_device(device, first), dtype=first["dtype"],
        threads=first["threads"], first_seconds=first["load_seconds"], evicted=evicted,
        warm=Timing.of([1000 * run["load_seconds"] for run in warm]),
        import_seconds=sorted(run["import_seconds"] for run in warm)[repeats // 2],
        repeats=repeats, libraries=library_versions(),
    )  # fmt: skip


def measure_memory(
    source: str | Path,
    *,
    batch: int,
    sequence: int | None = None,
    audio_seconds: float | None = None,
    loader: str = DENSE_LOADER,
    options: Mapping[str, Any] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    repeats: int = 3,
    timeout: float = 600.0,
) -> Memory:
    """Load a model in a fresh process and run ``repeats`` batches: resident memory and its peaks.

    Args:
        batch, sequence, audio_seconds: as `make_batch` takes them; images have the size that the model declares.

    Raises:
        RuntimeError: the process failed, or this system does not tell peaks (Linux does).
    """
    run = _probe(
        source, loader, options, device, threads, timeout,
        batch=batch, sequence=sequence, audio_seconds=audio_seconds, calls=repeats,
    )  # fmt: skip
    if not run["peak_resets"] or None in (run["before"], run["loaded"], run["ran"]):
        raise RuntimeError("peak memory is read from /proc/self/status, which this system does not have or not reset")
    return Memory(
        source=_name(source), loader=loader, device=_device(device, run), backend=run["backend"], dtype=run["dtype"],
        threads=run["threads"], batch=batch, sequence=None if run["image_size"] or audio_seconds else sequence,
        image_size=tuple(run["image_size"]) if run["image_size"] else None,
        audio_seconds=None if run["image_size"] else audio_seconds, repeats=repeats,
        tensors=run["tensors"], baseline=run["before"][0], loaded=run["loaded"][0], load_peak=run["loaded"][1],
        run_peak=run["ran"][1],
        cuda_loaded=run["cuda_loaded"], cuda_peak=run["cuda_peak"], libraries=library_versions(),
    )  # fmt: skip


def _probe(
    source: str | Path,
    loader: str,
    options: Mapping[str, Any] | None,
    device: str,
    threads: int | None,
    timeout: float,
    *,
    caches: Path | None = None,
    batch: int | None = None,
    sequence: int | None = None,
    audio_seconds: float | None = None,
    calls: int = 1,
) -> dict[str, Any]:
    request = {
        "loader": loader, "source": str(source), "options": dict(options or {}), "device": device, "threads": threads,
        "batch": batch, "sequence": sequence, "audio_seconds": audio_seconds, "calls": calls,
    }  # fmt: skip
    command = [sys.executable, "-m", f"{PACKAGE}.eval.probe", json.dumps(request)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, env=_environment(caches)
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"loading {source} took longer than {timeout:.0f} s") from error
    if done.returncode:
        raise RuntimeError(f"loading {source} in a fresh process failed: {done.stderr.strip()[-1500:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _environment(caches: Path | None) -> dict[str, str]:
    """This process's, with caches of kernels and compilers elsewhere; models stay where they are."""
    if caches is None:
        return dict(os.environ)
    from huggingface_hub.constants import HF_HOME

    moved = {"XDG_CACHE_HOME": "xdg", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return {**os.environ, "HF_HOME": HF_HOME, **{name: str(caches / folder) for name, folder in moved.items()}}


def _evict(source: Path) -> bool:
    """Ask the system to drop a model's files from its memory, so that the first load reads the disk."""
    files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else []
    if not files or not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # only what is on the disk can be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            return False
        finally:
            os.close(descriptor)
    return True


def _name(source: str | Path) -> str:
    """The last name of a folder, as cards never hold paths; other sources as they are."""
    return Path(source).resolve().name if Path(source).exists() else str(source)


def _device(device: str, run: Mapping[str, Any]) -> str:
    """The device with the number of threads that the process had."""
    if torch.device(device).type != "cpu":
        return device_name(device)
    threads = int(run["threads"])
    return f"{device_name('cpu').rpartition(' (')[0]} ({threads} thread{'s' if threads != 1 else ''})"
