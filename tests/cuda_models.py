"""Tiny models with 2:4 integer weights, as the CUDA runtime and as the reference; used with and without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import tiny
import torch
from gemms import quantize
from squeezed import pruned
from squeezoo.compress.attention_map import activate_attention_
from squeezoo.compress.checkpoint import save_checkpoint
from squeezoo.compress.masks import Pattern, nm_mask
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.runtime import QuantizedGemm, use_reference_
from squeezoo.models import all_adapters
from squeezoo.models.adapter import Sites, find_sites
from squeezoo.models.dense import logits
from torch import Tensor, nn

DEVICE = "cuda"  # of the tests in tests/gpu


def two_of_four(gemm: QuantizedGemm) -> QuantizedGemm:
    """The same GEMM with the two smaller of each four weights set to 0."""
    w_OI = gemm.weight_q_OI
    mask_OI = nm_mask(w_OI.float().abs(), Pattern(2, 4))
    return QuantizedGemm(gemm.name, w_OI * mask_OI, gemm.scale_O, gemm.input, gemm.bias_O)


def sites_of(model: nn.Module, name: str) -> Sites:
    return find_sites(model, all_adapters()[tiny.ROWS[name].adapter])


@cache
def _made(name: str) -> tuple[nn.Module, dict[str, QuantizedGemm], Tensor]:
    model = tiny.ALL[name]()
    batch = tiny.tiny_batch(name, seed=5)
    with torch.no_grad():
        gemms = quantize(model, sites_of(model, name), lambda: logits(model, batch))
        gemms = {key: two_of_four(gemm) for key, gemm in gemms.items()}
        slow = copy.deepcopy(model)
        use_reference_(slow, sites_of(slow, name), gemms)
        return model, gemms, logits(slow, batch)


def pruned_model(name: str) -> tuple[nn.Module, Sites, dict[str, QuantizedGemm], Tensor]:
    """A fresh float model, its sites, 2:4 GEMMs for all, and the reference's logits for ``tiny_batch(seed=5)``."""
    model, gemms, expected = _made(name)
    model = copy.deepcopy(model)
    return model, sites_of(model, name), dict(gemms), expected


def saved(name: str, recipe: Recipe, folder: Path) -> Path:
    """A checkpoint of a tiny model, pruned and calibrated but not trained, its attention maps switched on."""
    model = pruned(name, recipe)
    activate_attention_(model)
    plan = make_plan(tiny.ALL[name](), recipe)
    return save_checkpoint(model, plan, recipe, folder, name=name, base={"name": "tiny", "revision": None})


def moved(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch on the GPU."""
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}
