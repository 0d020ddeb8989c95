"""What inference costs, measured for a card: energy of a fixed condition, and the roofline model's word on it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..compress.plan import Plan
from ..eval.energy import INTENSITY, PUE, Energy, measure_energy
from ..eval.hardware import get_hardware
from ..eval.roofline import predict_model
from ..eval.runner import evaluating
from ..models.dense import logits
from .resources import EnergyRow, Modelled

HARDWARE = ("A100-SXM-80GB", "H100-SXM", "H200-SXM")


def inference_energy(
    variant: str,
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    words: str,
    *,
    seconds: float = 10.0,
    device: str = "cpu",
    estimate: bool = False,
    pue: float = PUE,
    intensity: float = INTENSITY["us"],
) -> EnergyRow:
    """Energy of running one batch again and again for ``seconds``, after one untimed call.

    Without any sensor a single call is made: the record then holds the reasons, and no number.

    Args:
        inputs: the batch, see ``eval.speed.make_batch``. words: the condition, for the table.
        estimate, pue, intensity: see `eval.energy.measure_energy`.

    Raises:
        ImportError: ``estimate`` without codecarbon.
    """
    place = torch.device(device)
    batch = {name: tensor.to(place) for name, tensor in inputs.items()}
    rows = next(iter(batch.values())).shape[0]
    model.to(place)

    def run(least: float) -> EnergyRow:
        calls, started = 0, time.monotonic()
        with measure_energy(device=device, estimate=estimate, pue=pue, intensity=intensity) as meter:
            while not calls or time.monotonic() - started < least:
                logits(model, batch)
                if place.type == "cuda":
                    torch.cuda.synchronize(place)
                calls += 1
        return EnergyRow(variant, f"inference, {words}", calls * rows, meter.energy)

    with evaluating(model):
        logits(model, batch)
        probe = run(0.0)
        return probe if probe.energy.kwh is None else run(seconds)


def training_energy(variant: str, folder: str | Path, name: str = "energy.json") -> EnergyRow | None:
    """What ``--energy`` left in a folder that was trained; None where it left nothing.

    Raises:
        ValueError: the file is damaged; names it.
    """
    path = Path(folder) / name
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        resumed = data.pop("resumed", False)
        energy = Energy.from_dict(data)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of energy: {error}") from error
    return EnergyRow(variant, f"training{', since it was resumed' if resumed else ', all stages'}", None, energy)


def gemm_rows(model: nn.Module, names: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Rows that each named module reads in one forward: tokens x batch, whatever the architecture; without those that
    are never called."""
    rows: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                rows[name] = rows.get(name, 0) + args[0].numel() // args[0].shape[-1]

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in names]
    try:
        with evaluating(model):
            logits(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def modelled(
    model: nn.Module,
    plan: Plan,
    inputs: Mapping[str, Tensor],
    words: str,
    hardware: Sequence[str] = HARDWARE,
    dense_format: str = "fp16",
) -> tuple[Modelled, ...]:
    """The roofline model's times of the plan's GEMMs for this batch; nothing is timed.

    Args:
        model: dense or compressed; it is run once to count the rows of every GEMM.

    Raises:
        ValueError: unknown hardware. KeyError: a GEMM that the model never calls as a module.
    """
    gemms = plan.to_dict()["gemms"]
    if not gemms:
        return ()
    rows = gemm_rows(model, [gemm["name"] for gemm in gemms], inputs)
    return tuple(
        Modelled.of(
            predict_model(gemms, lambda gemm: rows[gemm["name"]], get_hardware(name), dense_format=dense_format), words
        )
        for name in hardware
    )
