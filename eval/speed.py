"""Speed of a compressed model against its dense one, both measured in one interleaved run on named hardware."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..models.dense import logits
from .environment import device_name, library_versions
from .fields import checked_fields, require_count, require_libraries, require_text
from .fit import reads
from .image import declared_shape
from .progress import progress_bar
from .runner import evaluating
from .timing import (
    MIN_REPEATS,
    Timing,
    clock_for,
    no_garbage_collection,
    require_repeats,
    require_size,
    require_spread,
    spread_of,
    turns,
)

if TYPE_CHECKING:
    from .task import Batch

__all__ = ["MIN_REPEATS", "Speed", "Timing", "backend_of", "benchmark", "make_batch"]


@dataclass(frozen=True)
class Speed:
    """Latency of one condition; it cannot be built without saying where and how it was measured.

    Args:
        device: processor with its number of threads, or GPU.
        backend: what runs the compressed model: a name, or the module classes that replace the dense ones.
        dtype: number format of the dense model, e.g. ``float32``.
        batch: rows per call.
        sequence: tokens per row, without padding. image_size: (height, width) in pixels. audio_seconds: length of a
            waveform. One of the three, the others are None.
        repeats: timed calls of each model, at least 20.
        threads: CPU threads of PyTorch.
        dense, compressed: the two timings.
        speedup_spread: 10th and 90th percentile of dense / compressed over the pairs measured next to each other.
        libraries: name to version.
    """

    device: str
    backend: str
    dtype: str
    batch: int
    sequence: int | None
    image_size: tuple[int, int] | None
    repeats: int
    threads: int
    dense: Timing
    compressed: Timing
    speedup_spread: tuple[float, float]
    libraries: Mapping[str, str]
    audio_seconds: float | None = None

    def __post_init__(self) -> None:
        require_text(self, "device", "backend", "dtype")
        require_count(self, "batch", "repeats", "threads")
        require_libraries(self)
        require_size(self)
        require_repeats(self)
        for name in ("dense", "compressed"):
            if not isinstance(getattr(self, name), Timing):
                raise ValueError(f"Speed: {name} must be a Timing, got {getattr(self, name)!r}")
        require_spread(self, "speedup_spread")

    @property
    def speedup(self) -> float:
        """Ratio of the medians, dense over compressed: above 1 the compressed model is faster."""
        return self.dense.median_ms / self.compressed.median_ms

    @property
    def rows_per_second(self) -> tuple[float, float]:
        """Throughput (dense, compressed): rows of a batch over its median time."""
        return 1000 * self.batch / self.dense.median_ms, 1000 * self.batch / self.compressed.median_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Speed:
        """Build a speed from `to_dict`'s data. Raises ValueError naming unknown or missing keys."""
        values = checked_fields(cls, data)
        for name in ("dense", "compressed"):
            values[name] = Timing(**checked_fields(Timing, values[name]))
        return cls(**values)


def make_batch(
    model: nn.Module,
    batch: int,
    sequence: int | None = None,
    *,
    audio_seconds: float | None = None,
    sampling_rate: int = 16_000,
    seed: int = 0,
) -> Batch:
    """A random batch for timing ``model``: full-length rows, so no padding flatters the result.

    Args:
        sequence: tokens per row for a text model; images have the size that the model declares.
        audio_seconds: length of each waveform for a speech model, at ``sampling_rate`` values per second.

    Raises:
        ValueError: a text model without ``sequence``, or a ``sequence`` longer than its positions; a speech model
            without ``audio_seconds``.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = declared_shape(model)
    if shape is not None:
        return {"pixel_values": torch.randn((batch, *shape), generator=generator)}
    if reads(model) == "sound":
        samples = 0 if audio_seconds is None else round(audio_seconds * sampling_rate)
        if samples < 1:
            raise ValueError(f"a batch for this speech model needs audio_seconds above 0, got {audio_seconds}")
        return {"input_values": torch.randn((batch, samples), generator=generator)}
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None)
    if sequence is None or sequence < 1 or (longest is not None and sequence > longest):
        raise ValueError(f"a batch for this text model needs a sequence of 1 to {longest} tokens, got {sequence}")
    input_ids = torch.randint(config.vocab_size, (batch, sequence), generator=generator)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def benchmark(
    dense: nn.Module,
    compressed: nn.Module,
    batch: Mapping[str, torch.Tensor],
    *,
    backend: str | None = None,
    repeats: int = 30,
    warmup: int = 5,
    device: str | torch.device = "cpu",
    sampling_rate: int = 16_000,
    progress: bool = True,
) -> Speed:
    """Time two models on the same batch, call by call in turn, so that a slow moment of the machine hits both.

    The order within a pair changes with each repeat. Timed is the whole call, from the batch on the device to the
    logits on the device; on CUDA by events after synchronising. The garbage collector rests meanwhile.

    Args:
        dense, compressed: moved to ``device``; run in evaluation mode, which is restored afterwards.
        batch: ``input_ids`` [B, L], ``pixel_values`` [B, C, H, W] or ``input_values`` [B, T]; labels are left out.
        backend: what runs the compressed model, in words; None names this package's module classes inside it.
        repeats: timed calls of each, at least 20. warmup: untimed calls of each before.
        sampling_rate: values per second of waveforms.

    Raises:
        ValueError: too few repeats, or the two models give logits of different shapes.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"repeats must be at least {MIN_REPEATS} for an honest median, got {repeats}")
    device = torch.device(device)
    dtype = next((p.dtype for p in dense.parameters() if p.is_floating_point()), torch.get_default_dtype())
    models = (dense.to(device), compressed.to(device))
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    clock = clock_for(device)
    samples: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        shapes = [tuple(logits(model, inputs).shape) for model in models]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the models differ in their logits: dense {shapes[0]}, compressed {shapes[1]}")
        for _ in range(warmup):
            for model in models:
                logits(model, inputs)
        bar = stack.enter_context(progress_bar(progress, auto_refresh=False))
        line = bar.add_task("time dense and compressed", total=repeats)
        stack.enter_context(no_garbage_collection())
        for order in turns(repeats):
            for which in order:
                samples[which].append(clock(lambda model=models[which]: logits(model, inputs)))  # type: ignore[misc]
            bar.advance(line)
            bar.refresh()
    main = next(inputs[name] for name in ("pixel_values", "input_values", "input_ids") if name in inputs)
    audio = "input_values" in inputs
    return Speed(
        device=device_name(device),
        backend=backend_of(compressed) if backend is None else backend,
        dtype=str(dtype).removeprefix("torch."),
        batch=main.shape[0],
        sequence=main.shape[1] if main.ndim == 2 and not audio else None,
        image_size=(main.shape[2], main.shape[3]) if main.ndim == 4 else None,
        repeats=repeats,
        threads=torch.get_num_threads(),
        dense=Timing.of(samples[0]),
        compressed=Timing.of(samples[1]),
        speedup_spread=spread_of(*samples),
        libraries=library_versions(),
        audio_seconds=main.shape[1] / sampling_rate if audio else None,
    )


def backend_of(model: nn.Module) -> str:
    """The module classes of this package inside ``model``, e.g. ``Int8Linear``; ``pytorch`` when there are none."""
    package = __name__.partition(".")[0]
    names = {type(module).__name__ for module in model.modules() if type(module).__module__.startswith(f"{package}.")}
    return ", ".join(sorted(names)) or "pytorch"
