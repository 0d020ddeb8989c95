"""Permute in_features so that N:M keeps more, and let the matrices that write them follow (ALGORITHMS B.2).

The outputs of the model stay what they were. Which matrices belong together an adapter declares (`Permutable`): FFN2
with FFN1 (and the gate), anywhere; the attention output with V, inside one head. Legend: O out_features, I in_features,
H heads that share the rows of one V head, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..models import Sites, adapter_for, find_sites
from ..models.dense import DenseError, logits
from ..models.example import example_batch
from ..models.record import Permutable
from ..models.sites import Block, Gemm
from .count_progress import count_progress
from .masks import Pattern, magnitude_mask
from .permutation_search import find_permutation


class PermutationError(ValueError):
    """A model that cannot be permuted."""


@dataclass(frozen=True)
class Permuted:
    """What a permutation brought one GEMM: the share of sum |W| that its magnitude mask keeps, before and after."""

    name: str
    pattern: str
    kept_before: float
    kept_after: float


def describe_permuted(found: Sequence[Permuted]) -> str:
    """One line: how many GEMMs, and the mean share of the magnitude that is kept before and after."""
    if not found:
        return "permuted no channels: the adapter declares none that N:M takes"
    before = sum(gemm.kept_before for gemm in found) / len(found)
    after = sum(gemm.kept_after for gemm in found) / len(found)
    return f"permuted the channels of {len(found)} GEMMs: kept magnitude {100 * before:.2f} % -> {100 * after:.2f} %"


@torch.no_grad()
def permute_(
    sites: Sites,
    patterns: Mapping[str, Pattern],
    *,
    max_swaps: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Permuted, ...]:
    """Permute the in_features of every GEMM that the adapter declares permutable; do it before `attach_`.

    Args:
        sites: of the model, from `find_sites`; its weights and biases are permuted in place.
        patterns: N:M of each GEMM by full name; GEMMs that are not named stay as they are.
        max_swaps: per matrix, or per head; default 10 * columns.
        progress: is told the GEMMs done and their number.

    Returns:
        One record per permuted GEMM, in model order. A GEMM that no permutation helps is in it too. Left out is an
        attention output whose groups would cross heads (the head's width is no multiple of M).

    Raises:
        PermutationError: something is attached to a GEMM, or the width of its heads is not known. Nothing has changed.
    """
    work = []
    for block in sites.blocks:
        by_role = {gemm.role: gemm for gemm in sites.gemms if gemm.block == block.index}
        for entry in block.permutable:
            consumer = by_role[entry.consumer_role]
            pattern = patterns.get(consumer.name)
            if pattern is None:
                continue
            producers = [by_role[role] for role in entry.producer_roles]
            for gemm in (consumer, *producers):
                if is_parametrized(gemm.module, "weight"):
                    raise PermutationError(f"{gemm.name} is attached: permute the dense model, then attach the plan")
            width = _head_dim(sites, block, entry, consumer) if entry.within == "head" else consumer.in_features
            if entry.within == "all" or width % pattern.m == 0:
                work.append((consumer, producers, pattern, width))
    found = []
    for done, each in enumerate(work):
        progress(done, len(work))
        found.append(_permute_one_(*each, max_swaps))
    progress(len(work), len(work))
    return tuple(found)


@torch.no_grad()
def permute_dense_(model: nn.Module, pattern: Pattern) -> tuple[tuple[Permuted, ...], float]:
    """`permute_` for every block GEMM of a model, and the largest change of its outputs on an example, relative to the
    largest output: rounding only, since sums are taken in another order."""
    batch = example_batch(model)
    before = _outputs(model, batch)
    sites = find_sites(model, adapter_for(model))
    with count_progress("permute: GEMMs") as tell:
        found = permute_(sites, patterns_of(sites, pattern), progress=tell)
    return found, float((_outputs(model, batch) - before).abs().max() / before.abs().max())


def _outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Scores; of a model without a head the last hidden state."""
    try:
        return logits(model, batch)
    except DenseError:
        hidden: Tensor = model(**batch)[0]
        return hidden


def _head_dim(sites: Sites, block: Block, entry: Permutable, consumer: Gemm) -> int:
    kind = "cross" if entry.consumer_role.startswith("cross_") else "self"
    found = [m.head_dim for m in sites.attention if m.block == block.index and m.kind == kind]
    if len(found) != 1 or found[0] is None or consumer.in_features % found[0]:
        raise PermutationError(
            f"{consumer.name}: cannot tell the width of a head from the attention module (found {found}): name the "
            f"attribute that holds it in the adapter's AttentionSite(head_dim=...)"
        )
    return found[0]


def _permute_one_(
    consumer: Gemm, producers: list[Gemm], pattern: Pattern, width: int, max_swaps: int | None
) -> Permuted:
    w_OI = consumer.weight_OI
    before = _kept(w_OI, pattern)
    rows = producers[0].out_features // producers[0].parts
    shared = consumer.in_features // rows  # with grouped heads, so many heads read the same rows of V
    # [O, V head, H, D]: heads that share rows must be permuted alike, so they count as more rows of one matrix.
    heads_OVHD = w_OI.unflatten(1, (-1, shared, width))
    order_I = find_permutation(
        heads_OVHD.transpose(1, 2).flatten(0, 1).flatten(1), pattern, max_swaps=max_swaps, width=width
    )
    for producer in producers:
        first = producer.out_features - rows  # of a fused QKV matrix V is the last part
        _reorder_rows_(producer.weight_OI[first:], order_I)
        bias = producer.module.bias
        if isinstance(bias, Tensor):
            _reorder_rows_(bias[first:], order_I)
    inside_VD = order_I.view(-1, width) % width
    order_OVHD = inside_VD[None, :, None, :].expand(heads_OVHD.shape)
    w_OI.copy_(heads_OVHD.gather(3, order_OVHD).flatten(1))
    return Permuted(consumer.name, str(pattern), before, _kept(w_OI, pattern))


def _reorder_rows_(view: Tensor, order_I: Tensor) -> None:
    view.copy_(view[order_I])


def _kept(w_OI: Tensor, pattern: Pattern) -> float:
    total = float(w_OI.abs().sum(dtype=torch.float64))
    return float(w_OI.abs().mul(magnitude_mask(w_OI, pattern)).sum(dtype=torch.float64)) / total if total else 1.0


def patterns_of(sites: Sites, pattern: Pattern) -> dict[str, Pattern]:
    """The same pattern for every GEMM of the blocks."""
    return {gemm.name: pattern for gemm in sites.gemms}
