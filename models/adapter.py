"""What a model is made of, as data: its GEMMs, its attention maps, its blocks.

An ``Adapter`` describes a family of architectures by module names; ``find_sites`` looks them up in one model.
Patterns are regular expressions matched to the end (``re.fullmatch``). ``block`` is matched against module names of the
whole model and has exactly one group, the block index; all other patterns are relative to the block, except
``final_projection``, which is relative to the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor, nn

from .errors import AdapterError, library_note, matches_nothing
from .linear import features, layout_of, only_dropout_beside, tied_to_embedding

Role = Literal[
    "q", "k", "v", "qkv", "attn_out",
    "cross_q", "cross_k", "cross_v", "cross_out",
    "ffn_up", "ffn_gate", "ffn_down",
    "final",
]  # fmt: skip
Layout = Literal["out_in", "in_out"]
ROLES: tuple[str, ...] = get_args(Role)
BLOCK_ROLES: tuple[str, ...] = tuple(role for role in ROLES if role != "final")


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
    """One attention map (softmax of Q K^T) of a block: the module, relative to the block, that computes it."""

    pattern: str
    kind: Literal["self", "cross"] = "self"


@dataclass(frozen=True)
class Adapter:
    """One architecture family.

    Args:
        name: unique, lower case.
        model_types: ``config.model_type`` values (transformers) or ``timm.<ClassName>`` that it serves.
        library: requirement string of the versions its names were checked against, e.g. ``transformers>=5.10,<6``.
        block: regular expression of a transformer block's full module name, one group = its index.
        gemms, attention: the sites of one block.
        final_projection: full module name(s) of the last projection (LM head, QA or classification head), or None.
        per_block: number of GEMMs in each block; checked.
        activation: the element-wise module between ``ffn_up`` and ``ffn_down``, relative to the block, when nothing
            else stands between the two in evaluation mode; the runtime then fuses the three.
        left_dense: linears of a block that are no GEMM site on purpose. Any other linear that no pattern claims is an
            error, so that no matrix is left out by oversight.
    """

    name: str
    model_types: tuple[str, ...]
    library: str
    block: str
    gemms: tuple[GemmSite, ...]
    attention: tuple[AttentionSite, ...]
    final_projection: str | None
    per_block: int
    activation: str | None = None
    left_dense: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gemm:
    """One weight matrix found in a model.

    Args:
        name: full module name.
        module: the live module, an ``nn.Linear`` or a ``Conv1D``, parametrized or not.
        block: index of its block, None for the final projection.
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
    """One attention map found in a model: the module that computes it, full name, block index."""

    name: str
    module: nn.Module = field(repr=False)
    block: int
    kind: str


@dataclass(frozen=True)
class Block:
    """One repeated transformer unit. ``activation`` is the full name of the module that alone stands between ``ffn_up``
    and ``ffn_down`` in evaluation mode, or None where something else stands there too."""

    index: int
    name: str
    module: nn.Module = field(repr=False)
    activation: str | None


@dataclass(frozen=True)
class Sites:
    """All sites of one model, in model order.

    ``gemms`` are those of the blocks; ``final`` is the last projection, None for a bare backbone; ``final_tied`` tells
    that its weight is also an input embedding.
    """

    adapter: Adapter
    blocks: tuple[Block, ...]
    gemms: tuple[Gemm, ...]
    attention: tuple[AttentionMap, ...]
    final: Gemm | None
    final_tied: bool


def find_sites(model: nn.Module, adapter: Adapter) -> Sites:
    """Look up every site of ``adapter`` in ``model`` and check all of it; the model is not changed.

    Works on dense and on attached (parametrized) models, with or without a head.

    Raises:
        AdapterError: a pattern matches nothing or is no regular expression, two patterns claim one module, a layout
            contradicts the module's class, a fused QKV matrix cannot be cut in three, a block has the wrong number of
            GEMMs, a linear of a block is claimed by no pattern, or there is no block at all.
    """
    _check_record(adapter)
    modules = dict(model.named_modules())
    found = [(int(m[1]), name) for name in modules if (m := re.fullmatch(adapter.block, name)) and m[1].isdecimal()]
    if not found:
        raise matches_nothing(adapter.name, adapter.library, "block", adapter.block, modules)
    inside = {name: _children(name, modules) for _, name in found}
    names = list(dict.fromkeys(child for children in inside.values() for child in children))
    wanted = [("GEMM", site.pattern) for site in adapter.gemms]
    wanted += [("attention", site.pattern) for site in adapter.attention]
    wanted += [("activation", adapter.activation)] if adapter.activation is not None else []
    for kind, pattern in wanted:
        if not any(re.fullmatch(pattern, child) for child in names):
            raise matches_nothing(adapter.name, adapter.library, kind, pattern, names)

    blocks, gemms, attention = [], [], []
    for index, name in found:
        children = inside[name]
        in_block = _block_gemms(adapter, index, name, children)
        gemms += in_block
        attention += [
            AttentionMap(f"{name}.{child}", module, index, site.kind)
            for child, module in children.items()
            for site in adapter.attention
            if re.fullmatch(site.pattern, child)
        ]
        blocks.append(Block(index, name, modules[name], _lone_activation(adapter, name, children, in_block)))
    final = _final(adapter, modules)
    tied = final is not None and tied_to_embedding(model, final.module)
    return Sites(adapter, tuple(blocks), tuple(gemms), tuple(attention), final, tied)


def _children(block: str, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules below a block, by their name relative to it."""
    return {name.removeprefix(f"{block}."): m for name, m in modules.items() if name.startswith(f"{block}.")}


def _check_record(adapter: Adapter) -> None:
    """What can be wrong with the record itself."""
    patterns = [site.pattern for site in adapter.gemms] + [site.pattern for site in adapter.attention]
    patterns += [adapter.block, adapter.final_projection or "", adapter.activation or "", *adapter.left_dense]
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise AdapterError(
                f"adapter {adapter.name!r}: {pattern!r} is no regular expression: {error}. A literal dot is written \\."
            ) from None
        if pattern == adapter.block and compiled.groups != 1:
            raise AdapterError(
                f"adapter {adapter.name!r}: the block pattern {pattern!r} has {compiled.groups} groups, expected "
                f"exactly one, the block index: write (\\d+) for the index and (?:...) for every other group."
            )
    for site in adapter.gemms:
        for value, allowed in ((site.role, BLOCK_ROLES), (site.layout, get_args(Layout)), (site.parts, (1, 3))):
            if value not in allowed:
                raise AdapterError(
                    f"adapter {adapter.name!r}: site {site.pattern!r} says {value!r}, allowed is one of "
                    f"{', '.join(map(str, allowed))}"
                )


def _block_gemms(adapter: Adapter, index: int, block: str, children: Mapping[str, nn.Module]) -> list[Gemm]:
    """GEMMs of one block, each claimed by exactly one pattern, as many as the adapter says."""
    gemms, forgotten = [], []
    for child, module in children.items():
        claims = [site for site in adapter.gemms if re.fullmatch(site.pattern, child)]
        if len(claims) > 1:
            raise AdapterError(
                f"adapter {adapter.name!r}: `{block}.{child}` is claimed by two patterns, "
                f"{' and '.join(repr(site.pattern) for site in claims)}: make one of them narrower."
            )
        if claims:
            gemms.append(_gemm(f"{block}.{child}", module, claims[0], index))
        elif layout_of(module) and not any(re.fullmatch(pattern, child) for pattern in adapter.left_dense):
            forgotten.append(child)
    if len(gemms) != adapter.per_block or forgotten:
        missing = [site.pattern for site in adapter.gemms if not any(re.fullmatch(site.pattern, c) for c in children)]
        message = f"adapter {adapter.name!r}: block `{block}` has {len(gemms)} GEMMs, expected {adapter.per_block}"
        message += f"; no module matches {', '.join(map(repr, missing))}" if missing else ""
        if forgotten:
            message += f"; no pattern claims {', '.join(forgotten)}: add a GemmSite or name it in left_dense"
        raise AdapterError(f"{message}. {library_note(adapter.library)}.")
    return gemms


def _gemm(name: str, module: nn.Module, site: GemmSite, block: int | None) -> Gemm:
    out_features, in_features = features(name, module, site.layout)
    if site.parts == 3 and out_features % 3:
        raise AdapterError(
            f"`{name}` is said to hold Q, K and V (parts=3), but its {out_features} rows cannot be cut in three: "
            f"write parts=1 or correct the pattern {site.pattern!r}"
        )
    return Gemm(name, module, site.role, block, site.layout, site.parts, out_features, in_features)


def _lone_activation(
    adapter: Adapter, block: str, children: Mapping[str, nn.Module], gemms: Iterable[Gemm]
) -> str | None:
    """The block's activation, if nothing but dropout stands between it and the two FFN matrices in evaluation mode.

    A norm beside it (timm's ``scale_mlp_norm``) or a gate that halves the width (``GluMlp``) makes it None.
    """
    if adapter.activation is None:
        return None
    ffn = {gemm.role: gemm for gemm in gemms if gemm.role.startswith("ffn_")}
    child = next((child for child in children if re.fullmatch(adapter.activation, child)), None)
    if child is None or set(ffn) != {"ffn_up", "ffn_down"} or ffn["ffn_up"].out_features != ffn["ffn_down"].in_features:
        return None
    linears = {gemm.name.removeprefix(f"{block}.") for gemm in ffn.values()}
    return f"{block}.{child}" if only_dropout_beside(child, children, linears) else None


def _final(adapter: Adapter, modules: Mapping[str, nn.Module]) -> Gemm | None:
    """The last projection, if this model has one: a backbone has none, timm puts an ``nn.Identity`` in its place."""
    if adapter.final_projection is None:
        return None
    names = [
        name
        for name, module in modules.items()
        if re.fullmatch(adapter.final_projection, name) and not isinstance(module, nn.Identity)
    ]
    if len(names) > 1:
        raise AdapterError(
            f"adapter {adapter.name!r}: final_projection {adapter.final_projection!r} matches {', '.join(names)}, "
            f"expected one module or none: make the pattern narrower."
        )
    if not names:
        return None
    layout: Layout = "in_out" if layout_of(modules[names[0]]) == "in_out" else "out_in"
    return _gemm(names[0], modules[names[0]], GemmSite(adapter.final_projection, "final", layout), None)
