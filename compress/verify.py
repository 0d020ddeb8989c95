"""Prove a checkpoint: every hash, then the golden output with each backend that this machine has."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.dense import logits
from .backends import CheckpointError, Resolved, resolve_backend
from .checkpoint import GOLDEN, WEIGHTS, assemble, check_files, load_manifest, load_tensors, relative_distance
from .runtime import int8_supported

# The reference repeats the arithmetic that made the golden output; on another CPU the order of float sums differs. The
# integer backend also rounds GELU and scales differently, by some 1e-6. Either now and then moves an activation over a
# rounding boundary of the next quantizer: by one step (1/127 of the range) in one of thousands of summands. A model
# that was never trained with its quantizers amplifies such steps; how much is measured when it is saved.
REFERENCE_TOLERANCE = 1e-3
INT8_TOLERANCE = 5e-2
SENSITIVITY_FACTOR = 3


@dataclass(frozen=True)
class Verification:
    """What ``verify`` measured: largest difference to the golden output, relative to its largest value."""

    name: str
    files: int
    reference_error: float
    int8_error: float | None
    int8_reason: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(folder: str | Path) -> Verification:
    """Prove a checkpoint: every hash, then the golden output with each backend that this machine has.

    Raises:
        CheckpointError: a damaged file, or an output that differs by more than the tolerance.
    """
    manifest = load_manifest(folder)
    check_files(folder, manifest)
    tensors = load_tensors(Path(folder) / WEIGHTS)
    golden = load_tensors(Path(folder) / GOLDEN)
    batch = {key.removeprefix("input."): value for key, value in golden.items() if key.startswith("input.")}

    def error(backend: Resolved, tolerance: float) -> float:
        with torch.inference_mode():
            output = logits(
                assemble(manifest.model, tensors, manifest.plan, backend, attention="float32"), batch
            ).float()
        distance = relative_distance(output, golden["output"])
        if not distance <= tolerance:
            raise CheckpointError(
                f"{folder}: the {backend} backend is {distance:.2e} off the golden output, allowed {tolerance:.2e}; "
                "the files are intact, so report this with the output of `squeezoo doctor`"
            )
        return distance

    flips = SENSITIVITY_FACTOR * manifest.flip_sensitivity
    reference_error = error("reference", max(REFERENCE_TOLERANCE, flips))
    runnable = resolve_backend("auto", "cpu", manifest.plan, manifest.recipe.name) == "int8"
    reason = (
        ""
        if runnable
        else "not run: " + (int8_supported()[1] if not int8_supported()[0] else "no GEMM with quantized inputs")
    )
    int8_error = error("int8", max(INT8_TOLERANCE, flips)) if runnable else None
    return Verification(manifest.name, len(manifest.files), reference_error, int8_error, reason)
