"""The checkpoint folder: save and load (``verify.py`` proves one).

    squeezoo.json        format version, model, adapter, plan, resolved recipe, base, versions, sha256 of each file
    weights.safetensors  packed tensors (``pack.py``)
    golden.safetensors   an input and the output it must give
    config.json, tokenizer or preprocessor files of the base model

The weight file is not called ``model.safetensors`` on purpose: a library that does not know the format must fail loudly
instead of loading random weights. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models import adapter_named
from ..models.adapter import find_sites
from ..models.dense import build, describe, logits
from ..models.example import example_batch
from ..models.folders import save_config
from .atomic import recover_, replaced_folder, sha256
from .attention_doors import attach_attention_
from .backends import Attention, Backend, CheckpointError, Resolved, resolve_backend
from .pack import pack, unpack, without_tied
from .plan import Plan
from .quantizers import map_quantizer
from .recipe import Recipe
from .runtime import use_int8_, use_int8_embeddings_, use_quantized_inputs_
from .runtime.cuda import use_cuda_
from .runtime.cuda_source import CudaOptions
from .runtime.inputs import stretch_
from .runtime.lengths import limit_length_
from .runtime.nm_attention import use_nm_attention_
from .runtime.selection import select_kernels_
from .upgrade import FORMAT_VERSION, upgraded
from .versions import library_versions

MANIFEST, WEIGHTS, GOLDEN = "squeezoo.json", "weights.safetensors", "golden.safetensors"


@dataclass(frozen=True)
class Manifest:
    """Everything that ``squeezoo.json`` says.

    ``flip_sensitivity``: largest change of the golden output, relative to its largest value, when every input scale
    differs by a few millionths, so that a few activations round to the neighbouring step.
    """

    name: str
    model: dict[str, Any]
    plan: Plan
    recipe: Recipe
    base: dict[str, str | None]
    libraries: dict[str, str]
    training: tuple[dict[str, Any], ...] = ()
    flip_sensitivity: float = 0.0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        data = {key: value for key, value in vars(self).items()}
        data["plan"], data["recipe"] = self.plan.to_dict(), self.recipe.model_dump(mode="json")
        data["training"] = list(self.training)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        fields = dict(data)
        fields["plan"] = Plan.from_dict(data["plan"])
        fields["recipe"] = Recipe.parse(data["recipe"], where="the checkpoint's recipe")
        fields["training"] = tuple(data["training"])
        return cls(**fields)


def save_checkpoint(
    model: nn.Module,
    plan: Plan,
    recipe: Recipe,
    folder: str | Path,
    *,
    name: str,
    base: Mapping[str, str | None],
    processor: Any = None,
    training: tuple[dict[str, Any], ...] = (),
) -> Path:
    """Pack an attached model into ``folder``, whole or not at all; an old checkpoint there survives any failure.

    Raises:
        PackError: the model does not fit the plan. OSError: the disk (nothing has changed then).
    """
    folder = Path(folder)
    description = describe(model)
    tensors = without_tied(pack(model, plan, recipe.storage), build(description), plan)
    batch = example_batch(model)
    reference = assemble(description, tensors, plan, "reference")
    with torch.inference_mode():
        output = logits(reference, batch).float()
    sensitivity = _flip_sensitivity(reference, batch, output)
    golden = {**{f"input.{key}": value for key, value in batch.items()}, "output": output}
    with replaced_folder(folder) as fresh:
        save_file(tensors, fresh / WEIGHTS)
        save_file({key: value.contiguous() for key, value in golden.items()}, fresh / GOLDEN)
        save_config(model, fresh)
        if processor is not None:
            processor.save_pretrained(fresh)
        files = {
            file.relative_to(fresh).as_posix(): {"sha256": sha256(file), "bytes": file.stat().st_size}
            for file in sorted(fresh.rglob("*"))
            if file.is_file()
        }
        manifest = Manifest(
            name, description, plan, recipe, dict(base), library_versions(), training, sensitivity, files
        )
        (fresh / MANIFEST).write_text(json.dumps(manifest.to_dict(), indent=1) + "\n", encoding="utf-8")
    return folder


@torch.inference_mode()
def _flip_sensitivity(reference: nn.Module, batch: Mapping[str, Tensor], output: Tensor) -> float:
    """See `Manifest.flip_sensitivity`."""
    changes = [0.0]
    for factor in (1 - 1e-5, 1 - 3e-6, 1 + 3e-6, 1 + 1e-5):
        if not stretch_(reference, factor):
            break
        changes.append(relative_distance(logits(reference, batch).float(), output))
    stretch_(reference, 1.0)
    return max(changes)


def load_manifest(folder: str | Path) -> Manifest:
    """Read ``squeezoo.json``.

    Raises:
        CheckpointError: no such folder or manifest, not JSON, or written by a newer format.
    """
    folder = Path(folder)
    recover_(folder)
    path = folder / MANIFEST
    if not path.is_file():
        found = "the folder does not exist" if not folder.is_dir() else f"it holds no {MANIFEST}"
        raise CheckpointError(f"expected a Squeezoo checkpoint in {folder}, but {found}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["format_version"]
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}, this Squeezoo reads 1 to {FORMAT_VERSION}: upgrade Squeezoo"
            )
        return Manifest.from_dict(upgraded(data))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; get the checkpoint again") from error


def check_files(folder: str | Path, manifest: Manifest) -> None:
    """Compare every file with its recorded size and SHA-256.

    Raises:
        CheckpointError: names the file, what was expected and what was found.
    """
    for name, expected in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing from the checkpoint; get the checkpoint again")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{path} is damaged: expected {expected['bytes']:,} bytes with sha256 {expected['sha256']}, found "
                f"{size:,} bytes with sha256 {sha256(path)}; get the checkpoint again"
            )
        found = sha256(path)
        if found != expected["sha256"]:
            raise CheckpointError(
                f"{path} is damaged: expected sha256 {expected['sha256']}, found {found}; get the checkpoint again"
            )


def load(
    folder: str | Path,
    *,
    device: str = "cpu",
    backend: Backend = "auto",
    check: bool = True,
    attention: Attention = "auto",
    check_finite: bool = False,
) -> nn.Module:
    """The model of a checkpoint, ready for inference: a normal transformers / timm module in evaluation mode.

    Args:
        folder: a checkpoint folder.
        device: where the model runs.
        backend: ``int8`` replaces quantized GEMMs by integer kernels of the CPU; ``cuda`` replaces quantized and 2:4
            GEMMs by kernels of the GPU, all else in bfloat16; ``reference`` repeats the training-time arithmetic in
            float32; ``dense`` has the same weights as plain float32 and rounds no inputs, to compare speed with;
            ``auto`` takes ``int8`` or ``cuda`` where this machine has the kernels, and for each GEMM the kernel that
            was measured to be the fastest (`select_kernels_`: once per device, seconds, kept in the user's cache).
        check: compare every file with its SHA-256 first.
        attention: with ``int8``, ``auto`` lets fused blocks multiply in bfloat16 where the CPU does, as GPUs and other
            CPU engines do: its rounding moves some int8 inputs by one level, so single predictions differ from the
            reference's as those of another rounding would; ``float32`` keeps to the reference's.
        check_finite: with ``cuda``, refuse NaN and infinity in the input of any GEMM as ``int8`` always does, by a
            ValueError that names it; every GEMM then waits for the device. Without it the results are NaN.

    Raises:
        CheckpointError: damaged files, or a backend that cannot run here.
    """
    manifest = load_manifest(folder)
    if check:
        check_files(folder, manifest)
    tensors = load_tensors(Path(folder) / WEIGHTS)
    resolved = resolve_backend(backend, device, manifest.plan, manifest.recipe.name)
    if attention not in ("auto", "float32"):
        raise CheckpointError(f"unknown attention {attention!r}; allowed: auto, float32")
    model = assemble(manifest.model, tensors, manifest.plan, resolved, device, attention, check_finite).to(device)
    if backend == "auto":
        select_kernels_(model)
    limit_length_(model)
    return model


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; get the checkpoint again") from error


def assemble(
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    plan: Plan,
    backend: Resolved,
    device: str = "cpu",
    attention: Attention = "auto",
    check_finite: bool = False,
) -> nn.Module:
    """Build the module tree and fill it with the packed tensors.

    ``dense`` leaves out everything that is not plain weights: rounded inputs and N:M attention maps. ``device`` is
    where ``cuda`` puts the model. ``attention``, ``check_finite``: see `load`.

    Raises:
        PackError: tensors that contradict the plan. CheckpointError: tensors that the model lacks or does not know.
    """
    model = build(description)
    integer = backend in ("int8", "cuda")
    unpacked = unpack(tensors, plan, keep_int8=integer)
    sites = find_sites(model, adapter_named(plan.adapter)) if integer else None
    _fill_(model, unpacked.state, {f"{name}.weight" for name in unpacked.gemms})
    if backend == "dense":
        return model.eval()
    if sites is not None and backend == "cuda":
        pruned = [gemm.name for gemm in plan.gemms if gemm.sparsity and gemm.name not in unpacked.gemms]
        options = CudaOptions(device=device, check_finite=check_finite)
        use_cuda_(model, sites, unpacked.gemms, sparse=pruned, options=options)
    elif sites is not None:
        use_int8_(model, sites, unpacked.gemms, bfloat16_attention=attention == "auto")
        use_int8_embeddings_(model, unpacked.tables)
    use_quantized_inputs_(model, unpacked.inputs)
    if plan.attention:  # after the GEMMs: a door may hook the very modules that were replaced
        for name, compressor in attach_attention_(model, plan.attention, map_quantizer).items():
            compressor.load_state_dict(unpacked.maps[name])
        if backend == "cuda":
            use_nm_attention_(model)
    return model.eval()


def _fill_(model: nn.Module, state: Mapping[str, Tensor], replaced: Collection[str]) -> None:
    """Load a state dict in which only ``replaced`` and the second names of tied parameters may be missing."""
    result = model.load_state_dict(state, strict=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled = {id(parameter) for name, parameter in parameters.items() if name in state}
    missing = [
        name
        for name in sorted(set(result.missing_keys) - set(replaced))
        if name not in parameters or id(parameters[name]) not in filled
    ]
    if missing:
        raise CheckpointError(f"the weight file lacks {missing[0]} ({len(missing)} tensors missing)")
    if result.unexpected_keys:
        raise CheckpointError(f"the weight file has {result.unexpected_keys[0]}, which the model does not know")


def relative_distance(output: Tensor, golden: Tensor) -> float:
    """Largest difference relative to the largest golden value."""
    return float((output - golden).abs().amax() / golden.abs().amax().clamp_min(1e-12))
