"""What ``find_sites`` finds in one model: its blocks, GEMMs, attention maps and lookup tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from .record import ONE_KIND, Adapter, Layout, Permutable


@dataclass(frozen=True)
class Gemm:
    """One weight matrix found in a model.

    Args:
        name: full module name.
        module: the live module, an ``nn.Linear`` or a ``Conv1D``, parametrized or not.
        block: index of its `Block`, None for the final projection and the pooler.
        layout, parts, role: as in the `GemmSite`.
        out_features, in_features: the shape of `weight_OI`.
    """

    name: str
    module: nn.Module = field(repr=False)
    role: str
    block: int | None
    layout: Layout
    parts: int
    out_features: int
    in_features: int

    @property
    def weight_OI(self) -> Tensor:
        """The weight as [out_features, in_features]: a view of it, or of what its parametrization yields now."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight if self.layout == "out_in" else weight.t()


@dataclass(frozen=True)
class AttentionMap:
    """One attention map found in a model: the module that computes it, full name, block index, ``self`` or ``cross``,
    and the width of one head where the module tells it."""

    name: str
    module: nn.Module = field(repr=False)
    block: int
    kind: str
    head_dim: int | None = None


@dataclass(frozen=True)
class Block:
    """One repeated transformer unit.

    Args:
        index: unique in the model. Where the record knows several kinds of block, those of the first kind come first
            (BART: encoder 0 to 5, decoder 6 to 11).
        activation: full name of the module that alone stands between ``ffn_up`` and ``ffn_down`` in evaluation mode, or
            None where something else stands there too.
        kind: ``block``, or the kind of the record's block pattern (``encoder``, ``decoder``).
        permutable: the record's entries that hold in this block.
    """

    index: int
    name: str
    module: nn.Module = field(repr=False)
    activation: str | None
    kind: str = ONE_KIND
    permutable: tuple[Permutable, ...] = ()


@dataclass(frozen=True)
class Table:
    """One lookup table: an ``nn.Embedding`` and its full name. Tied tables are listed each, with one parameter."""

    name: str
    module: nn.Module = field(repr=False)


@dataclass(frozen=True)
class Sites:
    """All sites of one model, in model order.

    ``gemms`` are those of the blocks; ``final`` is the last projection, None for a bare backbone; ``final_tied`` tells
    that its weight is also an input embedding; ``pooler`` are the other linears that a recipe may touch.
    """

    adapter: Adapter
    blocks: tuple[Block, ...]
    gemms: tuple[Gemm, ...]
    attention: tuple[AttentionMap, ...]
    final: Gemm | None
    final_tied: bool
    pooler: tuple[Gemm, ...] = ()
    embeddings: tuple[Table, ...] = ()
