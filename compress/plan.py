"""The plan: recipe x adapter x model as plain data. Everything after it is a function of the plan.

It is made before anything is touched, can be printed, and travels with the checkpoint: loading uses the stored plan,
never the adapter's patterns again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..models import adapter_for
from ..models.adapter import Adapter, Gemm, Sites, find_sites
from .masks import Pattern
from .recipe import Recipe, Rule


class PlanError(ValueError):
    """A recipe that does not fit the model."""


@dataclass(frozen=True)
class PlannedGemm:
    """What happens to one GEMM.

    Args:
        name: full module name. role, block: from the adapter (block None for the final projection).
        shape: (out_features, in_features). layout, parts: see ``GemmSite``.
        sparsity: ``N:M`` or None. weight_bits, input_bits: None when that side is not quantized.
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
    weight_bits: int | None
    input_bits: int | None
    input_owner: str | None
    accelerated: bool
    reason: str

    @property
    def pattern(self) -> Pattern | None:
        return None if self.sparsity is None else Pattern.parse(self.sparsity)


@dataclass(frozen=True)
class Plan:
    """All GEMMs that a recipe touches in one model, in model order, and what it leaves alone with the reason."""

    adapter: str
    recipe: str
    gemms: tuple[PlannedGemm, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        gemms = tuple(PlannedGemm(**{**g, "shape": tuple(g["shape"])}) for g in data["gemms"])
        skipped = tuple((name, why) for name, why in data["skipped"])
        return cls(data["adapter"], data["recipe"], gemms, skipped)

    def summary(self) -> str:
        """What will happen, one line per role, for people."""
        lines = [f"plan: {self.recipe} on {self.adapter}: {len(self.gemms)} GEMMs, {self.weights:,} weights"]
        groups = Counter((g.role, g.shape, g.sparsity, g.weight_bits, g.input_bits, g.reason) for g in self.gemms)
        for (role, shape, sparsity, weight, inputs, reason), count in groups.items():
            what = ", ".join(
                text
                for text, present in (
                    (f"{sparsity} kept", sparsity),
                    (f"int{weight} weights", weight),
                    (f"int{inputs} inputs", inputs),
                )
                if present
            )
            note = f"  (no 2:4 kernel: {reason})" if reason else ""
            lines.append(f"  {count:3d} x {role:<9} [{shape[0]}, {shape[1]}]  {what}{note}")
        lines += [f"  left dense: {name}: {why}" for name, why in self.skipped]
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
    for gemm in (*sites.gemms, *((sites.final,) if sites.final else ())):
        rule = rule_of.get(gemm.role)
        if rule is None:
            continue
        if gemm.block is not None and gemm.block in rule.skip_blocks:
            skipped.append((gemm.name, f"the recipe skips block {gemm.block}"))
        elif gemm.role == "final" and sites.final_tied and not recipe.untie_final_projection:
            skipped.append((gemm.name, "tied to the input embedding; pruning it would prune the embedding"))
        else:
            planned.append(_planned(gemm, rule, sites, owners))
    if recipe.rules and not planned:
        have = sorted({g.role for g in sites.gemms})
        asked = sorted(rule_of)
        raise PlanError(f"recipe {recipe.name} asks for roles {asked}, this model has {have}: nothing to do")
    return Plan(adapter.name, recipe.name, tuple(planned), tuple(skipped))


def _check_blocks(recipe: Recipe, sites: Sites) -> None:
    known = {block.index for block in sites.blocks}
    for rule in recipe.rules:
        if unknown := sorted(set(rule.skip_blocks) - known):
            raise PlanError(f"rule skips block {unknown[0]}; this model has blocks 0 to {max(known)}")


def _planned(gemm: Gemm, rule: Rule, sites: Sites, owners: dict[tuple[str, str], str]) -> PlannedGemm:
    shape = (gemm.out_features, gemm.in_features)
    owner = None
    if rule.input is not None:
        owner = owners.setdefault(_input_tensor(gemm, sites), gemm.name)
    reason = _why_not_accelerated(shape, rule.sparsity)
    return PlannedGemm(
        name=gemm.name,
        role=gemm.role,
        block=gemm.block,
        shape=shape,
        layout=gemm.layout,
        parts=gemm.parts,
        sparsity=rule.sparsity,
        weight_bits=rule.weight.bits if rule.weight else None,
        input_bits=rule.input.bits if rule.input else None,
        input_owner=owner,
        accelerated=rule.sparsity == "2:4" and not reason,
        reason=reason,
    )


_SAME_INPUT = {
    "q": "self", "k": "self", "v": "self", "cross_k": "memory", "cross_v": "memory", "ffn_up": "ffn", "ffn_gate": "ffn",
}  # fmt: skip


def _input_tensor(gemm: Gemm, sites: Sites) -> tuple[str, str]:
    """A key that is equal for GEMMs that read the same tensor."""
    if gemm.role not in _SAME_INPUT:
        return gemm.name, ""
    block = next(block.name for block in sites.blocks if gemm.name.startswith(f"{block.name}."))
    return block, _SAME_INPUT[gemm.role]


def _why_not_accelerated(shape: tuple[int, int], sparsity: str | None) -> str:
    """Shape rule of the 2:4 kernels (NVIDIA/apex: out % 8 == 0 and in % 16 == 0); "" when one can take the GEMM."""
    if sparsity is None:
        return ""
    if sparsity != "2:4":
        return f"kernels take 2:4, not {sparsity}"
    out_features, in_features = shape
    if out_features % 8:
        return f"out_features {out_features} is not a multiple of 8"
    if in_features % 16:
        return f"in_features {in_features} is not a multiple of 16"
    return ""
