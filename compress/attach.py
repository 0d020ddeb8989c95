"""Attach a plan to a model as parametrizations and input hooks, and fold the effect back into plain weights.

What an attached model carries is described in ``attached.py``; masks are filled by ``magnitude.py`` and others.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..models.fairseq_build import call_projections_
from .attached import (
    INPUT_QUANTIZER,
    CompressedWeight,
    QuantizedTable,
    QuantizeInput,
    compressed_weights,
    deactivate_,
    latent,
    latent_OI,
    parameters_without_decay,
    quantized_tables,
    quantizers,
)
from .magnitude import MaskError, inherit_masks_, magnitude_masks_, prune_
from .plan import Plan, PlanError, PlannedEmbedding, PlannedGemm
from .quantizers import input_quantizer, map_quantizer
from .requantize import hook_inputs_, requantize_, unhook_inputs_
from .untie import untie_

__all__ = [
    "INPUT_QUANTIZER",
    "CompressedWeight",
    "MaskError",
    "QuantizeInput",
    "QuantizedTable",
    "attach_",
    "compressed_weights",
    "deactivate_",
    "fold_",
    "inherit_masks_",
    "latent",
    "latent_OI",
    "magnitude_masks_",
    "parameters_without_decay",
    "prune_",
    "quantized_tables",
    "quantizers",
    "requantize_",
    "untie_",
]


def attach_(model: nn.Module, plan: Plan) -> None:
    """Add masks and quantizers to ``model`` in place; outputs do not change until a stage fills them.

    A tied final projection that the plan unties gets a matrix of its own first.

    Raises:
        PlanError: a planned GEMM or table is missing, has another shape, or is attached already.
        AttentionDoorError: an attention map that cannot be reached. The model is untouched in both cases.
    """
    modules = dict(model.named_modules())
    for gemm in plan.gemms:
        _check(modules, gemm)
    tables = [table for table in plan.embeddings if table.method != "absmax"]  # absmax is how a table is stored
    for table in tables:
        _check_table(modules, table)
    weights = [CompressedWeight(gemm, _weight(modules[gemm.name]).device) for gemm in plan.gemms]
    tabled = [QuantizedTable(table, _weight(modules[table.name]).device) for table in tables]
    owned = {gemm.input_owner: input_quantizer(gemm.input) for gemm in plan.gemms if gemm.input and gemm.input_owner}
    if plan.attention:
        from .attention_doors import attach_attention_

        attach_attention_(model, plan.attention, map_quantizer)
    # Nothing below can fail.
    if plan.untied is not None:
        untie_(model, plan.untied)
    for gemm, parametrization in zip(plan.gemms, weights, strict=True):
        # unsafe: torch would compute every weight to check its shape, and so read all of a memory-mapped model
        parametrize.register_parametrization(modules[gemm.name], "weight", parametrization, unsafe=True)
    for table, parametrized in zip(tables, tabled, strict=True):
        parametrize.register_parametrization(modules[table.name], "weight", parametrized)
    if owned:
        call_projections_(model)  # fairseq's attention reads weights without calling its linears: no hook would run
    hook_inputs_(modules, plan.gemms, owned)
    for _, quantizer in quantizers(model):
        quantizer.train(model.training)  # a new module is in training mode


def _check(modules: Mapping[str, nn.Module], gemm: PlannedGemm) -> None:
    module = modules.get(gemm.name)
    if module is None:
        raise PlanError(f"the plan names the GEMM {gemm.name!r}; this model has no such module")
    if parametrize.is_parametrized(module, "weight"):
        raise PlanError(f"{gemm.name} is attached already; fold the model first, or attach to a fresh copy")
    weight = _weight(module)
    found = tuple(weight.shape) if gemm.layout == "out_in" else tuple(weight.shape)[::-1]
    if found != gemm.shape:
        raise PlanError(f"{gemm.name}: the plan was made for shape {gemm.shape}, the model has {found}")


def _check_table(modules: Mapping[str, nn.Module], table: PlannedEmbedding) -> None:
    module = modules.get(table.name)
    if module is None:
        raise PlanError(f"the plan names the embedding table {table.name!r}; this model has no such module")
    if parametrize.is_parametrized(module, "weight"):
        raise PlanError(f"{table.name} is attached already; fold the model first, or attach to a fresh copy")
    if tuple(_weight(module).shape) != (table.rows, table.width):
        expected, found = (table.rows, table.width), tuple(_weight(module).shape)
        raise PlanError(f"{table.name}: the plan was made for shape {expected}, the model has {found}")


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def fold_(model: nn.Module) -> None:
    """Write masks and weight quantizers into plain weights and remove everything attached.

    Afterwards the model has its original keys, classes and shapes. Input quantizers and N:M attention maps have no
    place in plain weights and are gone: the checkpoint keeps them.
    """
    for _, module, _ in list(compressed_weights(model)):
        _own_class_(module)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    for _, module, _ in list(quantized_tables(model)):
        _own_class_(module)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    unhook_inputs_(model.modules())
    if any("attention_map" in module._modules for module in model.modules()):
        from .attention_doors import detach_attention_

        detach_attention_(model)


def _own_class_(module: nn.Module) -> None:
    """Give a parametrized module a class of its own. A deep copy shares the class that torch made for the original, and
    removing the parametrization from either would take ``weight`` away from both."""
    shared = type(module)
    members = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)
