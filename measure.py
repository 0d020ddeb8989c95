"""What a card tells beside scores, sizes and speed: decoding, loading, memory, energy, and a model of other GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from .compress.checkpoint import load_manifest
from .eval.decode_speed import benchmark_decode
from .eval.environment import environment
from .eval.loading import Loading, Memory
from .eval.speed import make_batch
from .timings import Point, measure_loadings
from .zoo_cards.card import COMPRESSED, DENSE
from .zoo_cards.inference import inference_energy, modelled, training_energy
from .zoo_cards.resources import LoadingRow, Machine, MemoryRow, Resources


def extra_measurements(
    folder: str | Path,
    dense_folder: str | Path,
    dense: nn.Module,
    compressed: nn.Module,
    conditions: Sequence[Point],
    *,
    decode: int | None = None,
    repeats: int = 30,
    backend: str = "auto",
    device: str = "cpu",
    estimate: bool = False,
    energy_seconds: float = 10.0,
    progress: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Resources:
    """Everything of `Resources` for a checkpoint and its dense model, at the last condition; decoding at all of them.

    Args:
        decode: new tokens after each prompt, for models that write; None leaves decoding out.
        estimate: let codecarbon speak for terms of energy without a sensor. energy_seconds: per variant.
    """
    point = conditions[-1]
    inputs = make_batch(dense, point.batch, point.sequence, audio_seconds=point.audio_seconds)
    prompts = [one for one in conditions if decode is not None and one.sequence is not None]
    decoded = [
        benchmark_decode(
            dense, compressed, batch=one.batch, prompt=one.sequence or 1, new_tokens=decode or 1, repeats=repeats,
            device=device, progress=progress,
        )
        for one in prompts
    ]  # fmt: skip
    found = measure_loadings(folder, dense_folder, point, backend, device, say)
    loadings = [part for part in found if isinstance(part, Loading)]
    memories = [part for part in found if isinstance(part, Memory)]
    energy = [training_energy(DENSE, dense_folder), training_energy(COMPRESSED, folder)]
    for variant, model in ((DENSE, dense), (COMPRESSED, compressed)):
        say(f"energy of {variant}")
        energy.append(
            inference_energy(
                variant, model, inputs, str(point), seconds=energy_seconds, device=device, estimate=estimate
            )
        )
    return Resources(
        decode=tuple(decoded),
        loading=tuple(LoadingRow(*pair) for pair in zip((DENSE, COMPRESSED), loadings, strict=True)),
        memory=tuple(MemoryRow(*pair) for pair in zip((DENSE, COMPRESSED), memories, strict=True)),
        energy=tuple(row for row in energy if row is not None),
        modelled=modelled(compressed, load_manifest(folder).plan, _on(inputs, device), str(point)),
        machine=Machine.of(environment()),
    )


def _on(inputs: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}
