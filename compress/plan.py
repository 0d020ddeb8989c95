"""The plan: recipe x adapter x model as plain data. Everything after it is a function of the plan.

It is made before anything is touched, can be printed, and travels with the checkpoint: loading uses the stored plan,
never the adapter's patterns again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ..models import adapter_for
from ..models.adapter import Adapter, Gemm, Sites, find_sites
from .masks import Pattern
from .plan_reasons import has_nothing_to_inherit, why_not_accelerated, why_tied_stays
from .recipe import Recipe
from .rules import AttentionRule, Rule, Unstructured, parse_sparsity
from .stages import Prune

Quantization = Mapping[str, Any]  # a quantizer record of the recipe as plain data: method, bits, ...


class PlanError(ValueError):
    """A recipe that does not fit the model."""


@dataclass(frozen=True)
class PlannedGemm:
    """What happens to one GEMM.

    Args:
        name: full module name. role, block: from the adapter (block None for the final projection).
        shape: (out_features, in_features). layout, parts: see ``GemmSite``.
        sparsity: ``N:M``, a share of zeros such as ``50%``, or None.
        weight, input: the quantizer of that side as plain data (``{"method": "lsq", "bits": 8}``), or None.
        input_owner: the GEMM whose input quantizer this one uses: Q, K and V read the same tensor, so they share one
            scale (LSQ: one scale per activation tensor) and the runtime quantizes that tensor once.
        accelerated: whether a hardware 2:4 kernel can take it; ``reason`` says why not.
    """

    name: str
    role: str
    block: int | None
    shape: tuple[int, int]
    layout: str
    parts: int
    sparsity: str | None
    weight: Quantization | None
    input: Quantization | None
    input_owner: str | None
    accelerated: bool
    reason: str

    @property
    def pattern(self) -> Pattern | None:
        """The N:M pattern; None for dense and unstructured GEMMs."""
        parsed = None if self.sparsity is None else parse_sparsity(self.sparsity)
        return parsed if isinstance(parsed, Pattern) else None

    @property
    def unstructured(self) -> Unstructured | None:
        parsed = None if self.sparsity is None else parse_sparsity(self.sparsity)
        return parsed if isinstance(parsed, Unstructured) else None

    @property
    def weight_bits(self) -> int | None:
        return None if self.weight is None else int(self.weight["bits"])

    @property
    def input_bits(self) -> int | None:
        return None if self.input is None else int(self.input["bits"])


@dataclass(frozen=True)
class PlannedAttention:
    """What happens to one attention map: N of M kept per group of keys, and quantizers of Q, K, P and V."""

    name: str
    block: int
    kind: str
    sparsity: str | None
    renormalize: bool
    q: Quantization | None
    k: Quantization | None
    p: Quantization | None
    v: Quantization | None

    @property
    def pattern(self) -> Pattern | None:
        return None if self.sparsity is None else Pattern.parse(self.sparsity)


@dataclass(frozen=True)
class PlannedEmbedding:
    """One embedding table [rows, width] stored, or trained (``q8bert``), as integers with a scale per row or table."""

    name: str
    rows: int
    width: int
    method: str
    bits: int


@dataclass(frozen=True)
class Plan:
    """All that a recipe touches in one model, in model order, and what it leaves alone with the reason."""

    adapter: str
    recipe: str
    gemms: tuple[PlannedGemm, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    attention: tuple[PlannedAttention, ...] = ()
    embeddings: tuple[PlannedEmbedding, ...] = ()
    untied: str | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        return cls(
            data["adapter"],
            data["recipe"],
            tuple(PlannedGemm(**{**gemm, "shape": tuple(gemm["shape"])}) for gemm in data["gemms"]),
            tuple((name, why) for name, why in data["skipped"]),
            tuple(PlannedAttention(**site) for site in data.get("attention", ())),
            tuple(PlannedEmbedding(**table) for table in data.get("embeddings", ())),
            data.get("untied"),
            tuple(data.get("notes", ())),
        )

    def summary(self) -> str:
        """What will happen, one line per role, for people."""
        lines = [f"plan: {self.recipe} on {self.adapter}: {len(self.gemms)} GEMMs, {self.weights:,} weights"]
        kinds = [(g.role, g.shape, g.sparsity, _words(g.weight), _words(g.input), g.reason) for g in self.gemms]
        for (role, shape, sparsity, weight, inputs, reason), count in Counter(kinds).items():
            kept = f"{sparsity} kept" if sparsity and ":" in sparsity else f"{sparsity} zeros" if sparsity else ""
            what = [kept, f"{weight} weights" if weight else "", f"{inputs} inputs" if inputs else ""]
            note = f"  (no 2:4 kernel: {reason})" if reason else ""
            lines.append(f"  {count:3d} x {role:<9} [{shape[0]}, {shape[1]}]  {', '.join(filter(None, what))}{note}")
        maps = Counter((a.kind, a.sparsity, *(_words(q) for q in (a.q, a.k, a.p, a.v))) for a in self.attention)
        for (kind, sparsity, *sides), count in maps.items():
            what = [f"{sparsity} kept" if sparsity else ""]
            what += [f"{words} {side}" if words else "" for side, words in zip("QKPV", sides, strict=True)]
            lines.append(f"  {count:3d} x {kind} attention map  {', '.join(filter(None, what))}")
        lines += [f"  embedding {e.name} [{e.rows}, {e.width}]  int{e.bits} ({e.method})" for e in self.embeddings]
        lines += [
            f"  {g.name} gets a matrix of its own, no longer the embedding: {g.shape[0] * g.shape[1]:,} weights more"
            for g in self.gemms
            if g.name == self.untied
        ]
        lines += [f"  note: {name}: {why}" for name, why in self.skipped]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    @property
    def weights(self) -> int:
        """Number of weights in the planned GEMMs, zeros included."""
        return sum(g.shape[0] * g.shape[1] for g in self.gemms)


def make_plan(model: nn.Module, recipe: Recipe, adapter: Adapter | None = None) -> Plan:
    """Join a recipe and a model. Changes nothing.

    Raises:
        AdapterError: the adapter does not fit the model.
        PlanError: a rule touches no GEMM of this model, or skips a block that does not exist.
    """
    adapter = adapter or adapter_for(model)
    sites = find_sites(model, adapter)
    _check_blocks(recipe, sites)
    rule_of = {role: rule for rule in recipe.rules for role in rule.roles}
    planned: list[PlannedGemm] = []
    skipped: list[tuple[str, str]] = []
    owners: dict[tuple[str, str], str] = {}
    untied = None
    inherits = any(isinstance(stage, Prune) and stage.method == "inherit" for stage in recipe.stages)
    for gemm in (*sites.gemms, *sites.pooler, *((sites.final,) if sites.final else ())):
        rule = rule_of.get(gemm.role)
        if rule is None:
            continue
        if gemm.block is not None and gemm.block in rule.skip_blocks:
            skipped.append((gemm.name, f"the recipe skips block {gemm.block}"))
            continue
        if gemm.role == "final" and sites.final_tied and not recipe.untie_final_projection:
            skipped.append((gemm.name, why_tied_stays(rule, recipe)))
            continue
        if inherits and rule.sparsity and has_nothing_to_inherit(gemm):
            skipped.append((gemm.name, "stays without zeros: it has none to inherit, the pruned model did not have it"))
            rule = rule.model_copy(update={"sparsity": None})
            if rule.weight is None:
                continue
        untied = gemm.name if gemm.role == "final" and sites.final_tied else untied
        planned.append(_planned(gemm, rule, sites, owners))
    attention = _planned_attention(recipe.attention, sites)
    tables = _planned_embeddings(recipe, sites)
    if recipe.embeddings and not tables:
        skipped.append(("embeddings", "this model has no embedding table; the rest of the recipe applies"))
    if (recipe.rules or recipe.attention) and not planned and not attention:
        have = sorted({g.role for g in sites.gemms})
        asked = sorted(rule_of)
        raise PlanError(f"recipe {recipe.name} asks for roles {asked}, this model has {have}: nothing to do")
    return Plan(adapter.name, recipe.name, tuple(planned), tuple(skipped), attention, tables, untied, recipe.notes)


def _planned_attention(rule: AttentionRule | None, sites: Sites) -> tuple[PlannedAttention, ...]:
    if rule is None:
        return ()
    sides = [None if q is None else q.model_dump(mode="json") for q in (rule.q, rule.k, rule.p, rule.v)]
    return tuple(
        PlannedAttention(found.name, found.block, found.kind, rule.sparsity, rule.renormalize, *sides)
        for found in sites.attention
        if found.kind in rule.kinds and found.block not in rule.skip_blocks
    )


def _planned_embeddings(recipe: Recipe, sites: Sites) -> tuple[PlannedEmbedding, ...]:
    rule = recipe.embeddings
    if rule is None:
        return ()
    if not sites.embeddings and not recipe.rules and not recipe.attention:
        raise PlanError(
            f"recipe {recipe.name} asks for int{rule.bits} embeddings and nothing else; this model has no embedding "
            "table: add `rules`"
        )
    shapes = [
        (table.name, weight.shape) for table in sites.embeddings if isinstance(weight := table.module.weight, Tensor)
    ]
    return tuple(PlannedEmbedding(name, rows, width, rule.method, rule.bits) for name, (rows, width) in shapes)


def _words(quantization: Quantization | None) -> str:
    """``int8``, or ``int8 (sawb)`` where the method is not the default."""
    if quantization is None:
        return ""
    method = "" if quantization["method"] == "lsq" else f" ({quantization['method']})"
    return f"int{quantization['bits']}{method}"


def _check_blocks(recipe: Recipe, sites: Sites) -> None:
    known = {block.index for block in sites.blocks}
    rules = (*recipe.rules, *((recipe.attention,) if recipe.attention else ()))
    for rule in rules:
        if unknown := sorted(set(rule.skip_blocks) - known):
            raise PlanError(f"rule skips block {unknown[0]}; this model has blocks 0 to {max(known)}")


def _planned(gemm: Gemm, rule: Rule, sites: Sites, owners: dict[tuple[str, str], str]) -> PlannedGemm:
    shape = (gemm.out_features, gemm.in_features)
    owner = None
    if rule.input is not None:
        owner = owners.setdefault(input_tensor(gemm, sites), gemm.name)
    reason = why_not_accelerated(shape, rule.sparsity)
    return PlannedGemm(
        name=gemm.name,
        role=gemm.role,
        block=gemm.block,
        shape=shape,
        layout=gemm.layout,
        parts=gemm.parts,
        sparsity=rule.sparsity,
        weight=rule.weight.model_dump(mode="json") if rule.weight else None,
        input=rule.input.model_dump(mode="json") if rule.input else None,
        input_owner=owner,
        accelerated=rule.sparsity == "2:4" and not reason,
        reason=reason,
    )


_SAME_INPUT = {
    "q": "self", "k": "self", "v": "self", "cross_k": "memory", "cross_v": "memory", "ffn_up": "ffn", "ffn_gate": "ffn",
}  # fmt: skip


def input_tensor(gemm: Gemm, sites: Sites) -> tuple[str, str]:
    """A key that is equal for GEMMs that read the same tensor."""
    if gemm.role not in _SAME_INPUT:
        return gemm.name, ""
    block = next(block.name for block in sites.blocks if gemm.name.startswith(f"{block.name}."))
    return block, _SAME_INPUT[gemm.role]
