"""What an attached model carries: masks and quantizers on its weights, tables and inputs, and how to find them.

The weight that the forward pass sees is ``mask * Q(W)``: quantize first, then mask (Deep Compression of Pre-trained
Transformers, section 2.2). The orientation of the stored weight is settled here, once: all mathematics sees
``w_OI`` = [out_features, in_features].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .plan import PlannedEmbedding, PlannedGemm
from .quantizers import Quantizer, weight_quantizer
from .rules import parse_sparsity

INPUT_QUANTIZER = "input_quantizer"


class CompressedWeight(nn.Module):
    """Parametrization of one weight: ``mask * Q(W)``. With an all-true mask and an inactive quantizer: the identity.

    Args:
        planned: what to do. The mask is a buffer of shape [out_features, in_features]; it is saved but not trained.

    Attributes:
        sparsity: `Pattern` (also as ``pattern``), `Unstructured` (also as ``unstructured``), or None.
        parts: 3 where the matrix holds Q, K and V row slices.
    """

    mask_OI: Tensor | None

    def __init__(self, planned: PlannedGemm, device: torch.device) -> None:
        super().__init__()
        self.transposed = planned.layout == "in_out"
        self.sparsity = None if planned.sparsity is None else parse_sparsity(planned.sparsity)
        self.pattern, self.unstructured, self.parts = planned.pattern, planned.unstructured, planned.parts
        self.block = planned.block  # None outside the blocks
        mask = None if planned.sparsity is None else torch.ones(planned.shape, dtype=torch.bool, device=device)
        self.register_buffer("mask_OI", mask)
        # (quantized, latent, mask) -> weight: how a training policy applies the mask; None multiplies.
        self.apply_mask: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        self.quantizer: Quantizer | None = None
        if planned.weight is not None:
            self.quantizer = weight_quantizer(planned.weight, planned.shape, planned.parts).to(device)

    def forward(self, weight: Tensor) -> Tensor:
        w_OI = latent = weight.t() if self.transposed else weight
        if self.quantizer is not None:
            w_OI = self.quantizer(w_OI)
        if self.mask_OI is not None:
            w_OI = w_OI * self.mask_OI if self.apply_mask is None else self.apply_mask(w_OI, latent, self.mask_OI)
        return w_OI.t() if self.transposed else w_OI


class QuantizedTable(nn.Module):
    """Parametrization of an embedding table that is trained as integers, one scale per table (Q8BERT, section 3)."""

    def __init__(self, planned: PlannedEmbedding, device: torch.device) -> None:
        super().__init__()
        record = {"method": planned.method, "bits": planned.bits}
        self.quantizer = weight_quantizer(record, (planned.rows, planned.width)).to(device)

    def forward(self, weight: Tensor) -> Tensor:
        quantized: Tensor = self.quantizer(weight)
        return quantized


class QuantizeInput:
    """Forward pre-hook that quantizes a GEMM's input. An object, not a closure, so that ``deepcopy`` follows it.

    Args:
        owner: whether the quantizer is this GEMM's own; others that read the same tensor do not count its range again.
    """

    def __init__(self, quantizer: Quantizer, owner: bool = True) -> None:
        self.quantizer, self.owner = quantizer, owner

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        quantized = self.quantizer(args[0]) if self.owner else self.quantizer.follow(args[0])
        return (quantized, *args[1:])


def compressed_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, CompressedWeight]]:
    """Name, module and parametrization of every attached GEMM, in model order."""
    for name, module in model.named_modules():
        first = _parametrization(module)
        if isinstance(first, CompressedWeight):
            yield name, module, first


def quantized_tables(model: nn.Module) -> Iterator[tuple[str, nn.Module, QuantizedTable]]:
    """Name, module and parametrization of every attached embedding table, in model order."""
    for name, module in model.named_modules():
        first = _parametrization(module)
        if isinstance(first, QuantizedTable):
            yield name, module, first


def _parametrization(module: nn.Module) -> nn.Module | None:
    if not parametrize.is_parametrized(module, "weight"):
        return None
    first = module.parametrizations["weight"][0]  # type: ignore[index]
    return first if isinstance(first, nn.Module) else None


def latent_OI(module: nn.Module, parametrization: CompressedWeight) -> Tensor:
    """The trained weight below the mask and the quantizer, as [out_features, in_features]."""
    original = latent(module)
    return original.t() if parametrization.transposed else original


def latent(module: nn.Module) -> Tensor:
    """The trained tensor below a parametrization of ``module.weight``, as it is stored."""
    original = module.parametrizations["weight"].original  # type: ignore[index, union-attr]
    assert isinstance(original, Tensor)
    return original


def quantizers(model: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Every quantizer of an attached model by its full name, shared ones once: of weights, inputs, embedding tables and
    attention maps."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            yield name, module


def parameters_without_decay(model: nn.Module) -> list[str]:
    """Full names of the learned scales and clip values, which get no weight decay (ALGORITHMS D.3, D.6)."""
    return [f"{name}.{own}" for name, quantizer in quantizers(model) for own, _ in quantizer.named_parameters()]


def deactivate_(model: nn.Module) -> None:
    """Switch all quantizers off: they are the identity until they are calibrated again."""
    for _, quantizer in quantizers(model):
        quantizer.active = False
