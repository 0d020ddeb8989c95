"""Write a checkpoint in a form that other libraries load without Squeezoo.

* ``dense``: an ordinary transformers or timm folder with the compressed weights as plain numbers, zeros included.
* ``compressed-tensors``: a transformers folder with integer weights (``compressed_tensors.py``), for transformers and
  vLLM. The 2:4 zeros are stored like other values: no library reads packed N:M weights any more.
* ``onnx``: ``model.onnx`` with integer weights and rounded inputs (``onnx_export.py``), for ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..models.folders import load_processor, save_dense
from .checkpoint import GOLDEN, WEIGHTS, assemble, check_files, load_manifest, load_tensors
from .compressed_tensors import ExportError, save_compressed_tensors
from .onnx_export import check_target, save_onnx

__all__ = ["ExportError", "Exported", "export"]

Target = Literal["dense", "compressed-tensors", "onnx"]


@dataclass(frozen=True)
class Exported:
    """What ``export`` wrote: the folder, the form, and in which ways it computes otherwise than the checkpoint; for
    ONNX also how far its outputs are from the reference."""

    folder: Path
    to: str
    notes: tuple[str, ...]


def export(folder: str | Path, to: Target, out: str | Path) -> Exported:
    """Write a checkpoint as a folder for other libraries; ``folder`` is left as it is.

    Args:
        folder: a checkpoint. to: see the module. out: the folder to write; an older model folder there is replaced.

    Raises:
        CheckpointError: no checkpoint, or a damaged one. ExportError: the form cannot hold it; says which can.
        DenseError: ``out`` holds something that is no model folder.
    """
    if to not in get_args(Target):
        raise ExportError(f"unknown form {to!r}; allowed: {', '.join(get_args(Target))}")
    if to == "onnx":
        check_target(Path(out))
    manifest = load_manifest(folder)
    check_files(folder, manifest)
    tensors = load_tensors(Path(folder) / WEIGHTS)
    model = assemble(manifest.model, tensors, manifest.plan, "dense")
    processor = load_processor(folder)
    if to == "dense":
        save_dense(model, processor, out)
        notes = ["inputs of GEMMs are not rounded"] if any(gemm.input for gemm in manifest.plan.gemms) else []
    elif to == "onnx":
        golden = load_tensors(Path(folder) / GOLDEN)
        batch = {key.removeprefix("input."): value for key, value in golden.items() if key.startswith("input.")}
        notes = save_onnx(model, processor, manifest, tensors, batch, Path(out))
    else:
        notes = save_compressed_tensors(model, processor, manifest, tensors, Path(out))
    if manifest.plan.attention:
        notes.append("attention maps are dense and not quantized: no other library knows N:M maps")
    return Exported(Path(out), to, tuple(notes))
