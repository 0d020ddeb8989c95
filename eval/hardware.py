"""What a processor can do at best, as data: rates, bandwidth, and the share of them that real kernels reach.

The numbers of the GPUs are datasheet values without sparsity (NVIDIA A100, H100 and H200 datasheets; many pages quote
the 2:4 rates without saying so). Hopper has no int4 tensor-core rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .fields import checked_fields, require_text
from .task import nearest


@dataclass(frozen=True)
class Efficiency:
    """The share of the datasheet that kernels reach: ``t = max(flops / (compute R), bytes / (memory BW)) + overhead``.

    Args:
        compute, memory: shares of rate and bandwidth.
        overhead_s: seconds per GEMM whatever its size.
        measurements: how many timed GEMMs it was fitted to; 0 marks a placeholder that nothing was measured for.
        guessed: those of ``compute``, ``memory``, ``overhead_s`` that the measurements do not tell.
    """

    compute: float
    memory: float
    overhead_s: float
    measurements: int
    guessed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("compute", "memory"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"Efficiency: {name} must be a positive share, got {getattr(self, name)!r}")
        if not (math.isfinite(self.overhead_s) and self.overhead_s >= 0):
            raise ValueError(f"Efficiency: overhead_s must be seconds of at least 0, got {self.overhead_s!r}")
        if not isinstance(self.measurements, int) or self.measurements < 0:
            raise ValueError(f"Efficiency: measurements must be a number of GEMMs, got {self.measurements!r}")
        object.__setattr__(self, "guessed", tuple(self.guessed))

    @property
    def fitted(self) -> bool:
        """Whether measurements stand behind all of it."""
        return self.measurements > 0 and not self.guessed

    def told(self) -> str:
        """Each factor, and whether it was measured or guessed."""
        values = {"compute": f"{self.compute:.2f}", "memory": f"{self.memory:.2f}",
                  "overhead_s": f"{self.overhead_s * 1e6:.1f} us"}  # fmt: skip
        guessed = set(self.guessed) if self.measurements else set(values)
        words = []
        for how, those in ((f"measured on {self.measurements} GEMMs", values.keys() - guessed), ("guessed", guessed)):
            found = [f"{name.removesuffix('_s')} {value}" for name, value in values.items() if name in those]
            words += [f"{how}: {', '.join(found)}"] if found else []
        return ", ".join(words)


PLACEHOLDER = Efficiency(0.7, 0.8, 3e-6, 0, ("compute", "memory", "overhead_s"))  # ALGORITHMS H.2
IDEAL = Efficiency(1.0, 1.0, 0.0, 0, ("compute", "memory", "overhead_s"))  # the bound itself


@dataclass(frozen=True)
class Hardware:
    """One processor.

    Args:
        rates: operations per second of dense GEMMs by number format (``fp32``, ``fp16``, ``int8``, ``int4``).
        bandwidth: bytes per second between memory and chip.
        memory: bytes, None where unknown. watts: power limit, None where unknown.
        sparse: number formats whose rate doubles with 2:4 weights.
        source: datasheet, or how the numbers were measured.
        efficiencies: number format, with ``_2:4`` behind it for sparse kernels, to what was fitted for it.
    """

    name: str
    rates: Mapping[str, float]
    bandwidth: float
    memory: float | None
    watts: float | None
    sparse: tuple[str, ...]
    source: str
    efficiencies: Mapping[str, Efficiency] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_text(self, "name", "source")
        if not self.rates or not all(rate > 0 for rate in self.rates.values()) or not self.bandwidth > 0:
            raise ValueError(f"Hardware {self.name}: rates and bandwidth must be positive")
        object.__setattr__(self, "sparse", tuple(self.sparse))

    def rate(self, number_format: str, sparse: bool = False) -> float:
        """Operations per second, doubled for 2:4 weights. Raises ValueError for a format that the chip lacks."""
        if number_format not in self.rates:
            raise ValueError(f"{self.name}: " + nearest("number format", number_format, self.rates))
        return self.rates[number_format] * (2 if sparse and number_format in self.sparse else 1)

    def efficiency(self, number_format: str, sparse: bool = False) -> Efficiency:
        """What was fitted for kernels of this kind; the placeholder where nothing was."""
        return self.efficiencies.get(number_format + ("_2:4" if sparse else ""), PLACEHOLDER)

    def with_efficiencies(self, **fitted: Efficiency) -> Hardware:
        """A copy that knows more; sparse kernels are named as ``**{"fp16_2:4": ...}``."""
        return replace(self, efficiencies={**self.efficiencies, **fitted})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        from dataclasses import asdict

        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Hardware:
        """Build from `to_dict`'s data. Raises ValueError naming unknown or missing keys."""
        values = checked_fields(cls, data)
        fitted = values.get("efficiencies", {})
        values["efficiencies"] = {k: Efficiency(**checked_fields(Efficiency, v)) for k, v in fitted.items()}
        return cls(**values)


def _gpu(name: str, fp16: float, int8: float, gigabytes: float, bandwidth: float, watts: float) -> Hardware:
    """T(FL)OPS dense, GB, GB/s, W."""
    rates = {"fp32": fp16 * 0.5e12, "fp16": fp16 * 1e12, "int8": int8 * 1e12}  # fp32 GEMMs run as TF32
    if name.startswith("A100"):
        rates["int4"] = 2 * int8 * 1e12
    return Hardware(name, rates, bandwidth * 1e9, gigabytes * 1e9, watts, tuple(rates), "NVIDIA datasheet, dense rates")


HARDWARE: dict[str, Hardware] = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-SXM-80GB", 312, 624, 80, 2039, 400),
        _gpu("A100-SXM-40GB", 312, 624, 40, 1555, 400),
        _gpu("A100-PCIe-80GB", 312, 624, 80, 1935, 300),
        _gpu("H100-SXM", 989.4, 1978.9, 80, 3350, 700),
        _gpu("H100-PCIe", 756, 1513, 80, 2000, 350),
        _gpu("H200-SXM", 989.4, 1978.9, 141, 4800, 700),
        _gpu("H200-NVL", 835, 1671, 141, 4800, 600),
    )
}


def get_hardware(name: str) -> Hardware:
    """The processor of this name. Raises ValueError with the known names and the nearest one."""
    if name not in HARDWARE:
        raise ValueError(nearest("hardware", name, HARDWARE))
    return HARDWARE[name]
