"""A trained model as packed tensors, and back.

Tensors of one GEMM ``g`` (O out_features, C = ceil(I / M) * N kept values a row; without sparsity C = I):
    g.values       int8 [O, C], or uint8 rows of packed values below 8 bits, or float16 / float32 [O, C]
    g.index        uint8, rows of packed positions inside the groups of M (sparse GEMMs only)
    g.scale        float32 [O] (quantized GEMMs only)
    g.input_scale  float32 [] (quantized inputs only)
Everything else keeps its own name: matrices in the recipe's format, vectors in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attach import INPUT_QUANTIZER, compressed_weights, latent_OI, quantizers
from .packing import compress_nm, expand_nm, index_bits, pack_bits, unpack_bits
from .plan import Plan, PlannedGemm
from .quantizers import quantize_int8
from .runtime import QuantizedGemm
from .stages import Storage

Tensors = dict[str, Tensor]


class PackError(ValueError):
    """Tensors that do not fit the plan."""


@dataclass(frozen=True)
class Unpacked:
    """The contents of a weight file.

    Args:
        state: plain float32 state dict with the dense form of every GEMM that is not in ``int8``.
        int8: GEMMs with 8-bit inputs and integer weights, which a runtime can take as they are.
    """

    state: Tensors
    int8: dict[str, QuantizedGemm]


@torch.no_grad()
def pack(model: nn.Module, plan: Plan, storage: Storage) -> Tensors:
    """Packed tensors of an attached model; ``model`` is left as it is.

    Raises:
        PackError: a planned GEMM is not attached, or its quantizer was never calibrated.
    """
    attached = {name: (module, parametrization) for name, module, parametrization in compressed_weights(model)}
    inputs = {name.rpartition(".")[0]: quantizer for name, quantizer in quantizers(model)}
    tensors: Tensors = {}
    for gemm in plan.gemms:
        if gemm.name not in attached:
            raise PackError(f"{gemm.name} is planned but not attached to this model; call attach_(model, plan) first")
        module, parametrization = attached[gemm.name]
        w_OI = latent_OI(module, parametrization).detach().cpu()
        quantizer = parametrization.quantizer
        if quantizer is not None:
            if not quantizer.active:
                raise PackError(f"{gemm.name} has a quantizer that was never calibrated: run the calibrate stage")
            scale_O1 = quantizer.scale.detach().cpu()
            tensors[f"{gemm.name}.scale"] = scale_O1.flatten().clone()
            w_OI = quantize_int8(w_OI, scale_O1, quantizer.qp)
        else:
            w_OI = w_OI.to(_float(storage.values, w_OI))
        if parametrization.mask_OI is not None:
            w_OI = w_OI * parametrization.mask_OI.cpu()
        tensors.update(_pack_values(gemm, w_OI))
        if gemm.input_owner is not None:
            tensors[f"{gemm.name}.input_scale"] = inputs[gemm.input_owner].scale.detach().cpu().clone()
    for name, tensor in model.state_dict().items():
        if ".parametrizations." not in name and f".{INPUT_QUANTIZER}." not in name:
            tensor = tensor.detach().cpu().contiguous()
            matrix = tensor.is_floating_point() and tensor.ndim >= 2
            tensors[name] = tensor.to(_float(storage.other, tensor)) if matrix else tensor
    return _without_aliases(tensors)


def _pack_values(gemm: PlannedGemm, w_OI: Tensor) -> Tensors:
    tensors: Tensors = {}
    pattern = gemm.pattern
    if pattern is not None:
        w_OI, index_OC = compress_nm(w_OI, pattern)
        tensors[f"{gemm.name}.index"] = pack_bits(index_OC, index_bits(pattern))
    if gemm.weight_bits is not None and gemm.weight_bits < 8:
        w_OI = pack_bits((w_OI + (1 << (gemm.weight_bits - 1))).to(torch.uint8), gemm.weight_bits)
    tensors[f"{gemm.name}.values"] = w_OI.contiguous()
    return tensors


def _float(name: str, tensor: Tensor) -> torch.dtype:
    """float16 only where every value fits into its range; else the tensor stays float32."""
    fits = bool(tensor.abs().amax() < torch.finfo(torch.float16).max) if tensor.numel() else True
    return torch.float16 if name == "float16" and fits else torch.float32


def _without_aliases(tensors: Tensors) -> Tensors:
    """Copies of tensors that share memory (tied weights), since a safetensors file holds each only once."""
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
        keep_int8: hand GEMMs that a runtime can take to ``int8`` instead of expanding them to float weights; they then
            have no entry in ``state``.

    Raises:
        PackError: a tensor is missing or has a shape or values that contradict the plan.
    """
    rest = dict(tensors)
    state: Tensors = {}
    int8: dict[str, QuantizedGemm] = {}
    for gemm in plan.gemms:
        w_OI, scale_O = _unpack_values(gemm, rest)
        input_scale = rest.pop(f"{gemm.name}.input_scale", None)
        if keep_int8 and scale_O is not None and input_scale is not None and gemm.input_bits == 8:
            bias = rest.get(f"{gemm.name}.bias")
            int8[gemm.name] = QuantizedGemm(
                gemm.name, w_OI, scale_O, float(input_scale), None if bias is None else bias.float()
            )
            continue
        w_OI = w_OI.float() if scale_O is None else w_OI.float() * scale_O[:, None]
        state[f"{gemm.name}.weight"] = (w_OI if gemm.layout == "out_in" else w_OI.t()).contiguous()
    for name, tensor in rest.items():
        state[name] = tensor.float() if tensor.is_floating_point() else tensor
    return Unpacked(state, int8)


def input_scales(tensors: Mapping[str, Tensor], plan: Plan) -> dict[str, float]:
    """Scale of every quantized input, by GEMM name."""
    scales = {gemm.name: tensors.get(f"{gemm.name}.input_scale") for gemm in plan.gemms}
    return {name: float(scale) for name, scale in scales.items() if scale is not None}


def _unpack_values(gemm: PlannedGemm, tensors: Tensors) -> tuple[Tensor, Tensor | None]:
    """Integers or floats [O, I] and the scales [O] of one GEMM; takes its tensors out of ``tensors``."""
    needed = ["values"] + ["index"] * (gemm.sparsity is not None) + ["scale"] * (gemm.weight_bits is not None)
    missing = [f"{gemm.name}.{part}" for part in needed if f"{gemm.name}.{part}" not in tensors]
    if missing:
        raise PackError(f"the plan expects the tensor {missing[0]}, the weight file has none")
    values_OC = tensors.pop(f"{gemm.name}.values")
    pattern = gemm.pattern
    columns = gemm.shape[1] if pattern is None else -(-gemm.shape[1] // pattern.m) * pattern.n
    try:
        if gemm.weight_bits is not None and gemm.weight_bits < 8:
            offset = 1 << (gemm.weight_bits - 1)
            values_OC = (unpack_bits(values_OC, gemm.weight_bits, columns).to(torch.int16) - offset).to(torch.int8)
        if pattern is not None:
            index_OC = unpack_bits(tensors.pop(f"{gemm.name}.index"), index_bits(pattern), columns)
            values_OC = expand_nm(values_OC, index_OC, pattern, gemm.shape[1])
    except ValueError as error:
        raise PackError(f"{gemm.name}: {error}") from error
    if tuple(values_OC.shape) != gemm.shape:
        raise PackError(f"{gemm.name}: the plan expects shape {gemm.shape}, the weight file has {values_OC.shape}")
    return values_OC, tensors.pop(f"{gemm.name}.scale", None)
