"""What a number was measured on: library versions, processor and its features, GPU."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = (
    "squeezoo", "torch", "transformers", "tokenizers", "timm", "datasets", "scikit-learn", "scipy", "numpy",
    "sacrebleu", "rouge-score", "jiwer", "seqeval", "soundfile", "pillow", "pyctcdecode", "kenlm",
)  # fmt: skip
# the features that decide which int8 and bf16 kernels a CPU can run (x86, then Arm)
CPU_FEATURES = (
    "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for name in LIBRARIES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return tuple(found)


def library_versions() -> dict[str, str]:
    """Version of Python and of each installed library that a number can depend on."""
    return dict(_versions())


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of ``/proc/cpuinfo``; empty where there is no such file."""
    fields: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return fields
    for line in text.split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return fields


def cpu_name() -> str:
    """The processor as it names itself, e.g. ``AMD EPYC 9554``; the machine type where nothing better is known."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine() or "unknown CPU"


def cpu_features() -> list[str]:
    """Those of `CPU_FEATURES` that this processor reports."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [name for name in CPU_FEATURES if name in flags]


def device_name(device: str | torch.device = "cpu") -> str:
    """The hardware behind a torch device, e.g. ``AMD EPYC 9554 (2 threads)`` or ``NVIDIA A100-SXM4-80GB``."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{cpu_name()} ({threads} thread{'s' if threads != 1 else ''})"
    return f"{device.type} of {platform.platform()}"


def environment() -> dict[str, Any]:
    """Everything above as JSON data: ``libraries``, ``platform``, ``cpu``, ``memory_bytes`` (None where unknown),
    ``cuda`` (versions of CUDA, cuDNN and cuSPARSELt, None in a build without), ``gpus`` (empty without any)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "libraries": library_versions(),
        "platform": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "features": cpu_features(),
            "cores": affinity,
            "threads": torch.get_num_threads(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
        },
        "memory_bytes": _memory_bytes(),
        "cuda": _cuda_versions(),
        "gpus": [
            {
                "name": torch.cuda.get_device_name(index),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
                "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
                "multiprocessors": torch.cuda.get_device_properties(index).multi_processor_count,
            }
            for index in range(torch.cuda.device_count())
        ],
    }


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cuda_versions() -> dict[str, Any] | None:
    """Of the libraries that this PyTorch brings; cuSPARSELt decides whether 2:4 kernels exist."""
    if torch.version.cuda is None:
        return None
    sparse = torch.backends.cusparselt
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cusparselt": sparse.version() if sparse.is_available() else None,
    }
