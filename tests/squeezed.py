"""Tiny models with a plan attached, and their scores: for tests that run over tests/tiny.py."""

from __future__ import annotations

import tiny
import torch
from squeezoo.compress.attach import attach_, prune_
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.masks import Pattern
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.models.dense import logits
from torch import Tensor, nn

TWO_FOUR = Pattern.parse("2:4")
PRUNE, GPUSQ = Recipe.load("magnitude-2-4"), Recipe.load("gpusq-gemm-int8")
FIRST = {row.adapter: name for name, row in reversed(tiny.ROWS.items())}  # the first row of each adapter


def scores(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return logits(model, tiny.tiny_batch(name))


def attached(name: str, recipe: Recipe = PRUNE) -> nn.Module:
    model = tiny.ALL[name]()
    attach_(model, make_plan(model, recipe))
    return model


def pruned(name: str, recipe: Recipe = PRUNE) -> nn.Module:
    model = attached(name, recipe)
    prune_(model)
    if recipe is not PRUNE:
        calibrate_(model, [tiny.tiny_batch(name)])
    return model
