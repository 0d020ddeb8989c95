"""One-shot pruning of an attached model from calibration data: Wanda and SparseGPT (ALGORITHMS B.7, B.8).

Inputs of a GEMM come from the already pruned GEMMs before it, and the statistics of one group of GEMMs are held at a
time (`walk`). Legend: O out_features, I in_features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models import Sites, adapter_for, find_sites
from .attach import CompressedWeight, compressed_weights, latent_OI
from .calibration_rows import gather, is_encoder_decoder
from .hessian import Hessian, HessianError, InverseFactor, factorise
from .lockstep import give_back_memory
from .masks import Pattern
from .offload import Offload
from .packing import pack_bits, unpack_bits
from .rules import Unstructured
from .sparsegpt import QuantizeColumn, sparsegpt
from .walk import Stop, Walk, evaluating, groups_of
from .wanda import InputSquares, wanda_mask

Method = Literal["wanda", "sparsegpt"]
# GEMM and its dense weight [O, I] -> what rounds its columns; None leaves this GEMM unquantized.
Quantize = Callable[[CompressedWeight, Tensor], QuantizeColumn | None]


@dataclass(frozen=True)
class Pruned:
    """What was done to one GEMM.

    Args:
        name: full module name. sparsity: as in recipes. tokens: calibration tokens of this process, without padding.
        loss: SparseGPT's 0.5 * sum err^2, the output error per calibration sequence; None for Wanda.
        damping: what SparseGPT's factorisation needed; None for Wanda.
    """

    name: str
    sparsity: str
    tokens: int
    loss: float | None
    damping: float | None


@dataclass(frozen=True)
class _Target:
    module: nn.Module
    weight: CompressedWeight
    sparsity: Pattern | Unstructured
    shape: tuple[int, int]

    @property
    def latent_OI(self) -> Tensor:
        return latent_OI(self.module, self.weight)


@torch.no_grad()
def prune_oneshot_(
    model: nn.Module,
    method: Method,
    batches: Iterable[Mapping[str, Any]],
    *,
    block_size: int = 128,
    damping: float = 0.01,
    quantize: Quantize | None = None,
    tokens_at_a_time: int = 2048,
    recompute: bool = False,
    offload: str | os.PathLike[str] | None = None,
    sites: Sites | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[Pruned, ...]:
    """Prune every attached GEMM that has a sparsity pattern. Sets masks; SparseGPT also moves the weights below them.

    Under ``torch.distributed`` each process passes its own share of the data; the statistics are summed.

    Args:
        model: attached (`attach_`). Run in evaluation mode; the mode is restored.
        batches: what the model is called with: mappings of tensors [B, ...]; padding (``attention_mask``) is left out.
        block_size, damping, quantize: SparseGPT only, see `sparsegpt`.
        tokens_at_a_time: of one forward pass; more is hardly faster and takes more memory.
        recompute: passes wait in front of blocks, not inside, and blocks are run again up to each group of GEMMs. Same
            result, about twice the forward time; per token only the input of a block is kept, not what stands in it.
        offload: a folder on a disk with room for the weights. They wait there in a temporary file, and memory holds
            those of one group of GEMMs (and, before and after, all). Same result; see `Offload`.
        sites: of the model, where no adapter is known for it; only encoder-decoders and ``recompute`` need them.
        progress: told the number of GEMMs done and the total.

    Returns:
        One record per GEMM, in the order in which the data meets them.

    Raises:
        CalibrationDataError: no data, padding that cannot be told, NaN or infinity in an activation (names GEMM, batch
            and row). After an error in the middle all masks are as before, but weights that SparseGPT moved are not.
        ValueError: unknown method, no GEMM to prune, a GEMM that the model does not call, or see `sparsegpt`.
    """
    if method not in ("wanda", "sparsegpt"):
        raise ValueError(f"expected the method 'wanda' or 'sparsegpt', found {method!r}")
    targets = _targets(model)
    if sites is None and (recompute or is_encoder_decoder(model)):
        sites = find_sites(model, adapter_for(model))
    stops = _stops(model, targets, sites)
    blocks = [block.module for block in sites.blocks] if recompute and sites is not None else []
    runs = gather(batches)
    masks = _Masks(targets)
    give_back_memory()
    done: list[Pruned] = []
    try:
        with evaluating(model):
            groups, tokens_per_row = groups_of(model, stops, runs[0][:1])
            rows = tokens_at_a_time // tokens_per_row
            gemms = {name: (target.module, target.weight) for name, target in targets.items()}
            with Offload(model, gemms, offload) as waiting, Walk(model, runs, rows, blocks) as walk:
                for group in groups:
                    members = {stop.name: targets[stop.name] for stop in group}
                    in_features, device = members[group[0].name].shape[1], members[group[0].name].latent_OI.device
                    if method == "wanda":
                        squares = InputSquares(in_features, device)
                        walk.advance_to(group[0], squares)
                        waiting.keep_only(members)
                        for name, target in members.items():
                            masks.set_(name, wanda_mask(target.latent_OI, squares.scaler_I, target.sparsity))
                            done.append(Pruned(name, str(target.sparsity), walk.tokens, None, None))
                    else:
                        hessian = Hessian(in_features, device)
                        walk.advance_to(group[0], hessian)
                        waiting.keep_only(members)
                        factor = _factor(group[0].name, hessian, damping)
                        del hessian
                        for name, mask_OI, loss in _solve_(members, factor, block_size, quantize):
                            masks.set_later(name, mask_OI)
                            done.append(Pruned(name, str(targets[name].sparsity), walk.tokens, loss, factor.damping))
                        del factor
                        waiting.write(members)
                    progress(len(done), len(targets))
        masks.finish_()
    except BaseException:
        masks.restore_()
        raise
    return tuple(done)


def _targets(model: nn.Module) -> dict[str, _Target]:
    found = {}
    for name, module, weight in compressed_weights(model):
        sparsity = weight.sparsity
        if sparsity is not None and weight.mask_OI is not None:
            w_OI = latent_OI(module, weight)
            if not bool(w_OI.isfinite().all()):
                raise ValueError(f"the weight of {name} holds NaN or infinity; nothing was pruned")
            found[name] = _Target(module, weight, sparsity, (w_OI.shape[0], w_OI.shape[1]))
    if not found:
        raise ValueError("no attached GEMM has a sparsity pattern: attach a plan with `sparsity` in a rule first")
    return found


def _stops(model: nn.Module, targets: Mapping[str, _Target], sites: Sites | None) -> list[Stop]:
    """In a decoder all but the K and V of cross attention, and the last projection, read decoder tokens."""
    of_decoder: set[str] = set()
    if sites is not None and is_encoder_decoder(model):
        decoders = {gemm.block for gemm in sites.gemms if gemm.role.startswith("cross_")}
        of_decoder = {g.name for g in sites.gemms if g.block in decoders and g.role not in ("cross_k", "cross_v")}
        of_decoder |= {sites.final.name} if sites.final is not None else set()
    return [Stop(n, t.module, "decoder" if n in of_decoder else "input") for n, t in targets.items()]


class _Masks:
    """Masks while the passes are under way: no GEMM is passed through before it is pruned, so all start as one ``True``
    that is seen everywhere. SparseGPT leaves zeros in the weights, so its masks stay packed until the end."""

    def __init__(self, targets: Mapping[str, _Target]) -> None:
        self._targets = targets
        self._before = {name: _pack(target.weight.mask_OI) for name, target in targets.items()}
        self._after: dict[str, Tensor | None] = {}
        for name, target in targets.items():
            self.set_(name, torch.ones((1, 1), dtype=torch.bool, device=target.latent_OI.device).expand(target.shape))

    def set_(self, name: str, mask_OI: Tensor) -> None:
        self._targets[name].weight.mask_OI = mask_OI

    def set_later(self, name: str, mask_OI: Tensor) -> None:
        self._after[name] = _pack(mask_OI)

    def finish_(self) -> None:
        self._unpack_(self._after)

    def restore_(self) -> None:
        self._unpack_(self._before)

    def _unpack_(self, packed: dict[str, Tensor | None]) -> None:
        for name in list(packed):
            target, bits = self._targets[name], packed.pop(name)
            if bits is None:
                mask_OI = torch.ones(target.shape, dtype=torch.bool, device=target.latent_OI.device)
            else:
                mask_OI = unpack_bits(bits, 1, target.shape[1]).view(torch.bool)
            self.set_(name, mask_OI)


def _pack(mask_OI: Tensor | None) -> Tensor | None:
    """One bit per weight; None where all are kept."""
    assert mask_OI is not None
    return None if bool(mask_OI.all()) else pack_bits(mask_OI.contiguous().view(torch.uint8), 1)


def _factor(name: str, hessian: Hessian, damping: float) -> InverseFactor:
    try:
        return factorise(hessian.value_II(), damping)
    except HessianError as error:
        raise HessianError(f"{name}: {error}") from error


def _solve_(
    members: dict[str, _Target], factor: InverseFactor, block_size: int, quantize: Quantize | None
) -> list[tuple[str, Tensor, float]]:
    """Prune GEMMs that read the same tensor; their weights are set. Name, mask [O, I] and loss of each.

    N:M rows do not know of each other, so matrices of one pattern are solved as one; thresholds of unstructured
    sparsity and the scales of quantizers belong to one matrix.
    """
    together: dict[Any, list[str]] = {}
    for name, target in members.items():
        joint = isinstance(target.sparsity, Pattern) and quantize is None
        together.setdefault(target.sparsity if joint else name, []).append(name)
    found = []
    for names in together.values():
        weights = [members[name].latent_OI for name in names]
        first = members[names[0]]
        column = None if quantize is None else quantize(first.weight, weights[0])
        w_OI = torch.cat(weights) if len(weights) > 1 else weights[0]
        # thresholds of Q, K and V are their own, also where the three are one matrix; scales of columns span all rows
        parts = first.weight.parts if not isinstance(first.sparsity, Pattern) and column is None else 1
        solved = [
            sparsegpt(p, factor, first.sparsity, block_size=block_size, quantize=column) for p in w_OI.chunk(parts)
        ]
        rows = [len(latent) for latent in weights]
        new = torch.cat([part.w_OI for part in solved]).split(rows)
        masks = torch.cat([part.mask_OI for part in solved]).split(rows)
        losses = torch.cat([part.loss_O for part in solved]).split(rows)
        for name, latent, new_OI, mask_OI, loss_O in zip(names, weights, new, masks, losses, strict=True):
            latent.copy_(new_OI)
            found.append((name, mask_OI, float(loss_O.sum())))
    return found
