"""A trained model as packed tensors, and back.

Planned GEMMs and embedding tables take the forms of ``matrix.py``. Everything else keeps its own name: matrices in the
recipe's format, vectors in float32; tied tensors are stored once. Quantizers of attention maps lie under the names that
their compressors have in the attached model's state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.linear import stored_weight
from .attached import INPUT_QUANTIZER, compressed_weights, latent_OI, quantized_tables, quantizers
from .attention_map import ATTENTION_MAP, attention_maps
from .matrix import (
    Form,
    PackError,
    Tensors,
    form_of,
    read_input,
    read_matrix,
    read_table,
    store_input,
    store_matrix,
    store_table,
)
from .plan import Plan
from .quantizers import AbsmaxQuantizer, InputQuantization, Quantizer
from .runtime import Int8Table, QuantizedGemm
from .stages import Storage

__all__ = ["PackError", "Unpacked", "forms", "pack", "unpack", "without_tied"]


@dataclass(frozen=True)
class Unpacked:
    """The contents of a weight file.

    Args:
        state: plain state dict, float32, with the dense form of every GEMM that is not in ``gemms``; embedding tables
            are always in it.
        gemms: GEMMs with integer weights and quantized inputs, which a runtime can take as they are.
        inputs: levels of the quantized inputs of the GEMMs that are not in ``gemms``.
        tables: embedding tables as integers.
        maps: state dicts of the compressors of attention maps, by the attention module's name.
    """

    state: Tensors
    gemms: dict[str, QuantizedGemm] = field(default_factory=dict)
    inputs: dict[str, InputQuantization] = field(default_factory=dict)
    tables: dict[str, Int8Table] = field(default_factory=dict)
    maps: dict[str, Tensors] = field(default_factory=dict)


@torch.no_grad()
def pack(model: nn.Module, plan: Plan, storage: Storage) -> Tensors:
    """Packed tensors of an attached model; ``model`` is left as it is.

    Raises:
        PackError: a planned GEMM or attention map is not attached or not active, a quantizer was never calibrated or
            has no integers, or a mask that does not have its pattern.
    """
    attached = {name: (module, parametrization) for name, module, parametrization in compressed_weights(model)}
    inputs = {name.rpartition(".")[0]: quantizer for name, quantizer in quantizers(model)}
    tensors: Tensors = {}
    for gemm in plan.gemms:
        if gemm.name not in attached:
            raise PackError(f"{gemm.name} is planned but not attached to this model; call attach_(model, plan) first")
        module, parametrization = attached[gemm.name]
        w_OI, scale_O1 = latent_OI(module, parametrization).detach(), None
        if parametrization.quantizer is not None:
            w_OI, scale_O1 = _exported(gemm.name, parametrization.quantizer, w_OI)
        else:
            w_OI = w_OI.cpu().to(_float(storage.values, w_OI))
        if parametrization.mask_OI is not None:
            w_OI = w_OI * parametrization.mask_OI.cpu()
        tensors.update(store_matrix(gemm, w_OI, scale_O1))
        if gemm.input_owner is not None:
            _check_active(f"the input of {gemm.input_owner}", inputs[gemm.input_owner])
            tensors.update(store_input(gemm, inputs[gemm.input_owner].export()))
    tables = {name: parametrization.quantizer for name, _, parametrization in quantized_tables(model)}
    for table in plan.embeddings:
        weight = stored_weight(model.get_submodule(table.name))
        assert weight is not None
        quantizer = tables[table.name] if table.name in tables else _per_row(weight.detach(), table.bits)
        tensors.update(store_table(table, *_exported(table.name, quantizer, weight.detach())))
    _check_attention(model, plan)
    skip = {f"{table.name}.weight" for table in plan.embeddings}
    ours = tuple(f"{name}.parametrizations." for name in (*attached, *tables))  # Wav2vec2 has a weight norm of its own
    for name, tensor in model.state_dict().items():
        if name not in skip and not name.startswith(ours) and f".{INPUT_QUANTIZER}." not in name:
            tensor = tensor.detach().cpu().contiguous()
            matrix = tensor.is_floating_point() and tensor.ndim >= 2
            tensors[name] = tensor.to(_float(storage.other, tensor)) if matrix else tensor
    return _without_aliases(tensors)


def without_tied(tensors: Mapping[str, Tensor], rebuilt: nn.Module, plan: Plan) -> Tensors:
    """``tensors`` without the second names of parameters that the ``rebuilt`` model ties by itself.

    A parameter that is tied to a table of integers has no float form of its own: both modules use the integers.
    """
    first: dict[int, str] = {}
    parameters = dict(rebuilt.named_parameters(remove_duplicate=False))
    for table in plan.embeddings:
        first[id(parameters[f"{table.name}.weight"])] = f"{table.name}.weight"
    kept: Tensors = {}
    for name, tensor in tensors.items():
        if name not in parameters or first.setdefault(id(parameters[name]), name) == name:
            kept[name] = tensor
    return kept


def _check_attention(model: nn.Module, plan: Plan) -> None:
    attached = {name: compressor for name, _, compressor in attention_maps(model)}
    for planned in plan.attention:
        compressor = attached.get(planned.name)
        if compressor is None:
            raise PackError(f"{planned.name}: its attention map is planned but not attached to this model")
        if compressor.active != (planned.pattern is not None):
            raise PackError(f"{planned.name}: the plan keeps {planned.sparsity} of its map, but that was not activated")
        for side in ("q", "k", "p", "v"):
            if getattr(planned, side) is not None:
                _check_active(f"{side.upper()} of {planned.name}", getattr(compressor, side))


def _per_row(w_RD: Tensor, bits: int) -> Quantizer:
    """One symmetric scale per row, max|row| / Qp; a row of zeros has scale 1 (as D.6 for output channels)."""
    quantizer = AbsmaxQuantizer(bits, w_RD.shape[0])
    quantizer.init_from_weight_(w_RD)
    return quantizer


def _exported(name: str, quantizer: Quantizer, w_OI: Tensor) -> tuple[Tensor, Tensor]:
    _check_active(name, quantizer)
    try:
        found = quantizer.export(w_OI)
    except ValueError as error:
        raise PackError(f"{name}: {error}") from error
    return found.q_OI.cpu(), found.scale_O1.cpu().float()


def _check_active(name: str, quantizer: Quantizer) -> None:
    if not quantizer.active:
        raise PackError(f"{name} has a quantizer that was never calibrated: run the calibrate stage")


def _float(name: str, tensor: Tensor) -> torch.dtype:
    """float16 only where every value fits into its range; else the tensor stays float32."""
    fits = bool(tensor.abs().amax() < torch.finfo(torch.float16).max) if tensor.numel() else True
    return torch.float16 if name == "float16" and fits else torch.float32


def _without_aliases(tensors: Tensors) -> Tensors:
    """Copies of tensors that share memory, since a safetensors file holds each only once."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


@torch.no_grad()
def unpack(tensors: Mapping[str, Tensor], plan: Plan, *, keep_int8: bool) -> Unpacked:
    """Inverse of ``pack``.

    Args:
        keep_int8: hand GEMMs that a runtime can take to ``gemms`` instead of expanding them to float weights; they then
            have no entry in ``state``.

    Raises:
        PackError: a tensor is missing or has a shape or values that contradict the plan.
    """
    rest = dict(tensors)
    found = Unpacked({})
    for gemm in plan.gemms:
        w_OI, scale_O = read_matrix(gemm, rest)
        levels = read_input(gemm, rest)
        if keep_int8 and scale_O is not None and levels is not None:
            bias = rest.get(f"{gemm.name}.bias")
            bias_O = None if bias is None else bias.float()
            found.gemms[gemm.name] = QuantizedGemm(gemm.name, w_OI, scale_O, levels, bias_O)
            continue
        if levels is not None:
            found.inputs[gemm.name] = levels
        w_OI = w_OI.float() if scale_O is None else w_OI.float() * scale_O[:, None]
        found.state[f"{gemm.name}.weight"] = (w_OI if gemm.layout == "out_in" else w_OI.t()).contiguous()
    for table in plan.embeddings:
        quantized = Int8Table(table.name, *read_table(table, rest))
        found.tables[table.name] = quantized
        found.state[f"{table.name}.weight"] = quantized.dequantized()
    for planned in plan.attention:
        prefix = f"{planned.name}.{ATTENTION_MAP}."
        names = [name for name in rest if name.startswith(prefix)]
        if not names:
            raise PackError(f"the plan expects tensors {prefix}*, the weight file has none")
        found.maps[planned.name] = {name.removeprefix(prefix): rest.pop(name) for name in names}
    for name, tensor in rest.items():
        found.state[name] = tensor.float() if tensor.is_floating_point() else tensor
    return found


def forms(tensors: Mapping[str, Tensor], plan: Plan) -> tuple[Form, ...]:
    """How each planned matrix lies in a weight file: its form, number format, bytes, and what to know about it."""
    return tuple(form_of(gemm, tensors) for gemm in plan.gemms)
