"""Attach N:M and quantized attention maps to a model, through the door that each library leaves open.

A door is a function ``door_<library>(module)`` that knows one library's attention modules by their class. It returns
None for modules that are not its own, and a `Door` otherwise, having checked that it can be opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import nn

from .attention_fairseq import door_fairseq
from .attention_hooks import AttentionDoorError, Door
from .attention_map import ATTENTION_MAP, AttentionMapCompressor, attention_maps
from .attention_megatron import door_megatron
from .attention_timm import door_timm
from .attention_transformers import door_transformers, route_, routed_models, unroute_
from .masks import Pattern

DOORS: tuple[Callable[[nn.Module], Door | None], ...] = (door_transformers, door_timm, door_fairseq, door_megatron)
_KNOWN = (
    "transformers attention modules that call its AttentionInterface, timm.layers.Attention, fairseq's "
    "MultiheadAttention, Megatron's DotProductAttention"
)
MakeQuantizer = Callable[[Any, str], nn.Module]


class MapSpec(Protocol):
    """What is to be done to one attention map; ``PlannedAttention`` is one. ``sparsity``: "N:M" or None; ``q``, ``k``,
    ``p``, ``v``: whatever ``make_quantizer`` understands, or None."""

    @property
    def name(self) -> str: ...
    @property
    def sparsity(self) -> str | None: ...
    @property
    def renormalize(self) -> bool: ...
    @property
    def q(self) -> Any: ...
    @property
    def k(self) -> Any: ...
    @property
    def p(self) -> Any: ...
    @property
    def v(self) -> Any: ...


def attach_attention_(
    model: nn.Module, planned: Iterable[MapSpec], make_quantizer: MakeQuantizer | None = None
) -> dict[str, AttentionMapCompressor]:
    """Put an `AttentionMapCompressor` on each planned attention module; outputs do not change until they are activated.

    transformers models compute their maps explicitly from then on (not with ``sdpa``), so that they can be changed.

    Args:
        planned: one record per map, e.g. ``plan.attention``; ``name`` is the attention module's full name.
        make_quantizer: called with a record's ``q``, ``k``, ``p`` or ``v`` and that letter for each that is not None.

    Returns:
        The compressors by module name.

    Raises:
        AttentionDoorError: a name that the model does not have or that is attached already, an attention class without
            a door, or one that cannot be opened. The model is untouched then.
        ValueError: a pattern that is none.
    """
    planned = list(planned)
    modules = dict(model.named_modules())
    doors = [_door(modules, spec.name) for spec in planned]
    _check_names(modules, planned)
    if make_quantizer is None and (spec := next((s for s in planned if any((s.q, s.k, s.p, s.v))), None)):
        raise AttentionDoorError(f"{spec.name}: the plan quantizes this attention map; pass make_quantizer")
    models = routed_models(model, [modules[spec.name] for spec, door in zip(planned, doors) if door.routed])
    compressors = [_compressor(spec, make_quantizer).to(_device(modules[spec.name], model)) for spec in planned]
    with ExitStack() as undo:
        for spec, door, compressor in zip(planned, doors, compressors):
            module = modules[spec.name]
            module.add_module(ATTENTION_MAP, compressor)
            undo.callback(module._modules.pop, ATTENTION_MAP, None)
            door.open_(compressor)
            undo.callback(door.close_, compressor)
            compressor.train(module.training)
        if models:
            undo.callback(unroute_, model)
            route_(models)
        undo.pop_all()
    return {spec.name: compressor for spec, compressor in zip(planned, compressors)}


def detach_attention_(model: nn.Module) -> None:
    """Remove every attention compressor and put back what the doors changed: the model computes as before."""
    for _, module, compressor in list(attention_maps(model)):
        door = _door({"": module}, "")
        door.close_(compressor)
        del module._modules[ATTENTION_MAP]
    unroute_(model)


def _door(modules: dict[str, nn.Module], name: str) -> Door:
    if name not in modules:
        raise AttentionDoorError(f"the plan names the attention module {name!r}; this model has no such module")
    module = modules[name]
    for door in DOORS:
        if (found := door(module)) is not None:
            return found
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    inner = [f"{name}.{child}" for child, m in module.named_modules() if child and any(door(m) for door in DOORS)]
    hint = f" Its child {inner[0]!r} has a door: name that one." if inner else ""
    raise AttentionDoorError(f"{name}: no door to the attention map of {kind}. There are doors for {_KNOWN}.{hint}")


def _check_names(modules: dict[str, nn.Module], planned: list[MapSpec]) -> None:
    seen: set[int] = set()
    for spec in planned:
        module = modules[spec.name]
        if ATTENTION_MAP in module._modules:
            raise AttentionDoorError(f"{spec.name}: its attention map is attached already; detach_attention_ it first")
        if id(module) in seen:
            raise AttentionDoorError(f"{spec.name}: the plan names this attention module twice")
        seen.add(id(module))


def _compressor(spec: MapSpec, make_quantizer: MakeQuantizer | None) -> AttentionMapCompressor:
    pattern = None if spec.sparsity is None else Pattern.parse(str(spec.sparsity))
    quantizers = {
        which: make_quantizer(record, which)
        for which in ("q", "k", "p", "v")
        if make_quantizer is not None and (record := getattr(spec, which)) is not None
    }
    return AttentionMapCompressor(pattern, bool(spec.renormalize), **quantizers)


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    """Where the map is computed: Megatron's attention has no parameter of its own, so the model is asked next."""
    tensor = next(module.parameters(), None)
    tensor = next(model.parameters(), None) if tensor is None else tensor
    return torch.device("cpu") if tensor is None else tensor.device
