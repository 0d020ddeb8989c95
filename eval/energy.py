"""Energy and CO2 of any work: read from sensors where there are any, null where there are none, never zero for unknown.

    kWh = PUE * hours * (p_cpu + p_dram + g * p_gpu) / 1000;   CO2 = kWh * intensity          (ALGORITHMS E.6)

Sources: Strubell et al. 2019 (the formula; PUE 1.58 there, 1.59 in the thesis); US EPA eGRID (0.430 kg/kWh); European
Environment Agency (0.275 kg/kWh).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from .environment import device_name, library_versions
from .fields import checked_fields, require_libraries, require_text
from .power import Sensor, find_gpus, find_rapl
from .power_model import JOULES_PER_KWH, PowerModel

PUE = 1.59
INTENSITY = {"us": 0.430, "eu": 0.275}  # kg CO2 per kWh
TERMS = ("cpu", "dram", "gpu")
SAMPLE_SECONDS = 5.0


def energy_kwh(
    hours: float,
    *,
    cpu_watts: float | None = None,
    dram_watts: float | None = None,
    gpu_watts: float | None = None,
    gpus: int = 1,
    pue: float = PUE,
) -> float | None:
    """Energy from mean powers; a term that is None is left out, and None comes back when all are.

    Args:
        gpu_watts: mean power of one GPU, ``gpus`` of them.
    """
    terms = [cpu_watts, dram_watts, None if gpu_watts is None else gpus * gpu_watts]
    known = [watts for watts in terms if watts is not None]
    return pue * hours * sum(known) / 1000 if known else None


def co2_kg(kwh: float | None, intensity: float = INTENSITY["us"]) -> float | None:
    """Kilograms of CO2; unknown energy gives unknown CO2."""
    return None if kwh is None else kwh * intensity


def mean_power(watts: Sequence[float]) -> float | None:
    """Mean of evenly spaced samples; None without any."""
    return math.fsum(watts) / len(watts) if watts else None


@dataclass(frozen=True)
class Energy:
    """What some work took.

    Args:
        device: processors that worked. seconds: wall time.
        joules: ``cpu``, ``dram`` and ``gpu`` without PUE; None: unknown, and not in the sums.
        sensors: what each known term was read from; for an unknown one the reason.
        estimated: terms that a power model gave and no sensor measured.
        pue, intensity: factors applied in ``kwh`` and ``co2_grams``; intensity in kg CO2 per kWh.
        libraries: name to version.
    """

    device: str
    seconds: float
    joules: Mapping[str, float | None]
    sensors: Mapping[str, str]
    estimated: tuple[str, ...]
    pue: float
    intensity: float
    libraries: Mapping[str, str]

    def __post_init__(self) -> None:
        require_text(self, "device")
        require_libraries(self)
        if tuple(self.joules) != TERMS or tuple(self.sensors) != TERMS:
            raise ValueError(f"Energy: joules and sensors must name {', '.join(TERMS)}, in this order")
        for term, value in self.joules.items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Energy: joules of {term} must be at least 0, or None when unknown; got {value!r}")
            if not self.sensors[term]:
                raise ValueError(f"Energy: {term} needs the sensor's name, or the reason why there is none")
        wrong = [term for term in self.estimated if self.joules.get(term) is None]
        if wrong:
            raise ValueError(f"Energy: {', '.join(wrong)} cannot be estimated and unknown at once")
        if not self.seconds > 0 or not self.pue >= 1 or not self.intensity >= 0:
            raise ValueError(
                f"Energy needs seconds above 0, a PUE of at least 1 and an intensity of at least 0, got "
                f"{self.seconds!r}, {self.pue!r}, {self.intensity!r}"
            )
        object.__setattr__(self, "joules", dict(self.joules))
        object.__setattr__(self, "sensors", dict(self.sensors))
        object.__setattr__(self, "estimated", tuple(self.estimated))

    @property
    def included(self) -> tuple[str, ...]:
        """The terms in the sum."""
        return tuple(term for term in TERMS if self.joules[term] is not None)

    @property
    def kwh(self) -> float | None:
        """Kilowatt hours of the included terms times PUE; None when nothing is known."""
        known = [value for value in self.joules.values() if value is not None]
        return self.pue * math.fsum(known) / JOULES_PER_KWH if known else None

    @property
    def co2_grams(self) -> float | None:
        kilograms = co2_kg(self.kwh, self.intensity)
        return None if kilograms is None else 1000 * kilograms

    def mean_watts(self, term: str) -> float | None:
        """Mean power of one term, without PUE."""
        joules = self.joules[term]
        return None if joules is None else joules / self.seconds

    def __str__(self) -> str:
        if self.kwh is None or self.co2_grams is None:
            why = "; ".join(f"{term}: {reason}" for term, reason in self.sensors.items())
            return f"energy unknown ({why})"
        note = f", estimated: {' and '.join(self.estimated)}" if self.estimated else ""
        return (
            f"{self.kwh:.3g} kWh, {self.co2_grams:.3g} g CO2 ({' + '.join(self.included)}{note}; PUE {self.pue:g}, "
            f"{self.intensity:g} kg/kWh)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data with the sums; `from_dict` reads it back."""
        return asdict(self) | {"kwh": self.kwh, "co2_grams": self.co2_grams, "included": list(self.included)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Energy:
        """Build from `to_dict`'s data; the sums are computed anew. Raises ValueError naming unknown or missing keys."""
        values = {key: value for key, value in data.items() if key not in ("kwh", "co2_grams", "included")}
        return cls(**checked_fields(cls, values))


class Meter:
    """Holds the `Energy` once the ``with`` block has ended."""

    def __init__(self) -> None:
        self._energy: Energy | None = None

    @property
    def energy(self) -> Energy:
        """Raises RuntimeError while the work still goes on."""
        if self._energy is None:
            raise RuntimeError("the energy is known when the `with measure_energy()` block has ended")
        return self._energy


@contextmanager
def measure_energy(
    *,
    device: str = "cpu",
    estimate: bool = False,
    pue: float = PUE,
    intensity: float = INTENSITY["us"],
    sensors: Sequence[Sensor] | None = None,
    sample_seconds: float = SAMPLE_SECONDS,
) -> Iterator[Meter]:
    """Measure the energy of the work inside the block::

        with measure_energy(device="cuda") as meter:
            train()
        print(meter.energy)

    Read are RAPL (CPU packages, memory) and, when ``device`` is a GPU, NVML for the GPUs that this process sees; a
    thread reads every ``sample_seconds``. What has no sensor is None.

    Args:
        estimate: give the terms without a sensor the values of codecarbon's power model (processor's TDP and load,
            watts per memory module), offline; they are named in ``Energy.estimated``. A processor that codecarbon does
            not know stays unknown.
        pue: overhead of the data centre; 1 counts the sensors alone. intensity: kg CO2 per kWh.
        sensors: instead of those of this machine.

    Raises:
        ImportError: ``estimate`` without codecarbon; the message names the extra.
    """
    reasons: dict[str, str] = {}
    if sensors is None:
        sensors, reasons = _machine_sensors(device)
    model = PowerModel(sample_seconds) if estimate else None
    meter = Meter()
    readings = _Readings(sensors, sample_seconds)
    started = time.monotonic()
    if model:
        model.start()
    readings.start()
    try:
        yield meter
    finally:
        joules = readings.stop()
        seconds = time.monotonic() - started
        names = {
            term: ", ".join(sensor.name for sensor in sensors if sensor.term == term and joules[term] is not None)
            or readings.errors.get(term) or reasons.get(term) or "no sensor" for term in TERMS
        }  # fmt: skip
        estimated: list[str] = []
        if model:
            for term, value in model.stop().items():
                if joules[term] is None:
                    joules[term], names[term] = value, model.name
                    estimated.append(term)
            names |= {term: f"{names[term]}; {why}" for term, why in model.refused.items() if joules[term] is None}
        meter._energy = Energy(
            device_name(device), max(seconds, 1e-9), joules, names, tuple(estimated), pue, intensity, library_versions()
        )


def _machine_sensors(device: str) -> tuple[list[Sensor], dict[str, str]]:
    import torch

    sensors, why = find_rapl()
    reasons = {"cpu": why or "no RAPL zone of a CPU package", "dram": why or "no RAPL zone of memory"}
    reasons["gpu"] = "the work is on the CPU"
    if torch.device(device).type == "cuda":
        uuids = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
        gpus, reasons["gpu"] = find_gpus(uuids)
        sensors += gpus
    return sensors, reasons


class _Readings:
    """Reads all sensors in a thread until stopped; a sensor that fails takes its term with it."""

    def __init__(self, sensors: Sequence[Sensor], every: float) -> None:
        self.sensors, self.every = sensors, every
        self.errors: dict[str, str] = {}
        self._joules: dict[int, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="energy")

    def start(self) -> None:
        for sensor in self.sensors:
            self._try(sensor, sensor.start)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self.every):
            self._read()

    def _read(self) -> None:
        for key, sensor in enumerate(self.sensors):
            if sensor.term not in self.errors:
                self._try(sensor, lambda key=key, sensor=sensor: self._joules.update({key: sensor.read()}))

    def _try(self, sensor: Sensor, call: Any) -> None:
        try:
            call()
        except Exception as error:  # NVML has its own exceptions; work must not end because a sensor does
            self.errors[sensor.term] = f"{sensor.name} failed: {error}"

    def stop(self) -> dict[str, float | None]:
        self._stop.set()
        self._thread.join()
        self._read()
        sums: dict[str, float | None] = dict.fromkeys(TERMS)
        for key, sensor in enumerate(self.sensors):
            if sensor.term not in self.errors:
                sums[sensor.term] = (sums[sensor.term] or 0.0) + self._joules[key]
        return sums
