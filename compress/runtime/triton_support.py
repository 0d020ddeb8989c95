"""Whether Triton kernels run here. Triton comes with PyTorch's CUDA builds for Linux; nothing imports it before it is
needed."""

from __future__ import annotations

from functools import cache

import torch


@cache
def triton_missing() -> str:
    """Why Triton cannot be used, empty if it can."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed ({error}); install the package triton (Linux)"
    if not hasattr(triton, "jit"):
        return f"the installed triton {getattr(triton, '__version__', '')} has no jit"
    return ""


def interpreting() -> bool:
    """Whether Triton was told to interpret its kernels on the CPU (TRITON_INTERPRET=1, for tests)."""
    if triton_missing():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def triton_runs(device: torch.device | str) -> tuple[bool, str]:
    """Whether Triton runs kernels on tensors of ``device``, and why (not)."""
    if missing := triton_missing():
        return False, missing
    device = torch.device(device)
    if device.type == "cuda":
        if torch.version.cuda is None:
            return False, "this build of PyTorch has no CUDA"
        return _capability(device.index)
    if device.type == "cpu" and interpreting():
        return True, "Triton's interpreter"
    return False, f"Triton compiles for CUDA, not for {device.type}"


@cache
def _capability(index: int | None) -> tuple[bool, str]:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return False, f"compute capability {major}.{minor}; the kernels need 8.0"
    return True, f"Triton on compute capability {major}.{minor}"
