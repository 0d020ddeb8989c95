"""Speed of a compressed model against its dense one, both measured in one interleaved run on named hardware."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..models.dense import logits
from .environment import device_name, library_versions
from .image import declared_shape
from .progress import progress_bar
from .run import evaluating
from .task import checked_fields, require_count, require_libraries, require_text

if TYPE_CHECKING:
    from .task import Batch

MIN_REPEATS = 20


@dataclass(frozen=True)
class Timing:
    """Milliseconds per batch over the repeats: median, 10th and 90th percentile, fastest."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float

    def __post_init__(self) -> None:
        ordered = (self.min_ms, self.p10_ms, self.median_ms, self.p90_ms)
        if not all(_is_positive(value) for value in ordered) or list(ordered) != sorted(ordered):
            raise ValueError(f"Timing needs 0 < min <= p10 <= median <= p90 in milliseconds, got {ordered}")

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Timing:
        """Summary of single measurements (percentiles by linear interpolation)."""
        p10, median, p90 = (float(value) for value in np.percentile(np.asarray(samples_ms, dtype=float), (10, 50, 90)))
        return cls(median_ms=median, p10_ms=p10, p90_ms=p90, min_ms=float(min(samples_ms)))


@dataclass(frozen=True)
class Speed:
    """Latency of one condition; it cannot be built without saying where and how it was measured.

    Args:
        device: processor with its number of threads, or GPU.
        backend: what runs the compressed model: a name, or the module classes that replace the dense ones.
        dtype: number format of the dense model, e.g. ``float32``.
        batch: rows per call.
        sequence: tokens per row, without padding; None for images.
        image_size: (height, width) in pixels; None for text.
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

    def __post_init__(self) -> None:
        require_text(self, "device", "backend", "dtype")
        require_count(self, "batch", "repeats", "threads")
        require_libraries(self)
        if (self.sequence is None) == (self.image_size is None):
            raise ValueError(
                f"Speed needs either sequence or image_size, got {self.sequence!r} and {self.image_size!r}"
            )
        if self.sequence is not None:
            require_count(self, "sequence")
        elif self.image_size is not None:
            size = tuple(self.image_size)
            if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
                raise ValueError(f"Speed: image_size must be (height, width), got {self.image_size!r}")
            object.__setattr__(self, "image_size", size)
        if self.repeats < MIN_REPEATS:
            raise ValueError(f"Speed needs a median of at least {MIN_REPEATS} repeats, got {self.repeats}")
        for name in ("dense", "compressed"):
            if not isinstance(getattr(self, name), Timing):
                raise ValueError(f"Speed: {name} must be a Timing, got {getattr(self, name)!r}")
        spread = tuple(self.speedup_spread)
        if len(spread) != 2 or not all(_is_positive(value) for value in spread) or spread[0] > spread[1]:
            raise ValueError(
                f"Speed: speedup_spread must be (p10, p90) of positive ratios, got {self.speedup_spread!r}"
            )
        object.__setattr__(self, "speedup_spread", spread)

    @property
    def speedup(self) -> float:
        """Ratio of the medians, dense over compressed: above 1 the compressed model is faster."""
        return self.dense.median_ms / self.compressed.median_ms

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


def make_batch(model: nn.Module, batch: int, sequence: int | None = None, *, seed: int = 0) -> Batch:
    """A random batch for timing ``model``: full-length rows, so no padding flatters the result.

    Args:
        sequence: tokens per row for a text model; images have the size that the model declares.

    Raises:
        ValueError: a text model without ``sequence``, or a ``sequence`` longer than its positions.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = declared_shape(model)
    if shape is not None:
        return {"pixel_values": torch.randn((batch, *shape), generator=generator)}
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
    progress: bool = True,
) -> Speed:
    """Time two models on the same batch, call by call in turn, so that a slow moment of the machine hits both.

    The order within a pair changes with each repeat. Timed is the whole call, from the batch on the device to the
    logits on the device; on CUDA by events after synchronising. The garbage collector rests meanwhile.

    Args:
        dense, compressed: moved to ``device``; run in evaluation mode, which is restored afterwards.
        batch: ``input_ids`` [B, L] or ``pixel_values`` [B, C, H, W] and the like; labels are left out.
        backend: what runs the compressed model, in words; None names this package's module classes inside it.
        repeats: timed calls of each, at least 20. warmup: untimed calls of each before.

    Raises:
        ValueError: too few repeats, or the two models give logits of different shapes.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"repeats must be at least {MIN_REPEATS} for an honest median, got {repeats}")
    device = torch.device(device)
    dtype = next((p.dtype for p in dense.parameters() if p.is_floating_point()), torch.get_default_dtype())
    models = (dense.to(device), compressed.to(device))
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    clock = _cuda_ms if device.type == "cuda" else _wall_ms
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
        stack.enter_context(_no_garbage_collection())
        for repeat in range(repeats):
            for which in (0, 1) if repeat % 2 == 0 else (1, 0):
                samples[which].append(clock(lambda model=models[which]: logits(model, inputs)))  # type: ignore[misc]
            bar.advance(line)
            bar.refresh()
    ratios = np.asarray(samples[0]) / np.asarray(samples[1])
    p10, p90 = np.percentile(ratios, (10, 90))
    main = inputs["pixel_values"] if "pixel_values" in inputs else inputs["input_ids"]
    return Speed(
        device=device_name(device),
        backend=backend_of(compressed) if backend is None else backend,
        dtype=str(dtype).removeprefix("torch."),
        batch=main.shape[0],
        sequence=main.shape[1] if main.ndim == 2 else None,
        image_size=(main.shape[2], main.shape[3]) if main.ndim == 4 else None,
        repeats=repeats,
        threads=torch.get_num_threads(),
        dense=Timing.of(samples[0]),
        compressed=Timing.of(samples[1]),
        speedup_spread=(float(p10), float(p90)),
        libraries=library_versions(),
    )


def backend_of(model: nn.Module) -> str:
    """The module classes of this package inside ``model``, e.g. ``Int8Linear``; ``pytorch`` when there are none."""
    package = __name__.partition(".")[0]
    names = {type(module).__name__ for module in model.modules() if type(module).__module__.startswith(f"{package}.")}
    return ", ".join(sorted(names)) or "pytorch"


def _wall_ms(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def _cuda_ms(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
