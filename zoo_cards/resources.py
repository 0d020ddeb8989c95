"""What a variant costs beside its latency: loading, memory, energy, decoding, and what a model says of other hardware.

Records only; `resource_sections` shows them. What was not measured is not here, and is shown as such, never as 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..eval.decode_speed import DecodeSpeed
from ..eval.energy import Energy
from ..eval.loading import Loading, Memory
from ..eval.roofline import Prediction


@dataclass(frozen=True)
class LoadingRow:
    """How long one variant takes to load."""

    variant: str
    loading: Loading


@dataclass(frozen=True)
class MemoryRow:
    """What one variant needs in memory."""

    variant: str
    memory: Memory


@dataclass(frozen=True)
class EnergyRow:
    """Energy of some work of one variant.

    Args:
        work: what was done, in words: ``inference, batch 8, sequence 128``, ``training, all stages``.
        rows: rows that were processed in all, None where that has no meaning.
    """

    variant: str
    work: str
    rows: int | None
    energy: Energy

    def __post_init__(self) -> None:
        if not self.work or (self.rows is not None and self.rows < 1):
            raise ValueError(f"EnergyRow needs the work in words, and at least 1 row; got {self.work!r}, {self.rows!r}")


@dataclass(frozen=True)
class Modelled:
    """What the roofline model says of one condition on one hardware; nothing was run there.

    Args:
        condition: in words, e.g. ``batch 8, sequence 128``. tokens: rows of the largest GEMM.
        scope: ``gemms`` of the plan only, or the whole ``model``.
        efficiency: ``fitted`` to measurements, or ``placeholder``.
        dense_us, compressed_us: microseconds.
    """

    hardware: str
    dense_format: str
    condition: str
    tokens: int
    scope: Literal["gemms", "model"]
    efficiency: Literal["fitted", "placeholder"]
    dense_us: float
    compressed_us: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(us) and us > 0 for us in (self.dense_us, self.compressed_us)):
            raise ValueError(f"Modelled: times must be positive, got {self.dense_us!r} and {self.compressed_us!r}")

    @property
    def speedup(self) -> float:
        return self.dense_us / self.compressed_us

    @classmethod
    def of(cls, prediction: Prediction, condition: str) -> Modelled:
        found = prediction.to_dict()
        names = ("hardware", "dense_format", "tokens", "scope", "efficiency", "dense_us", "compressed_us")
        return cls(condition=condition, **{name: found[name] for name in names})


@dataclass(frozen=True)
class Machine:
    """The hardware behind the measurements; library versions stand with each number.

    Args:
        cpu, features: the processor and what decides its kernels. cores: of this process. threads: PyTorch's.
        memory_bytes: None where unknown. gpus: names. cuda: versions of CUDA's libraries, empty without them.
    """

    cpu: str
    features: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int | None
    gpus: tuple[str, ...]
    cuda: Mapping[str, str]

    @classmethod
    def of(cls, environment: Mapping[str, Any]) -> Machine:
        """From ``eval.environment.environment()``."""
        cpu, cuda = environment["cpu"], environment["cuda"] or {}
        return cls(
            cpu["name"], tuple(cpu["features"]), cpu["cores"], cpu["threads"], environment["memory_bytes"],
            tuple(gpu["name"] for gpu in environment["gpus"]),
            {name: str(version) for name, version in cuda.items() if version is not None},
        )  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """All of it; empty is "not measured".

    Args:
        decode: generation, dense and compressed in turn. loading, memory, energy: one row per variant and condition.
        modelled: of the roofline model. machine: None for results from before it was recorded.
    """

    decode: tuple[DecodeSpeed, ...] = ()
    loading: tuple[LoadingRow, ...] = ()
    memory: tuple[MemoryRow, ...] = ()
    energy: tuple[EnergyRow, ...] = ()
    modelled: tuple[Modelled, ...] = ()
    machine: Machine | None = None
