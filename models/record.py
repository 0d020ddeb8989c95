"""The record of one architecture family: its GEMMs, attention maps, tables and blocks, by module name.

Patterns are regular expressions matched to the end (``re.fullmatch``). ``block`` is matched against module names of the
whole model; site patterns, ``activation`` and ``left_dense`` are relative to the block; ``final_projection``,
``pooler`` and ``embeddings`` are full names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import AdapterError

Role = Literal[
    "q", "k", "v", "qkv", "attn_out",
    "cross_q", "cross_k", "cross_v", "cross_out",
    "ffn_up", "ffn_gate", "ffn_down",
    "pooler", "final",
]  # fmt: skip
Layout = Literal["out_in", "in_out"]
ROLES: tuple[str, ...] = get_args(Role)
OUTSIDE_BLOCKS = ("pooler", "final")
BLOCK_ROLES: tuple[str, ...] = tuple(role for role in ROLES if role not in OUTSIDE_BLOCKS)
ONE_KIND = "block"  # the kind of all blocks where a record tells no kinds apart


@dataclass(frozen=True)
class GemmSite:
    """One weight matrix of a block.

    Args:
        pattern: module name relative to the block, e.g. ``attention.self.query``.
        role: what the matrix is; recipes speak of roles only.
        layout: ``out_in`` for ``nn.Linear`` ([out_features, in_features]), ``in_out`` for GPT-2's ``Conv1D``.
        parts: 3 when the rows hold Q, K and V one after the other; per-tensor quantizers treat them as three tensors.
    """

    pattern: str
    role: Role
    layout: Layout = "out_in"
    parts: Literal[1, 3] = 1


@dataclass(frozen=True)
class AttentionSite:
    """One attention map (softmax of Q K^T) of a block: the module, relative to the block, that computes it.

    ``head_dim``: attribute of that module that holds the width of one head; the first of these names that it has.
    """

    pattern: str
    kind: Literal["self", "cross"] = "self"
    head_dim: tuple[str, ...] = ("head_dim", "attention_head_size")


@dataclass(frozen=True)
class Permutable:
    """Columns of one matrix that may change places when the rows of others follow (ALGORITHMS B.2).

    Declare it only where nothing but an element-wise function stands between producers and consumer.

    Args:
        consumer_role: the matrix whose in_features are permuted.
        producer_roles: the matrices whose rows (and biases) must follow. Of a fused ``qkv`` only the rows of V.
        within: ``all``: any permutation; ``head``: only inside one attention head.
        unless: module, relative to the block, that makes it wrong by being there; an ``nn.Identity`` does not count.
    """

    consumer_role: Role
    producer_roles: tuple[Role, ...]
    within: Literal["all", "head"] = "all"
    unless: str | None = None


FFN = Permutable("ffn_down", ("ffn_up",))
GATED_FFN = Permutable("ffn_down", ("ffn_up", "ffn_gate"))
HEADS = Permutable("attn_out", ("v",), within="head")
FUSED_HEADS = Permutable("attn_out", ("qkv",), within="head")
CROSS_HEADS = Permutable("cross_out", ("cross_v",), within="head")


@dataclass(frozen=True)
class BlockForm:
    """How the parts of an encoder block stand to each other, for a runtime that computes a block as a whole.

        norm_first: h = x + attention(norm(x)),  y = h + FFN(norm(h))         (pre-LN)
        otherwise:  h = norm(x + attention(x)),  y = norm(h + FFN(h))         (post-LN)

    Args:
        attention_norm, ffn_norm: names of the two layer norms, relative to the block.
        mask: the argument of the block's forward that holds the attention mask, [B, H, Q, K] or broadcastable to it.
    """

    attention_norm: str
    ffn_norm: str
    norm_first: bool
    mask: str = "attention_mask"


@dataclass(frozen=True)
class Adapter:
    """One architecture family.

    Args:
        name: unique, lower case.
        model_types: ``config.model_type`` values (transformers) or ``<package>.<ClassName>`` that it serves.
        library: requirement string of the versions its names were checked against, e.g. ``transformers>=5.10,<6``.
        block: full name of a transformer block. One group ``(\\d+)`` is its index; where blocks of several kinds differ
            (encoder and decoder), a second group ``(?P<kind>encoder|decoder)`` tells the kind.
        gemms, attention: the sites of a block; of all kinds of block together, where there are several.
        final_projection: the last projection of every head class (LM, QA, classification, CTC), or None. A match that
            contains another match is its container and does not count.
        per_block: number of GEMMs in each block; a mapping from kind to number where there are several kinds, in the
            order in which blocks are numbered. Checked.
        activation: the element-wise module between ``ffn_up`` and ``ffn_down``; the runtime fuses the three when
            nothing else stands between them in evaluation mode. ``beside_activation`` names its siblings that do not;
            any other sibling than dropout and the two matrices counts as standing between.
        left_dense: linears of a block that are no GEMM site on purpose. Any other linear that no pattern claims is an
            error, so that no matrix is left out by oversight.
        pooler: linears outside the blocks, other than the final projection, that a recipe may treat as role ``pooler``.
        embeddings: the ``nn.Embedding`` tables that the model looks up.
        permutable: what channel permutation may do, see `Permutable`.
        forms: what an encoder block may compute, see `BlockForm`; none where it is something else.
    """

    name: str
    model_types: tuple[str, ...]
    library: str
    block: str
    gemms: tuple[GemmSite, ...]
    attention: tuple[AttentionSite, ...]
    final_projection: str | None
    per_block: int | Mapping[str, int]
    activation: str | None = None
    left_dense: tuple[str, ...] = ()
    beside_activation: tuple[str, ...] = ()
    pooler: str | None = None
    embeddings: str | None = None
    permutable: tuple[Permutable, ...] = ()
    forms: tuple[BlockForm, ...] = ()

    @property
    def kinds(self) -> dict[str, int]:
        """GEMMs of a block by kind of block, in the order in which blocks are numbered."""
        return dict(self.per_block) if isinstance(self.per_block, Mapping) else {ONE_KIND: self.per_block}

    def patterns(self) -> tuple[str, ...]:
        """Every regular expression of the record."""
        optional = (self.final_projection, self.activation, self.pooler, self.embeddings)
        sites = (*(site.pattern for site in self.gemms), *(site.pattern for site in self.attention))
        unless = tuple(entry.unless for entry in self.permutable)
        named = (pattern for pattern in (*optional, *unless) if pattern is not None)
        return (self.block, *sites, *named, *self.left_dense, *self.beside_activation)


def check_record(adapter: Adapter) -> None:
    """What can be wrong with the record itself, without any model.

    Raises:
        AdapterError: no regular expression, a block pattern without its one index group, or an unknown role, layout
            or number of parts.
    """
    who = f"adapter {adapter.name!r}"
    for pattern in adapter.patterns():
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(f"{who}: {pattern!r} is no regular expression: {error}. A dot is written \\.") from None
    _check_block_pattern(adapter, who)
    for site in adapter.gemms:
        for value, allowed in ((site.role, BLOCK_ROLES), (site.layout, get_args(Layout)), (site.parts, (1, 3))):
            if value not in allowed:
                raise AdapterError(
                    f"{who}: site {site.pattern!r} says {value!r}, allowed is one of {', '.join(map(str, allowed))}"
                )
    for entry in adapter.permutable:
        if unknown := {entry.consumer_role, *entry.producer_roles} - set(BLOCK_ROLES):
            raise AdapterError(
                f"{who}: permutable names the role {sorted(unknown)[0]!r}, allowed is one of {', '.join(BLOCK_ROLES)}"
            )
        if entry.within not in ("all", "head"):
            raise AdapterError(f"{who}: permutable within={entry.within!r}, allowed is 'all' or 'head'")


def _check_block_pattern(adapter: Adapter, who: str) -> None:
    compiled = re.compile(adapter.block)
    has_kinds = "kind" in compiled.groupindex
    groups = compiled.groups - has_kinds
    if groups != 1:
        raise AdapterError(
            f"{who}: the block pattern {adapter.block!r} has {groups} groups, expected exactly one, the block index: "
            f"write (\\d+) for the index and (?:...) for every other group."
        )
    if has_kinds != isinstance(adapter.per_block, Mapping):
        raise AdapterError(
            f"{who}: the block pattern {adapter.block!r} and per_block={adapter.per_block!r} do not go together: "
            f"blocks of several kinds need a group (?P<kind>...) in the pattern and one number per kind in per_block, "
            f"blocks of one kind neither."
        )
