"""What a model is made of: ``find_sites`` looks an adapter's GEMMs, attention maps, tables and blocks up in a model.

The records are in ``record.py``, what is found in ``sites.py``. All is checked, and nothing here changes a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import nn

from .errors import AdapterError, library_note, matches_nothing
from .linear import features, layout_of, nothing_beside, tied_to_embedding
from .record import (
    BLOCK_ROLES,
    ONE_KIND,
    ROLES,
    Adapter,
    AttentionSite,
    GemmSite,
    Layout,
    Permutable,
    Role,
    check_record,
)
from .sites import AttentionMap, Block, Gemm, Sites, Table

__all__ = [
    "BLOCK_ROLES",
    "ROLES",
    "Adapter",
    "AttentionMap",
    "AttentionSite",
    "Block",
    "Gemm",
    "GemmSite",
    "Layout",
    "Permutable",
    "Role",
    "Sites",
    "Table",
    "find_sites",
]


def find_sites(model: nn.Module, adapter: Adapter) -> Sites:
    """Look up every site of ``adapter`` in ``model`` and check all of it; the model is not changed.

    Works on dense and on attached (parametrized) models, with or without a head.

    Raises:
        AdapterError: patterns match nothing (all of them are listed) or are no regular expressions, two patterns claim
            one module, a layout contradicts the module's class, a fused QKV matrix cannot be cut in three, a block has
            the wrong number of GEMMs or attention maps, a linear of a block is claimed by no pattern, or there is no
            block at all.
    """
    check_record(adapter)
    modules = dict(model.named_modules())
    found = _numbered_blocks(adapter, modules)
    inside = {name: _children(name, modules) for _, name, _ in found}
    _check_patterns(adapter, modules, inside)

    blocks, gemms, attention = [], [], []
    for index, name, kind in found:
        children = inside[name]
        in_block = _block_gemms(adapter, index, name, kind, children)
        gemms += in_block
        attention += _block_attention(adapter, index, name, children, in_block)
        activation = _lone_activation(adapter, name, children, in_block)
        permutable = tuple(p for p in adapter.permutable if _holds(p, children, in_block))
        blocks.append(Block(index, name, modules[name], activation, kind, permutable))
    final = _final(adapter, modules)
    tied = final is not None and tied_to_embedding(model, final.module)
    pooler = [(name, modules[name]) for name in _matches(adapter.pooler, modules)]
    return Sites(
        adapter, tuple(blocks), tuple(gemms), tuple(attention), final, tied,
        tuple(_outside(name, module, "pooler") for name, module in pooler if not isinstance(module, nn.Identity)),
        tuple(Table(name, modules[name]) for name in _matches(adapter.embeddings, modules)),
    )  # fmt: skip


def _numbered_blocks(adapter: Adapter, modules: Mapping[str, nn.Module]) -> list[tuple[int, str, str]]:
    """(index, name, kind) of every block in model order; indices of a kind start after those of the kinds before it."""
    found: list[tuple[int, str, str]] = []
    for name in modules:
        if match := re.fullmatch(adapter.block, name):
            kind = match.groupdict().get("kind", ONE_KIND)
            number = next(
                text for place, text in enumerate(match.groups(), 1) if place != match.re.groupindex.get("kind")
            )
            if number is not None and number.isdecimal():
                found.append((int(number), name, kind))
    if unknown := {kind for *_, kind in found} - set(adapter.kinds):
        raise AdapterError(
            f"adapter {adapter.name!r}: the block pattern {adapter.block!r} finds blocks of kind "
            f"{sorted(unknown)[0]!r}, per_block knows {', '.join(adapter.kinds)}"
        )
    start, starts = 0, {}
    for kind in adapter.kinds:
        starts[kind] = start
        start += max((index + 1 for index, _, of in found if of == kind), default=0)
    return [(starts[kind] + index, name, kind) for index, name, kind in found]


def _children(block: str, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Modules below a block, by their name relative to it."""
    return {name.removeprefix(f"{block}."): m for name, m in modules.items() if name.startswith(f"{block}.")}


def _check_patterns(
    adapter: Adapter, modules: Mapping[str, nn.Module], inside: Mapping[str, Mapping[str, nn.Module]]
) -> None:
    """Every pattern that must be somewhere is there; all that are not are named in one error, each with the nearest
    names that no other pattern has."""
    in_blocks = {child: module for children in inside.values() for child, module in children.items()}
    wanted: list[tuple[str, str, Mapping[str, nn.Module]]] = []
    if inside:
        wanted += [("GEMM", site.pattern, in_blocks) for site in adapter.gemms]
        wanted += [("attention", site.pattern, in_blocks) for site in adapter.attention]
        wanted += [("activation", adapter.activation, in_blocks)] if adapter.activation is not None else []
    wanted += [("embeddings", adapter.embeddings, modules)] if adapter.embeddings is not None else []
    claimed = {name for _, pattern, names in wanted for name in _matches(pattern, names)}
    lost = []
    for kind, pattern, names in wanted:
        if not _matches(pattern, names):
            free = [name for name in names if name not in claimed]
            linears = [name for name in free if layout_of(names[name])]
            lost.append((kind, pattern, linears if kind == "GEMM" and linears else free))
    if not inside:  # and then the patterns inside a block cannot be tried
        numbered = [name for name in modules if name.rpartition(".")[2] == "0"]
        lost.insert(0, ("block", adapter.block, numbered or [*modules]))
    if lost:
        raise matches_nothing(adapter.name, adapter.library, lost)


def _block_gemms(adapter: Adapter, index: int, block: str, kind: str, children: Mapping[str, nn.Module]) -> list[Gemm]:
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
    expected = adapter.kinds[kind]
    if len(gemms) != expected or forgotten:
        missing = [site.pattern for site in adapter.gemms if not any(re.fullmatch(site.pattern, c) for c in children)]
        message = f"adapter {adapter.name!r}: block `{block}` has {len(gemms)} GEMMs, expected {expected}"
        message += f"; no module matches {', '.join(map(repr, missing))}" if missing else ""
        if forgotten:
            message += f"; no pattern claims {', '.join(forgotten)}: add a GemmSite or name it in left_dense"
        raise AdapterError(f"{message}. {library_note(adapter.library)}.")
    return gemms


def _block_attention(
    adapter: Adapter, index: int, block: str, children: Mapping[str, nn.Module], gemms: Iterable[Gemm]
) -> list[AttentionMap]:
    """Attention maps of one block: one of each kind that its GEMMs belong to, where the record declares that kind."""
    found = []
    for site in adapter.attention:
        for child in _innermost(name for name in children if re.fullmatch(site.pattern, name)):
            module = children[child]
            head_dim = next((getattr(module, name) for name in site.head_dim if hasattr(module, name)), None)
            found.append(AttentionMap(f"{block}.{child}", module, index, site.kind, head_dim))
    roles = {gemm.role for gemm in gemms}
    for kind, projections in (("self", {"q", "qkv"}), ("cross", {"cross_q"})):
        declared = [site.pattern for site in adapter.attention if site.kind == kind]
        maps = [entry.name for entry in found if entry.kind == kind]
        expected = 1 if roles & projections else 0
        if declared and len(maps) != expected:
            raise AdapterError(
                f"adapter {adapter.name!r}: block `{block}` has {len(maps)} {kind}-attention maps "
                f"({', '.join(maps) or 'none'}), expected {expected} by its {'/'.join(sorted(projections))} GEMMs; the "
                f"patterns are {', '.join(map(repr, declared))}. {library_note(adapter.library)}."
            )
    return found


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
    harmless = {gemm.name.removeprefix(f"{block}.") for gemm in ffn.values()}
    harmless |= {name for name in children if any(re.fullmatch(p, name) for p in adapter.beside_activation)}
    return f"{block}.{child}" if nothing_beside(child, children, harmless) else None


def _holds(entry: Permutable, children: Mapping[str, nn.Module], gemms: Iterable[Gemm]) -> bool:
    """Whether a permutation that the record allows is right in this block: nothing in between, and shapes that fit."""
    if entry.unless is not None and any(
        re.fullmatch(entry.unless, child) and not isinstance(module, nn.Identity) for child, module in children.items()
    ):
        return False
    by_role: dict[str, list[Gemm]] = {}
    for gemm in gemms:
        by_role.setdefault(gemm.role, []).append(gemm)
    if any(len(by_role.get(role, [])) != 1 for role in (entry.consumer_role, *entry.producer_roles)):
        return False
    columns = by_role[entry.consumer_role][0].in_features
    rows = [by_role[role][0].out_features // by_role[role][0].parts for role in entry.producer_roles]
    # With grouped heads several heads of the consumer share the rows of one V head.
    return all(columns == count if entry.within == "all" else columns % count == 0 for count in rows)


def _final(adapter: Adapter, modules: Mapping[str, nn.Module]) -> Gemm | None:
    """The last projection, if this model has one: a backbone has none, timm puts an ``nn.Identity`` in its place."""
    matches = _matches(adapter.final_projection, modules)
    names = [name for name in _innermost(matches) if not isinstance(modules[name], nn.Identity)]
    names = [name for name in names if getattr(modules[name], "weight", True) is not None]  # Megatron: the embedding's
    if len(names) > 1:
        raise AdapterError(
            f"adapter {adapter.name!r}: final_projection {adapter.final_projection!r} matches {', '.join(names)}, "
            f"expected one module or none: make the pattern narrower."
        )
    return _outside(names[0], modules[names[0]], "final") if names else None


def _outside(name: str, module: nn.Module, role: Role) -> Gemm:
    """A linear outside the blocks, in whichever layout its class has."""
    layout: Layout = "in_out" if layout_of(module) == "in_out" else "out_in"
    return _gemm(name, module, GemmSite(re.escape(name), role, layout), None)


def _matches(pattern: str | None, names: Iterable[str]) -> list[str]:
    return [] if pattern is None else [name for name in names if re.fullmatch(pattern, name)]


def _innermost(names: Iterable[str]) -> list[str]:
    """Without those that contain another one: RoBERTa's ``classifier`` is the container of ``classifier.out_proj``."""
    names = list(names)
    return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
