"""ONNX folders: ``model.onnx`` that ONNX Runtime loads without Squeezoo, config and tokenizer or processor files.

Quantized GEMMs have integer weights and rounded inputs in the file (``onnx_graph.py``), so that ONNX Runtime multiplies
integers; 2:4 zeros are stored like other values, since no ONNX operator knows them. int8 embedding tables stay int8.
Batch and sequence may have any length; inputs and outputs have the names of the model's own forward pass. What was
written is run, where onnxruntime is installed, before it takes its place. On x86 CPUs without VNNI its kernels add
pairs of products in 16 bits and may saturate: the measured difference belongs to the machine that wrote the file.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.errors import brief
from ..models.folders import save_config
from .atomic import replaced_folder
from .compressed_tensors import ExportError
from .matrix import read_input, read_matrix, read_table
from .onnx_graph import INT4_BITS, Matrix, halve_floats_, put_matrices_
from .onnx_trace import Batch, mark_, scores, with_token_types, write_traced
from .runtime import use_int8_embeddings_, use_quantized_inputs_
from .runtime.embedding import Int8Table

if TYPE_CHECKING:
    from .checkpoint import Manifest

FILE = "model.onnx"
_PROTOBUF_LIMIT = 1 << 31  # bytes of one file; beyond, the tensors lie beside it


def save_onnx(
    model: nn.Module, processor: Any, manifest: Manifest, tensors: Mapping[str, Tensor], golden: Batch, out: Path
) -> list[str]:
    """Write the folder; returns in which ways it computes otherwise than the checkpoint, and what was measured.

    Args:
        model: the checkpoint's model with plain weights (backend ``dense``); it is used up. golden: an input for it.

    Raises:
        ExportError: onnx is not installed, a model that cannot be traced, or a file that gives other outputs.
    """
    check_target(out)
    matrices, tables = _read(manifest, tensors)
    batch = with_token_types(model, processor, golden)
    batches = (batch, _other_shape(batch, model))
    use_quantized_inputs_(model, {name: m.levels for name, m in matrices.items() if m.levels is not None})
    with torch.inference_mode():
        expected = [scores(model, each) for each in batches]
    replaced = use_int8_embeddings_(model, tables)
    with replaced_folder(out) as fresh:
        file = fresh / FILE
        shapes = {name: (m.w_OI.shape[0], m.w_OI.shape[1]) for name, m in matrices.items()}
        try:
            mark_(model, shapes, replaced)
            write_traced(model, batch, expected[0], file)
        except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
            raise ExportError(
                f"{type(model).__name__} cannot be traced into ONNX ({brief(error)}): export with --to dense instead"
            ) from error
        _rewrite(file, matrices, manifest)
        save_config(model, fresh)
        if processor is not None:
            processor.save_pretrained(fresh)
        proof = _proved(file, batches, expected, manifest)
    return [*_notes(model, matrices), proof]


def check_target(out: Path) -> None:
    """Refuse, before anything is computed, what would fail at the end.

    Raises:
        ExportError: onnx is not installed, or ``out`` holds something that is no model folder.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ExportError("export to ONNX needs the package onnx, which is not installed: pip install 'squeezoo[onnx]'")
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "config.json").is_file())):
        raise ExportError(f"{out} exists and is no model folder: give a new or an empty directory")


def _read(manifest: Manifest, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Matrix], dict[str, Int8Table]]:
    """The GEMMs with quantized weights or inputs, and the embedding tables; other GEMMs stay the model's own."""
    rest, matrices = dict(tensors), {}
    for gemm in manifest.plan.gemms:
        w_OI, scale_O = read_matrix(gemm, rest)
        levels = read_input(gemm, rest)
        if scale_O is not None or levels is not None:
            matrices[gemm.name] = Matrix(w_OI, scale_O, gemm.weight_bits, levels)
    tables = {table.name: Int8Table(table.name, *read_table(table, rest)) for table in manifest.plan.embeddings}
    return matrices, tables


def _other_shape(batch: Batch, model: Any) -> dict[str, Tensor]:
    """``batch`` with other lengths: three times the rows, a quarter more of padding (zeros) where there is room."""
    single = "input_ids" in batch and len(batch["input_ids"]) == 1  # decoders that classify without a padding token
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    found = {}
    for name, tensor in batch.items():
        rows = torch.cat([tensor] * (1 if single else 3))
        if rows.dim() == 2 and (room is None or 2 * rows.shape[1] <= room):
            rows = F.pad(rows, (0, rows.shape[1] // 4))
        found[name] = rows
    return found


def _rewrite(file: Path, matrices: Mapping[str, Matrix], manifest: Manifest) -> None:
    """Put the matrices into the traced file, with where it comes from, and check it against ONNX's own rules."""
    import onnx

    proto = onnx.load(file)
    for beside in file.parent.iterdir():
        beside.unlink()  # the traced file, and the tensors beside it of one that was too large
    put_matrices_(proto, matrices)
    halve_floats_(proto.graph)
    proto.producer_name, proto.producer_version = "squeezoo", manifest.libraries.get("squeezoo", "")
    sparsity = sorted({gemm.sparsity for gemm in manifest.plan.gemms if gemm.sparsity})
    said = {"name": manifest.name, "recipe": manifest.recipe.name, "sparsity": " ".join(sparsity)}
    onnx.helper.set_model_props(proto, {f"squeezoo.{key}": value for key, value in said.items() if value})
    large = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > 0.95 * _PROTOBUF_LIMIT
    onnx.save_model(proto, file, save_as_external_data=large, location=f"{FILE}.data" if large else None)
    onnx.checker.check_model(str(file), full_check=True)


def _proved(file: Path, batches: tuple[Batch, ...], expected: list[dict[str, Tensor]], manifest: Manifest) -> str:
    """A note with the largest difference of the file's outputs from the reference, relative to the largest output.

    Raises:
        ExportError: onnxruntime cannot run the file, or its outputs differ by more than the checkpoint's tolerance.
    """
    from .checkpoint import relative_distance
    from .verify import INT8_TOLERANCE, SENSITIVITY_FACTOR

    if importlib.util.find_spec("onnxruntime") is None:
        return "not run: onnxruntime is not installed (pip install 'squeezoo[onnx]')"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    allowed = max(INT8_TOLERANCE, SENSITIVITY_FACTOR * manifest.flip_sensitivity)
    version = f"onnxruntime {importlib.metadata.version('onnxruntime')}"
    distances = []
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for batch, outputs in zip(batches, expected, strict=True):
            found = session.run(list(outputs), {name: tensor.numpy() for name, tensor in batch.items()})
            pairs = zip(outputs.values(), map(torch.from_numpy, found), strict=True)
            distances.append(max(relative_distance(y.float(), x.float()) for x, y in pairs))
    except Exception as error:  # its errors have no common class of their own
        raise ExportError(f"{version} cannot run what was written ({brief(error)}); nothing was kept") from error
    if not max(distances) <= allowed:
        raise ExportError(
            f"in {version} the outputs differ from the reference by {distances[0]:.1e}, with other lengths of batch "
            f"and sequence by {distances[1]:.1e}, of the largest output; allowed {allowed:.1e}; nothing was kept: "
            "report this, and export with --to dense instead"
        )
    return (
        f"run with {version} on the golden input: outputs differ from the reference by {distances[0]:.1e} of the "
        f"largest at most; on another batch size and length by {distances[1]:.1e}"
    )


def _notes(model: Any, matrices: Mapping[str, Matrix]) -> list[str]:
    notes = []
    if not any(matrix.scale_O is not None for matrix in matrices.values()):
        notes.append("the recipe quantizes no weight: all weights are float, zeros included")
    if any(matrix.scale_O is not None and matrix.bits in INT4_BITS for matrix in matrices.values()):
        notes.append("weights of 2 to 4 bits lie in the file as int4, which onnxruntime reads from 1.23 on")
    if hasattr(model, "can_generate") and model.can_generate():
        notes.append("a plain forward pass without a cache of keys and values: whole sequences in, scores out")
    return notes
