"""Attach a plan to a model as parametrizations and input hooks, and fold the effect back into plain weights.

The weight that the forward pass sees is ``mask * Q(W)``: quantize first, then mask (Deep Compression of Pre-trained
Transformers, section 2.2). The orientation of the stored weight is settled here, once: all mathematics sees
``w_OI`` = [out_features, in_features].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .masks import magnitude_mask
from .plan import Plan, PlanError, PlannedGemm
from .quantizers import LsqQuantizer

INPUT_QUANTIZER = "input_quantizer"


class CompressedWeight(nn.Module):
    """Parametrization of one weight: ``mask * Q(W)``. With an all-true mask and an inactive quantizer: the identity.

    Args:
        planned: what to do. The mask is a buffer of shape [out_features, in_features]; it is saved but not trained.
    """

    mask_OI: Tensor | None

    def __init__(self, planned: PlannedGemm, device: torch.device) -> None:
        super().__init__()
        self.transposed = planned.layout == "in_out"
        self.pattern = planned.pattern
        mask = None if self.pattern is None else torch.ones(planned.shape, dtype=torch.bool, device=device)
        self.register_buffer("mask_OI", mask)
        self.quantizer: LsqQuantizer | None = None
        if planned.weight_bits is not None:
            self.quantizer = LsqQuantizer(planned.weight_bits, (planned.shape[0], 1)).to(device)

    def forward(self, weight: Tensor) -> Tensor:
        w_OI = weight.t() if self.transposed else weight
        if self.quantizer is not None:
            w_OI = self.quantizer(w_OI)
        if self.mask_OI is not None:
            w_OI = w_OI * self.mask_OI
        return w_OI.t() if self.transposed else w_OI


class QuantizeInput:
    """Forward pre-hook that quantizes a GEMM's input. An object, not a closure, so that ``deepcopy`` follows it."""

    def __init__(self, quantizer: LsqQuantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.quantizer(args[0]), *args[1:])


def attach_(model: nn.Module, plan: Plan) -> None:
    """Add masks and quantizers to ``model`` in place; outputs do not change until a stage fills them.

    Raises:
        PlanError: a planned GEMM is missing, has another shape, or is attached already. The model is untouched then.
    """
    modules = dict(model.named_modules())
    for gemm in plan.gemms:
        _check(modules, gemm)
    quantizers: dict[str, LsqQuantizer] = {}
    for gemm in plan.gemms:
        module = modules[gemm.name]
        weight = module.weight
        assert isinstance(weight, Tensor)
        parametrize.register_parametrization(module, "weight", CompressedWeight(gemm, weight.device))
        if gemm.input_bits is None or gemm.input_owner is None:
            continue
        if gemm.input_owner not in quantizers:
            quantizers[gemm.input_owner] = LsqQuantizer(gemm.input_bits, ()).to(weight.device)
            modules[gemm.input_owner].add_module(INPUT_QUANTIZER, quantizers[gemm.input_owner])
        module.register_forward_pre_hook(QuantizeInput(quantizers[gemm.input_owner]))


def _check(modules: dict[str, nn.Module], gemm: PlannedGemm) -> None:
    module = modules.get(gemm.name)
    if module is None:
        raise PlanError(f"the plan names the GEMM {gemm.name!r}; this model has no such module")
    if parametrize.is_parametrized(module, "weight"):
        raise PlanError(f"{gemm.name} is attached already; fold the model first, or attach to a fresh copy")
    weight = module.weight
    assert isinstance(weight, Tensor)
    found = tuple(weight.shape) if gemm.layout == "out_in" else tuple(weight.shape)[::-1]
    if found != gemm.shape:
        raise PlanError(f"{gemm.name}: the plan was made for shape {gemm.shape}, the model has {found}")


def compressed_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, CompressedWeight]]:
    """Name, module and parametrization of every attached GEMM, in model order."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Module) and parametrize.is_parametrized(module, "weight"):
            first = module.parametrizations["weight"][0]  # type: ignore[index]
            if isinstance(first, CompressedWeight):
                yield name, module, first


def latent_OI(module: nn.Module, parametrization: CompressedWeight) -> Tensor:
    """The trained weight below the mask and the quantizer, as [out_features, in_features]."""
    original = module.parametrizations["weight"].original  # type: ignore[index, union-attr]
    assert isinstance(original, Tensor)
    return original.t() if parametrization.transposed else original


@torch.no_grad()
def prune_(model: nn.Module) -> None:
    """Set every mask to the N:M magnitude mask of its weight (ASP step 2; Mishra et al. 2021, section 4)."""
    for _, module, parametrization in compressed_weights(model):
        if parametrization.pattern is not None and parametrization.mask_OI is not None:
            parametrization.mask_OI.copy_(magnitude_mask(latent_OI(module, parametrization), parametrization.pattern))


def quantizers(model: nn.Module) -> Iterator[tuple[str, LsqQuantizer]]:
    """Every weight and input quantizer of an attached model, shared ones once."""
    for name, module in model.named_modules():
        if isinstance(module, LsqQuantizer):
            yield name, module


def deactivate_(model: nn.Module) -> None:
    """Switch all quantizers off: they are the identity until they are calibrated again."""
    for _, quantizer in quantizers(model):
        quantizer.active = False


@torch.no_grad()
def fold_(model: nn.Module) -> None:
    """Write masks and weight quantizers into plain weights and remove everything attached.

    Afterwards the model has its original keys, classes and shapes. Input quantizers have no place in plain weights:
    the checkpoint keeps their scales.
    """
    for _, module, _ in list(compressed_weights(model)):
        _own_class_(module)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, QuantizeInput):
                del module._forward_pre_hooks[key]
        if INPUT_QUANTIZER in module._modules:
            del module._modules[INPUT_QUANTIZER]


def _own_class_(module: nn.Module) -> None:
    """Give a parametrized module a class of its own. A deep copy shares the class that torch made for the original, and
    removing the parametrization from either would take ``weight`` away from both."""
    shared = type(module)
    members = {key: value for key, value in vars(shared).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)
