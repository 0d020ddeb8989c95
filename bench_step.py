"""Part ``step`` of `squeezoo bench-engine`: a training step with fake quantization against the dense one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .bench_engine import Say, in_turn
from .compress.attach import attach_, parameters_without_decay, prune_
from .compress.calibrate import calibrate_
from .compress.plan import make_plan
from .compress.recipe import Recipe
from .eval.speed import make_batch
from .models.dense import load_dense, logits


def step_part(source: str, batch: int, sequence: int, repeats: int, say: Say = lambda _: None) -> dict[str, Any]:
    """Seconds of a training step (forward, backward, AdamW) of the dense model and of the one attached with
    ``gpusq-gemm-int8``: learned scales of every weight and input, 2:4 masks."""
    dense, squeezed = (load_dense(source, num_labels=2).model for _ in range(2))
    inputs = make_batch(dense, batch, sequence)
    labels = torch.randint(2, (batch,), generator=torch.Generator().manual_seed(1))
    attach_(squeezed, make_plan(squeezed, Recipe.load("gpusq-gemm-int8")))
    prune_(squeezed)
    calibrate_(squeezed, [inputs])

    def step_of(model: torch.nn.Module) -> Callable[[], None]:
        plain = set(parameters_without_decay(model))
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in model.named_parameters() if name not in plain]},
            {"params": [p for name, p in model.named_parameters() if name in plain], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-5)
        model.train()

        def step() -> None:
            torch.nn.functional.cross_entropy(logits(model, inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    ms = in_turn({"dense": step_of(dense), "fake-quantized": step_of(squeezed)}, repeats)
    ratio = ms["fake-quantized"] / ms["dense"]
    say(f"  dense {ms['dense']:.0f} ms, fake-quantized {ms['fake-quantized']:.0f} ms, {ratio:.2f} times")
    return {
        "model": source, "batch": batch, "sequence": sequence, "repeats": repeats, "ms": ms, "ratio": ratio,
        "targets": {"a fake-quantized step at most 1.6 times the dense one": ratio <= 1.6},
    }  # fmt: skip
