"""Why a plan leaves something of a model alone, as one line each for people."""

from __future__ import annotations

from ..models.adapter import Gemm
from .recipe import Recipe
from .rules import Rule


def has_nothing_to_inherit(gemm: Gemm) -> bool:
    """A matrix outside the blocks without a zero: new, as the pooler above a model that was pruned without one."""
    return gemm.block is None and not bool((gemm.weight_OI.detach() == 0).any())


def why_tied_stays(rule: Rule, recipe: Recipe) -> str:
    """Why a final projection that is the input embedding is left alone, by what the recipe asks for (A.3, D.8)."""
    quantized = rule.weight is not None
    verb = "prune and quantize" if rule.sparsity and quantized else "quantize" if quantized else "prune"
    why = f"left as it is, being tied to the input embedding: to {verb} it would {verb} the embedding too"
    if recipe.embeddings and not rule.sparsity:
        why = "left as it is, being tied to the input embedding, whose integers it reads: its inputs are not quantized"
    return f"{why}. `untie_final_projection: true` in a copy of the recipe gives it a matrix of its own"


def why_not_accelerated(shape: tuple[int, int], sparsity: str | None) -> str:
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
