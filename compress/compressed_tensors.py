"""compressed-tensors folders, written by hand: config.json and one safetensors file, no dependency on the library.

Per quantized ``nn.Linear`` X:
    int-quantized (8-bit weights and inputs): X.weight int8 [O, I], X.weight_scale [O, 1]; static inputs X.input_scale
        [1], asymmetric ones X.input_zero_point int8 [1] (levels -128..127)
    pack-quantized (everything else, weights only): X.weight_packed int32 [O, ceil(I bits / 32)], plus 2^(bits-1) and
        least significant bit first; X.weight_scale [O, 1]; X.weight_shape int64 [2]
Facts of the format: compressed-tensors 0.20, transformers 5.23, vLLM 0.33. ``quantization_status`` must be
"compressed" (else transformers loads random weights), ``sparsity_config`` must be absent (vLLM refuses it), and tensors
must have the names of the architecture's checkpoints, which for ViT are not those of its modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models.quiet import quiet
from .atomic import replaced_folder
from .matrix import read_input, read_matrix
from .packing import pack_bits
from .plan import PlannedGemm
from .quantizers import InputQuantization

if TYPE_CHECKING:
    from .checkpoint import Manifest

VERSION = "0.20.0"
INT, PACK = "int-quantized", "pack-quantized"


class ExportError(ValueError):
    """A checkpoint that the asked form cannot hold."""


def save_compressed_tensors(
    model: nn.Module, processor: Any, manifest: Manifest, tensors: Mapping[str, Tensor], out: Path
) -> list[str]:
    """Write the folder; returns in which ways it computes otherwise than the checkpoint.

    Args:
        model: the checkpoint's model with plain weights (backend ``dense``).

    Raises:
        ExportError: a model or a plan that the format cannot hold.
    """
    gemms = [gemm for gemm in manifest.plan.gemms if gemm.weight is not None]
    _check(model, manifest, gemms, out)
    rest = dict(tensors)
    state = {name: _as_stored(tensor, tensors.get(name)) for name, tensor in model.state_dict().items()}
    schemes: dict[str, dict[str, Any]] = {}
    for gemm in gemms:
        q_OI, scale_O = read_matrix(gemm, rest)
        assert scale_O is not None
        levels = read_input(gemm, rest)
        del state[f"{gemm.name}.weight"]
        scheme = _scheme(gemm, scale_O, levels)
        schemes[gemm.name] = scheme
        for part, tensor in _stored(q_OI, scale_O, scheme, levels).items():
            state[f"{gemm.name}.{part}"] = tensor
    with replaced_folder(out) as fresh, quiet():
        # The library's own writer gives the tensors the names that its loader expects.
        model.save_pretrained(fresh, state_dict=state)  # type: ignore[operator]
        if processor is not None:
            processor.save_pretrained(fresh)
        path = fresh / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["dtype"] = "float32"  # what is stored in float16 becomes float32 again
        config["quantization_config"] = quantization_config(model, schemes)
        config["squeezoo"] = {
            "name": manifest.name,
            "recipe": manifest.recipe.name,
            "sparsity": {gemm.name: gemm.sparsity for gemm in manifest.plan.gemms if gemm.sparsity},
        }
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return _notes(gemms, schemes)


def quantization_config(model: nn.Module, schemes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The entry of config.json: one group per distinct scheme, and every linear that has none under ``ignore``."""
    groups: list[dict[str, Any]] = []
    for name, scheme in schemes.items():
        group = next((g for g in groups if {**g, "targets": None} == {**scheme, "targets": None}), None)
        if group is None:
            group = {**scheme, "targets": []}
            groups.append(group)
        group["targets"].append(name)
    if len(groups) == 1:
        groups[0]["targets"] = ["Linear"]
    ignore = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in schemes]
    formats = {group["format"] for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": _with_checkpoint_names(model, ignore),
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "kv_cache_scheme": None,
        "version": VERSION,
    }


def _check(model: nn.Module, manifest: Manifest, gemms: list[PlannedGemm], out: Path) -> None:
    dense = "export with --to dense instead"
    if manifest.model["library"] != "transformers":
        raise ExportError(f"compressed-tensors is a format of transformers, this is a timm model: {dense}")
    if not gemms:
        raise ExportError(
            f"recipe {manifest.recipe.name} quantizes no weight, so there is nothing to store as integers: {dense}"
        )
    for gemm in gemms:
        if not isinstance(model.get_submodule(gemm.name), nn.Linear):
            kind = type(model.get_submodule(gemm.name)).__name__
            raise ExportError(
                f"{gemm.name} is a {kind}; compressed-tensors holds nn.Linear only and would load random weights for "
                f"it: {dense}"
            )
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "config.json").is_file())):
        raise ExportError(f"{out} exists and is no model folder: give a new or an empty directory")


def _scheme(gemm: PlannedGemm, scale_O: Tensor, levels: InputQuantization | None) -> dict[str, Any]:
    """One config group without its targets."""
    integer = gemm.weight_bits == 8 and levels is not None and levels.bits == 8
    constant = integer and bool((scale_O == scale_O[0]).all())
    weights = _numbers(gemm.weight_bits or 8, True, "tensor" if constant else "channel", False)
    inputs = None
    if integer and levels is not None:
        # A range per token instead of one per call is finer, and the dynamic form that vLLM has kernels for.
        dynamic = levels.kind == "dynamic"
        inputs = _numbers(8, levels.qmin < 0, "token" if dynamic else "tensor", dynamic)
    return {
        "targets": None,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": INT if integer else PACK,
    }


def _numbers(bits: int, symmetric: bool, strategy: str, dynamic: bool) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "dynamic": dynamic}


def _stored(
    q_OI: Tensor, scale_O: Tensor, scheme: Mapping[str, Any], levels: InputQuantization | None
) -> dict[str, Tensor]:
    if scheme["format"] == PACK:
        return {
            "weight_packed": pack_to_int32(q_OI, scheme["weights"]["num_bits"]),
            "weight_scale": scale_O[:, None].clone(),
            "weight_shape": torch.tensor(q_OI.shape, dtype=torch.int64),
        }
    scale = scale_O[:1].clone() if scheme["weights"]["strategy"] == "tensor" else scale_O[:, None].clone()
    found = {"weight": q_OI, "weight_scale": scale}
    if levels is not None and levels.scale is not None and levels.zero_point is not None:
        found["input_scale"] = torch.tensor([levels.scale])
        if levels.qmin == 0:
            found["input_zero_point"] = torch.tensor([levels.zero_point - 128], dtype=torch.int8)
    return found


def pack_to_int32(q_OI: Tensor, bits: int) -> Tensor:
    """int8 [O, I] of ``bits`` bits -> int32 [O, ceil(I * bits / 32)]: plus 2^(bits-1), least significant bit first."""
    packed_OB = pack_bits((q_OI.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8), bits)
    packed_OB = torch.nn.functional.pad(packed_OB, (0, -packed_OB.shape[1] % 4)).contiguous()
    return packed_OB.view(torch.int32)  # four bytes, low one first, on every machine that PyTorch runs on


def _as_stored(tensor: Tensor, found: Tensor | None) -> Tensor:
    """In the number format of the checkpoint's own weight file."""
    return tensor.to(found.dtype) if found is not None and found.is_floating_point() else tensor


def _with_checkpoint_names(model: nn.Module, names: list[str]) -> list[str]:
    """Names of modules, and those that checkpoints have for the same modules where they differ."""
    from transformers.core_model_loading import revert_weight_conversion

    stored = revert_weight_conversion(model, {f"{name}.weight": torch.empty(0) for name in names})  # type: ignore[arg-type]
    return list(dict.fromkeys([*names, *(key.removesuffix(".weight") for key in stored)]))


def _notes(gemms: list[PlannedGemm], schemes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = []
    floats = [g for g in gemms if g.input is not None and schemes[g.name]["input_activations"] is None]
    if floats:
        notes.append(f"inputs of {len(floats)} GEMMs are not rounded: no reader has kernels for their widths")
    inputs = [schemes[g.name]["input_activations"] for g in gemms if g.input is not None]
    if any(i is not None and i["symmetric"] and not i["dynamic"] for i in inputs):
        notes.append("inputs are cut off at level -128, not at -127 as in training: single outputs may differ")
    if any(g.input is not None and g.input["method"] == "dynamic" for g in gemms):
        notes.append("dynamic inputs take their range per token, not per call")
    if odd := sorted({bits for g in gemms if (bits := g.weight_bits) not in (4, 8) and bits is not None}):
        widths = " and ".join(str(bits) for bits in odd)
        notes.append(f"weights of {widths} bits need compressed-tensors 0.20 or newer, and have no kernels in vLLM")
    return notes
