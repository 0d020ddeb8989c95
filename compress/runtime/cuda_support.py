"""What a CUDA device can run: rules by compute capability, shape and dtype, and a trial by doing.

Facts: PyTorch's cuSPARSELt operators take int8 of (32, 32), float16 and bfloat16 of (16, 16) multiples and, on Hopper,
float8 of (32, 32); 2:4 tensor cores came with compute capability 8.0; ``_int_mm`` wants more than 16 rows and multiples
of 8. Shapes are padded to that (``cuda_layout.py``), so the rules here are about what pays or works at all.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, get_args

import torch

CudaBackend = Literal["sparse_int8", "dense_int8", "sparse_half", "dense_half", "sparse_fp8"]
CUDA_BACKENDS: tuple[CudaBackend, ...] = get_args(CudaBackend)
_HALF = (torch.float16, torch.bfloat16)


class CudaError(RuntimeError):
    """CUDA was asked for, and this machine or this PyTorch cannot run it. Nothing has been changed."""


def check_cuda(device: torch.device | str = "cuda") -> None:
    """Whether PyTorch can put tensors there, of any compute capability.

    Raises:
        CudaError: PyTorch without CUDA, or no such device.
    """
    if torch.version.cuda is None:
        raise CudaError(
            f"CUDA was asked for, but PyTorch {torch.__version__} is built without it: install a CUDA build of "
            "PyTorch, or use device='cpu'"
        )
    if not torch.cuda.is_available():
        raise CudaError(
            "CUDA was asked for, but PyTorch finds no CUDA device (driver, CUDA_VISIBLE_DEVICES?): use device='cpu'"
        )
    index = torch.device(device).index
    if index is not None and index >= torch.cuda.device_count():
        raise CudaError(f"expected a device below cuda:{torch.cuda.device_count()}, found {device}")


def cuda_capability(device: torch.device | str = "cuda") -> tuple[int, int]:
    """Compute capability of a device that the CUDA runtime can use.

    Raises:
        CudaError: PyTorch without CUDA, no such device, or a capability below 8.0.
    """
    check_cuda(device)
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        raise CudaError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, the CUDA runtime needs 8.0 "
            "(Ampere) or higher: use backend='reference' or 'dense'"
        )
    return major, minor


def supported(
    backend: CudaBackend,
    capability: tuple[int, int],
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    two_of_four: bool = True,
    quantized: bool = True,
) -> tuple[bool, str]:
    """Whether a device of this capability runs such a GEMM, and why (not). Pure rules; `works` tries.

    Args:
        shape: (out_features, in_features) of the weight. dtype: of the model's activations.
        two_of_four: the weight has at most 2 non-zeros in each 4 consecutive ones along in_features.
        quantized: weight and input are integers with scales.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in CUDA_BACKENDS:
        raise ValueError(f"expected one of {', '.join(CUDA_BACKENDS)}, found {backend!r}")
    out_features, in_features = shape
    kind, _, number = backend.partition("_")
    name = str(dtype).removeprefix("torch.")
    if capability < (8, 0):
        return False, f"compute capability {capability[0]}.{capability[1]}; the CUDA kernels need 8.0"
    if dtype not in (*_HALF, torch.float32):
        return False, f"expected a model in float16, bfloat16 or float32, found {name}"
    if number == "int8" and not quantized:
        return False, "the recipe does not quantize this GEMM"
    if number == "half" and dtype == torch.float32 and kind == "sparse":
        return False, "cuSPARSELt has no float32; choose dtype bfloat16 or float16"
    if number == "fp8" and capability < (9, 0):
        return False, f"float8 2:4 needs compute capability 9.0 (Hopper), found {capability[0]}.{capability[1]}"
    if kind == "sparse" and not two_of_four:
        return False, "its weight is not 2:4"
    if kind == "sparse" and (out_features % 8 or in_features % 16):
        return False, f"2:4 kernels need multiples of (8, 16), found ({out_features}, {in_features})"
    return True, f"{backend} on compute capability {capability[0]}.{capability[1]}"


@cache
def works(backend: CudaBackend, dtype: torch.dtype, device: str = "cuda") -> tuple[bool, str]:
    """Whether ``backend`` runs and adds up on this device. Tried by doing, once per process.

    Integer inputs make every sum exact in float32 too, so the results are compared exactly (16-bit ones after
    rounding).
    """
    from .cuda_layout import built
    from .cuda_ops import multiply

    if backend.startswith("sparse") and torch.version.cuda and not torch.backends.cusparselt.is_available():
        return False, f"PyTorch {torch.__version__} is built without cuSPARSELt"
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randint(-8, 9, (64, 64), generator=generator) * torch.tensor([1, 0, 0, 1]).repeat(16)
    x_TI = torch.randint(-8, 9, (20, 64), generator=generator)
    expected_TO = (x_TI @ weight_OI.t()).float()
    number = torch.int8 if backend.endswith("int8") else torch.float8_e4m3fn if backend.endswith("fp8") else dtype
    out_dtype = torch.int32 if backend.endswith("int8") else torch.float32 if backend.endswith("fp8") else dtype
    try:
        layout = built(backend, weight_OI.float().to(number), device)
        found_TO = multiply(layout, x_TI.float().to(number).to(device), out_dtype=out_dtype)
        exact = bool((found_TO.float().cpu() == expected_TO.to(out_dtype).float()).all())
    except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
        return False, f"{backend} fails here: {str(error).splitlines()[0]}"
    return (True, f"{backend} runs on {device}") if exact else (False, f"{backend} does not add up on {device}")


@cache
def fused_scales(dtype: torch.dtype, device: str = "cuda") -> tuple[bool, bool]:
    """Whether cuSPARSELt scales int8 sums per output channel into ``dtype``, and adds a float32 bias as well. By doing:
    the type that it expects of an int8 GEMM's bias is not documented. The sums reach past float16's largest number, the
    scaled ones do not, so a kernel that rounds before it scales is found out."""
    from .cuda_layout import built
    from .cuda_ops import multiply

    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randint(-127, 128, (64, 64), generator=generator) * torch.tensor([0, 1, 1, 0]).repeat(16)
    x_TI = torch.randint(-127, 128, (32, 64), generator=generator)
    x_TI[0] = weight_OI[0]  # a sum of squares: 182,273
    alpha_O = 2.0 ** torch.randint(-9, -5, (64,), generator=generator)
    bias_O = torch.randint(-9, 10, (64,), generator=generator).float()
    layout = built("sparse_int8", weight_OI.to(torch.int8), device)
    level_TI = x_TI.to(torch.int8).to(device)
    result = []
    for bias in (None, bias_O):
        expected_TO = (x_TI @ weight_OI.t()).float() * alpha_O + (0.0 if bias is None else bias)
        try:
            found_TO = multiply(
                layout, level_TI, alpha_O.to(device), None if bias is None else bias.to(device), out_dtype=dtype
            )
            result.append(bool((found_TO.float().cpu() == expected_TO.to(dtype).float()).all()))
        except (RuntimeError, TypeError):
            result.append(False)
    return result[0], result[0] and result[1]


def check_finite(x: torch.Tensor, what: str) -> None:
    """For debugging, since it waits for the device.

    Raises:
        ValueError: ``x`` holds NaN or infinity; says how many.
    """
    bad = int((~x.isfinite()).sum())
    if bad:
        raise ValueError(f"{what}: expected finite values, found {bad} of {x.numel()} that are NaN or infinite")
