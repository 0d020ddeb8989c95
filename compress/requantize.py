"""Replace the quantizers of an attached model: one recipe goes from INT8 to INT4 (Deep Compression, section 2.3.3)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .attached import INPUT_QUANTIZER, QuantizeInput, compressed_weights, latent, quantized_tables, quantizers
from .plan import Plan, PlanError, PlannedAttention, PlannedGemm
from .quantizers import Quantizer, input_quantizer, map_quantizer, weight_quantizer

SIDES = ("q", "k", "p", "v")


def hook_inputs_(
    modules: Mapping[str, nn.Module], gemms: Iterable[PlannedGemm], owned: Mapping[str, Quantizer]
) -> None:
    """Hang one quantizer per input tensor on the GEMMs that read it; ``owned``: by the name of its owner."""
    for gemm in gemms:
        if gemm.input is None or gemm.input_owner is None:
            continue
        owner, quantizer = modules[gemm.input_owner], owned[gemm.input_owner]
        if owner._modules.get(INPUT_QUANTIZER) is not quantizer:
            owner.add_module(INPUT_QUANTIZER, quantizer.to(_device(owner)))
        modules[gemm.name].register_forward_pre_hook(QuantizeInput(quantizer, gemm.input_owner == gemm.name))


def unhook_inputs_(modules: Iterable[nn.Module]) -> None:
    """Remove every input quantizer."""
    for module in list(modules):
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, QuantizeInput):
                del module._forward_pre_hooks[key]
        module._modules.pop(INPUT_QUANTIZER, None)


def requantize_(model: nn.Module, plan: Plan) -> None:
    """Give an attached model the quantizers of ``plan``. Masks and latent weights stay; new quantizers start inactive;
    a quantizer whose record is the same stays as it is.

    Raises:
        PlanError: the plan has other GEMMs, sparsities, tables or attention maps than are attached; nothing has
            changed.
    """
    attached = {name: (module, parametrization) for name, module, parametrization in compressed_weights(model)}
    _check_same("GEMMs", attached, (gemm.name for gemm in plan.gemms))
    for gemm in plan.gemms:
        found = attached[gemm.name][1].sparsity
        if (None if found is None else str(found)) != gemm.sparsity:
            raise PlanError(f"{gemm.name} is attached with sparsity {found}, the plan has {gemm.sparsity}")
    tables = (table.name for table in plan.embeddings if table.method != "absmax")
    _check_same("embedding tables", [name for name, *_ in quantized_tables(model)], tables)
    compressors = _attention_compressors(model)
    _check_same("attention maps", compressors, (site.name for site in plan.attention))

    weights = {
        gemm.name: None if gemm.weight is None else weight_quantizer(gemm.weight, gemm.shape, gemm.parts)
        for gemm in plan.gemms
        if _record(attached[gemm.name][1].quantizer) != gemm.weight
    }
    modules = dict(model.named_modules())
    owned: dict[str, Quantizer] = {}
    for gemm in plan.gemms:
        if gemm.input is not None and gemm.input_owner is not None and gemm.input_owner not in owned:
            old = modules[gemm.input_owner]._modules.get(INPUT_QUANTIZER)
            same = isinstance(old, Quantizer) and _record(old) == gemm.input
            owned[gemm.input_owner] = old if same and isinstance(old, Quantizer) else input_quantizer(gemm.input)
    maps = _map_quantizers(plan.attention, compressors)
    # Nothing below can fail.
    for name, new in weights.items():
        module, parametrization = attached[name]
        parametrization.quantizer = None if new is None else new.to(latent(module).device)
    unhook_inputs_(modules.values())
    hook_inputs_(modules, plan.gemms, owned)
    for compressor, side, new in maps:
        setattr(compressor, side, None if new is None else new.to(compressor.active_flag.device))
    for _, quantizer in quantizers(model):
        quantizer.train(model.training)


def _check_same(what: str, attached: Iterable[str], planned: Iterable[str]) -> None:
    have, want = set(attached), set(planned)
    if have != want:
        odd = sorted(have ^ want)[0]
        side = "in the plan only" if odd in want else "attached only"
        raise PlanError(f"the plan has other {what} than are attached: {odd} is {side}; attach_ a fresh copy instead")


def _attention_compressors(model: nn.Module) -> dict[str, Any]:
    from .attention_map import attention_maps

    return {name: compressor for name, _, compressor in attention_maps(model)}


def _map_quantizers(
    planned: Iterable[PlannedAttention], compressors: Mapping[str, Any]
) -> list[tuple[Any, str, Quantizer | None]]:
    """(compressor, side, its new quantizer) wherever the record differs."""
    found: list[tuple[Any, str, Quantizer | None]] = []
    for site in planned:
        compressor = compressors[site.name]
        if (None if compressor.pattern is None else str(compressor.pattern)) != site.sparsity:
            raise PlanError(f"{site.name} is attached with {compressor.pattern}, the plan has {site.sparsity}")
        for side in SIDES:
            record = getattr(site, side)
            if _record(getattr(compressor, side)) != record:
                found.append((compressor, side, None if record is None else map_quantizer(record, side)))
    return found


def _record(quantizer: nn.Module | None) -> Mapping[str, Any] | None:
    return quantizer.record if isinstance(quantizer, Quantizer) else None


def _device(module: nn.Module) -> Any:
    tensor = next(module.parameters(), None)
    return None if tensor is None else tensor.device
