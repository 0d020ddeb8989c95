"""One sparse linear layer with a policy on it, and tiny models whose fine-tuning the policy tests look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from squeezoo.compress.attach import CompressedWeight, attach_
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.plan import Plan, PlannedGemm, make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.stages import Finetune
from squeezoo.compress.train_data import TrainData
from tiny import ALL, tiny_batch
from torch import nn

VECTORS = Path(__file__).parent / "vectors"


def vector(name: str) -> dict[str, Any]:
    return json.loads((VECTORS / f"{name}.json").read_text())


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def layer(w_OI: torch.Tensor, sparsity: str, layout: str = "out_in", parts: int = 1) -> nn.Sequential:
    """A model of one attached linear (or Conv1D-like) layer ``0`` with weight ``w_OI``, no bias."""
    return layers([w_OI], sparsity, layout, parts)


def layers(weights: list[torch.Tensor], sparsity: str, layout: str = "out_in", parts: int = 1) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype) for w in weights))
    gemms = []
    for index, (module, w_OI) in enumerate(zip(model, weights)):
        module.weight = nn.Parameter(w_OI.t().contiguous() if layout == "in_out" else w_OI.clone())
        gemms.append(planned(str(index), tuple(w_OI.shape), sparsity, layout, parts))
    attach_(model, Plan("none", "none", tuple(gemms)))
    return model


def planned(name: str, shape: tuple[int, int], sparsity: str, layout: str, parts: int) -> PlannedGemm:
    return PlannedGemm(name, "ffn_up", 0, shape, layout, parts, sparsity, None, None, None, False, "")


def parametrization(model: nn.Module, index: int = 0) -> CompressedWeight:
    return model[index].parametrizations["weight"][0]


def latent(model: nn.Module, index: int = 0) -> nn.Parameter:
    return model[index].parametrizations["weight"].original


def data_for(name: str, samples: int = 10) -> TrainData:
    """Rows of random data."""
    batch = tiny_batch(name, samples)
    features = [{key: value[i] for key, value in batch.items()} for i in range(samples)]
    return TrainData(features, lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]})


LSQ8 = {"weight": {"bits": 8}, "input": {"bits": 8}}


def student_for(name: str, policy: Any, sparsity: str, quantized: Any = None) -> nn.Module:
    """An attached tiny model at the beginning of a stage with that policy; quantizers of the rule calibrated."""
    model = tiny_with_dropout(name)
    rule: dict[str, Any] = {"roles": ["block"], "sparsity": sparsity}
    stages: list[dict[str, Any]] = [stage_for(policy).model_dump(mode="json")]
    if quantized:
        rule |= quantized
        stages.insert(0, {"stage": "calibrate"})
    if policy in ("fixed", None):
        stages.insert(0, {"stage": "prune"})
    body = {"name": "test", "description": "d", "source": "s", "rules": [rule], "stages": stages}
    attach_(model, make_plan(model, Recipe.parse(body)))
    if quantized:
        calibrate_(model, [tiny_batch(name)])
    return model


def stage_for(policy: Any, **settings: Any) -> Finetune:
    """2 epochs of batches of 4 at 1e-3, unless said otherwise."""
    body: dict[str, Any] = {"stage": "finetune", "learning_rate": 1e-3, "batch_size": 4, "policy": policy or "fixed"}
    iterative = isinstance(policy, dict) and policy["method"] == "iterative"
    if not iterative and "steps" not in settings:
        body["epochs"] = 2
    return Finetune.model_validate(body | settings)


def tiny_with_dropout(name: str) -> nn.Module:
    """Dropout makes the random state part of what must resume."""
    model = ALL[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return model
