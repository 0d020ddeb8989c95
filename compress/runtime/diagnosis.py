"""What the runtime can use on this machine, and why not: for ``squeezoo doctor``. JSON data, nothing is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from . import native
from .caches import readable_folders, user_cache, writable_folders
from .cpu import int8_supported
from .cuda_support import CUDA_BACKENDS, CudaError, cuda_capability, works
from .native.build import BuildError, built_library, find_compiler
from .native.library import NEEDED, missing_instructions
from .select_cache import PART
from .selection import VARIABLE, measuring
from .triton_support import triton_missing, triton_runs

Data = dict[str, Any]


def runtime_report() -> Data:
    """Each part by name: ``supported``, a ``note`` (how, or why not), and facts. It tries what it says, so the native
    kernels are compiled where they are not yet.

    ``int8``, ``native``: on the CPU. ``cuda``, ``triton``: on the first GPU. ``selection``: the folder of measured
    times. ``reference``: everywhere.
    """
    supported, note = int8_supported()
    return {
        "int8": {"supported": supported, "note": note},
        "native": _native(),
        "cuda": _cuda(),
        "triton": _triton(),
        "selection": _selection(),
        "reference": {"supported": True, "note": "float32, repeats the training-time arithmetic, a little slower"},
    }


def _native() -> Data:
    supported, note = native.available()
    compiler, library = None, None
    try:
        compiler = " ".join(find_compiler())
        library = built_library()
    except BuildError:
        pass  # ``note`` says it
    missing = missing_instructions()
    return {
        "supported": supported,
        "note": note,
        "compiler": compiler,
        "library": None if library is None else str(library),
        "instructions": [name for name in NEEDED if name not in missing],
        "missing_instructions": missing,
        "bfloat16_attention": supported and native.has_bfloat16(),
    }


def _cuda() -> Data:
    try:
        major, minor = cuda_capability()
    except CudaError as error:
        return {"supported": False, "note": str(error), "capability": None, "cusparselt": None, "kernels": {}}
    sparse = torch.backends.cusparselt
    tried = {name: works(name, torch.bfloat16) for name in CUDA_BACKENDS if name != "sparse_fp8" or major >= 9}
    return {
        "supported": True,
        "note": f"compute capability {major}.{minor}",
        "capability": f"{major}.{minor}",
        "cusparselt": sparse.version() if sparse.is_available() else None,
        "kernels": {name: runs or why for name, (runs, why) in tried.items()},
    }


def _triton() -> Data:
    if missing := triton_missing():
        return {"supported": False, "note": missing}
    if not torch.cuda.is_available():
        return {"supported": False, "note": "installed, but PyTorch finds no CUDA device"}
    supported, note = triton_runs("cuda")
    return {"supported": supported, "note": note}


def _selection() -> Data:
    usual = user_cache(PART)
    folder: Path | None = next(writable_folders(PART), None)
    tables = sum(1 for found in readable_folders(PART) for _ in found.glob("*.json"))
    note = f"{tables} tables; ${VARIABLE} is {measuring()}"
    if folder is None:
        note = "no folder can be written: every load measures anew"
    elif folder != usual:
        note = f"{usual or 'a home folder'} cannot be written; {note}"
    return {
        "supported": folder is not None,
        "note": note,
        "folder": None if folder is None else str(folder),
        "writable": folder == usual,
    }
