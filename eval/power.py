"""Where energy can be read: RAPL counters of the CPU and its memory, NVML of NVIDIA GPUs. A missing sensor is no zero.

All of them count a whole package or board, other programs included.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")


class Sensor(Protocol):
    """A running count of energy. ``term`` is ``cpu``, ``dram`` or ``gpu``; ``read`` gives joules since ``start``, and
    is called every few seconds: counters wrap, and power is summed between readings."""

    term: str
    name: str

    def start(self) -> None: ...

    def read(self) -> float: ...


@dataclass
class RaplSensor:
    """One RAPL zone: ``energy_uj`` counts microjoules and wraps at ``max_energy_range_uj``."""

    term: str
    name: str
    folder: Path
    _last: int = 0
    _joules: float = 0.0

    def start(self) -> None:
        self._last, self._joules = self._count(), 0.0

    def read(self) -> float:
        now = self._count()
        passed = now - self._last
        if passed < 0:
            passed += int((self.folder / "max_energy_range_uj").read_text())
        self._last = now
        self._joules += passed / 1e6
        return self._joules

    def _count(self) -> int:
        return int((self.folder / "energy_uj").read_text())


def find_rapl(root: Path = POWERCAP) -> tuple[list[Sensor], str]:
    """The CPU packages and their memory, or none and the reason.

    Zones: ``intel-rapl:0`` named ``package-0``, below it ``intel-rapl:0:1`` named ``dram`` (AMD uses the same names).
    """
    sensors: list[Sensor] = []
    for zone in sorted(root.glob("intel-rapl:*")) if root.is_dir() else []:
        try:
            name = (zone / "name").read_text().strip()
        except OSError:
            continue
        term = "cpu" if name.startswith("package") else "dram" if name == "dram" else None
        if term is None:
            continue  # core and uncore are parts of the package, psys is the whole board
        try:
            int((zone / "energy_uj").read_text())
        except PermissionError:
            return [], f"{zone.name}/energy_uj is readable by root only"
        except (OSError, ValueError) as error:
            return [], f"{zone.name}/energy_uj cannot be read: {error}"
        sensors.append(RaplSensor(term, f"RAPL {zone.name} {name}", zone))
    return sensors, "" if sensors else f"no RAPL zones in {root}"


@dataclass
class NvmlCounter:
    """A GPU's own energy counter (millijoules since the driver was loaded; Volta and newer)."""

    nvml: Any
    handle: Any
    name: str
    term: str = "gpu"
    _first: int = 0

    def start(self) -> None:
        self._first = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)

    def read(self) -> float:
        return (self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) - self._first) / 1e3


@dataclass
class NvmlSamples:
    """A GPU without such a counter: power samples (milliwatts), each counted for the time since the one before."""

    nvml: Any
    handle: Any
    name: str
    term: str = "gpu"
    clock: Any = time.monotonic
    _at: float = 0.0
    _watts: float = 0.0
    _joules: float = field(default=0.0)

    def start(self) -> None:
        self._at, self._watts, self._joules = self.clock(), self._power(), 0.0

    def read(self) -> float:
        now, watts = self.clock(), self._power()
        self._joules += (now - self._at) * (watts + self._watts) / 2
        self._at, self._watts = now, watts
        return self._joules

    def _power(self) -> float:
        return float(self.nvml.nvmlDeviceGetPowerUsage(self.handle)) / 1e3


def find_gpus(uuids: Sequence[str] | None = None, nvml: Any = None) -> tuple[list[Sensor], str]:
    """NVIDIA GPUs, or none and the reason.

    Args:
        uuids: only these (with or without ``GPU-``); None: all that the driver shows.
        nvml: the module; None: ``pynvml`` (package nvidia-ml-py).
    """
    if nvml is None:
        try:
            import pynvml as nvml  # type: ignore[no-redef]
        except ImportError:
            return [], "NVML needs the package nvidia-ml-py: pip install 'squeezoo[eval]'"
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        wanted = None if uuids is None else {uuid.removeprefix("GPU-") for uuid in uuids}
        sensors: list[Sensor] = []
        for handle in handles:
            uuid, name = _text(nvml.nvmlDeviceGetUUID(handle)), _text(nvml.nvmlDeviceGetName(handle))
            if wanted is not None and uuid.removeprefix("GPU-") not in wanted:
                continue
            try:
                nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
                sensors.append(NvmlCounter(nvml, handle, f"NVML energy counter, {name}"))
            except nvml.NVMLError:
                nvml.nvmlDeviceGetPowerUsage(handle)
                sensors.append(NvmlSamples(nvml, handle, f"NVML power samples, {name}"))
    except nvml.NVMLError as error:
        return [], f"NVML: {error}"
    return sensors, "" if sensors else "NVML shows none of this process's GPUs"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
