"""How a checkpoint runs: the backends of ``load``, and which of them a machine allows."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Literal

import torch

from .plan import Plan
from .runtime import int8_supported
from .runtime.cuda_support import CudaError, cuda_capability

Backend = Literal["auto", "int8", "cuda", "reference", "dense"]
Resolved = Literal["int8", "cuda", "reference", "dense"]
Attention = Literal["auto", "float32"]


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, of another format, or cannot run here."""


def resolve_backend(backend: Backend, device: str, plan: Plan, recipe: str) -> Resolved:
    """The backend that a checkpoint runs with.

    Args:
        device: as PyTorch names it. recipe: its name, for errors.

    Raises:
        CheckpointError: another word, or a backend that this machine or this plan does not allow.
    """
    if backend not in ("auto", "int8", "cuda", "reference", "dense"):
        raise CheckpointError(f"unknown backend {backend!r}; allowed: auto, int8, cuda, reference, dense")
    if device.startswith("cuda") and backend != "int8":
        try:
            cuda_capability(device)
        except CudaError as error:
            absent = (torch.device(device).index or 0) >= torch.cuda.device_count()
            if backend == "cuda" or absent:
                raise CheckpointError(str(error)) from error
            if backend == "auto":
                _say_slower(str(error))
            return "dense" if backend == "dense" else "reference"
        return "cuda" if backend == "auto" else backend
    if backend == "cuda":
        raise CheckpointError(f"backend cuda runs on a CUDA device, not on {device}: write device='cuda'")
    if backend in ("reference", "dense"):
        return backend
    supported, reason = int8_supported()
    if not device.startswith("cpu"):
        supported, reason = False, f"the int8 backend runs on the CPU, not on {device}"
    quantized = any(gemm.input for gemm in plan.gemms)
    if not quantized:
        supported, reason = False, f"recipe {recipe} has no GEMM with quantized inputs"
    if backend == "int8" and not supported:
        raise CheckpointError(f"backend int8 cannot run: {reason}; use backend='reference'")
    if backend == "auto" and device.startswith("cpu") and not int8_supported()[0] and quantized:
        _say_slower(reason)
    return "int8" if supported else "reference"


@cache
def _say_slower(reason: str) -> None:
    """Once per process and reason."""
    warnings.warn(
        f"no fast kernels for this model here: {reason}. It runs as the float32 reference, a little slower than dense; "
        "backend='dense' is as fast as dense, with inputs not rounded",
        RuntimeWarning,
        stacklevel=4,
    )
