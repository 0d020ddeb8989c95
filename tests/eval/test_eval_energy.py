"""Energy: the formulas against the thesis' vector, sensors against counters that are written by hand, and honesty about
what is unknown."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from squeezoo.eval import energy as energy_module
from squeezoo.eval import power_model
from squeezoo.eval.energy import INTENSITY, PUE, Energy, Meter, co2_kg, energy_kwh, mean_power, measure_energy
from squeezoo.eval.power import NvmlCounter, NvmlSamples, RaplSensor, find_gpus, find_rapl

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "energy.json").read_text(encoding="utf-8"))
UNKNOWN = {"cpu": "no RAPL", "dram": "no RAPL", "gpu": "the work is on the CPU"}
GOOD: dict[str, Any] = {
    "device": "a GPU", "seconds": 3600.0, "joules": {"cpu": None, "dram": None, "gpu": 3.6e6}, "sensors": UNKNOWN,
    "estimated": (), "pue": 1.0, "intensity": 0.4, "libraries": {"torch": "2.13"},
}  # fmt: skip


def test_the_formula_of_the_thesis() -> None:
    """vectors/energy.json, example: thesis equations 3.7 and 3.8 with PUE 1.59."""
    row = VECTOR["example"]
    found = energy_kwh(
        row["hours"], cpu_watts=row["p_cpu"], dram_watts=row["p_dram"], gpu_watts=row["p_gpu"], gpus=row["n_gpu"]
    )
    assert found == pytest.approx(row["kwh"], rel=1e-6)
    assert co2_kg(found) == pytest.approx(row["co2_us_0p430"], rel=1e-6)
    assert co2_kg(found, INTENSITY["eu"]) == pytest.approx(row["co2_eu_0p275"], rel=1e-6)


@pytest.mark.parametrize("which", ["baseline", "pkd", "imp"])
def test_the_tables_of_the_thesis(which: str) -> None:
    """vectors/energy.json: GPU energy only, four runs, and 0.275 kg/kWh, which the tables use; published to 1e-3."""
    row = VECTOR[f"thesis_sa_{which}"]
    kwh = PUE * row["runs"] * row["wh_per_run"] / 1000
    assert energy_kwh(row["runs"], gpu_watts=row["wh_per_run"]) == pytest.approx(kwh)
    assert co2_kg(kwh, 0.275) == pytest.approx(row["co2_0p275"], rel=1e-6)
    assert co2_kg(kwh, 0.275) == pytest.approx(row["published"], abs=1e-3)
    if "co2_0p430" in row:
        assert co2_kg(kwh) == pytest.approx(row["co2_0p430"], rel=1e-6)


def test_sampled_power() -> None:
    """vectors/energy.json, sampled_power: 206 W over 25 s."""
    row = VECTOR["sampled_power"]
    mean = mean_power(row["watts"])
    assert mean == row["mean_w"]
    seconds = row["interval_s"] * len(row["watts"])
    found = energy_kwh(seconds / 3600, gpu_watts=mean, pue=1.0)
    assert found is not None
    assert found * 1000 == pytest.approx(row["wh_over_25s"], rel=1e-6)


def test_unknown_is_none_and_never_zero() -> None:
    """Without any power nothing is known; one known term is not diluted by the unknown ones."""
    assert energy_kwh(1) is None
    assert co2_kg(None) is None
    assert mean_power([]) is None
    assert energy_kwh(2, gpu_watts=100, pue=1.0) == 0.2
    empty = Energy(**{**GOOD, "joules": {"cpu": None, "dram": None, "gpu": None}})
    assert (empty.kwh, empty.co2_grams, empty.included) == (None, None, ())
    assert str(empty).startswith("energy unknown (cpu: no RAPL")
    data = json.loads(json.dumps(empty.to_dict(), allow_nan=False))
    assert data["kwh"] is None
    assert data["joules"] == {"cpu": None, "dram": None, "gpu": None}


def test_a_record_multiplies_and_says_its_terms() -> None:
    """3.6 MJ are 1 kWh; PUE 1.5 and 0.4 kg/kWh make 1.5 kWh and 600 g; one hour of it is 1000 W."""
    found = Energy(**{**GOOD, "pue": 1.5})
    assert found.kwh == pytest.approx(1.5)
    assert found.co2_grams == pytest.approx(600)
    assert (found.mean_watts("gpu"), found.mean_watts("cpu")) == (1000, None)
    assert "(gpu; PUE 1.5, 0.4 kg/kWh)" in str(found)
    assert Energy.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("field", list(GOOD))
def test_every_field_is_needed(field: str) -> None:
    with pytest.raises(TypeError, match=field):
        Energy(**{name: value for name, value in GOOD.items() if name != field})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", ""),
        ("seconds", 0),
        ("joules", {"cpu": 1.0}),
        ("joules", {"cpu": -1.0, "dram": None, "gpu": None}),
        ("joules", {"cpu": float("nan"), "dram": None, "gpu": None}),
        ("sensors", {**UNKNOWN, "cpu": ""}),
        ("estimated", ("cpu",)),
        ("pue", 0.9),
        ("intensity", -0.1),
        ("libraries", {}),
    ],
)
def test_bad_values_are_refused(field: str, value: Any) -> None:
    """Each breaks the documented range of its field."""
    with pytest.raises(ValueError, match=r"Energy|libraries"):
        Energy(**{**GOOD, field: value})


def _zone(root: Path, zone: str, name: str, microjoules: int) -> Path:
    folder = root / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text("1000000000\n")
    return folder


def test_rapl_counters_wrap(tmp_path: Path) -> None:
    """Linux powercap: the count goes on from 0 after max_energy_range_uj. 999 -> 1 J through 1000 J is 2 J."""
    folder = _zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000)
    sensor = RaplSensor("cpu", "package-0", folder)
    sensor.start()
    (folder / "energy_uj").write_text("1000000\n")
    assert sensor.read() == pytest.approx(2)
    (folder / "energy_uj").write_text("4500000\n")
    assert sensor.read() == pytest.approx(5.5)


def test_rapl_takes_packages_and_memory_only(tmp_path: Path) -> None:
    """core is a part of the package and psys the whole board: counting them would count twice."""
    _zone(tmp_path, "intel-rapl:0", "package-0", 0)
    _zone(tmp_path, "intel-rapl:0:0", "core", 0)
    _zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    _zone(tmp_path, "intel-rapl:1", "psys", 0)
    sensors, why = find_rapl(tmp_path)
    assert [sensor.term for sensor in sensors] == ["cpu", "dram"]
    assert why == ""
    assert find_rapl(tmp_path / "none") == ([], f"no RAPL zones in {tmp_path / 'none'}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_rapl_for_root_only(tmp_path: Path) -> None:
    """Kernels since 5.10 let only root read the counters (CVE-2020-8694)."""
    (_zone(tmp_path, "intel-rapl:0", "package-0", 0) / "energy_uj").chmod(0)
    assert find_rapl(tmp_path) == ([], "intel-rapl:0/energy_uj is readable by root only")


class _Nvml(types.ModuleType):
    """Two boards of the driver's interface: an H200 with an energy counter, an old one with power samples only."""

    class NVMLError(Exception):
        pass

    def __init__(self, millijoules: list[int], milliwatts: list[int]) -> None:
        super().__init__("pynvml")
        self.millijoules, self.milliwatts = iter(millijoules), iter(milliwatts)

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-uuid-{handle}"

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return (b"NVIDIA H200", b"Tesla P100")[handle]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        if handle == 1:
            raise self.NVMLError("Not Supported")
        return next(self.millijoules)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return next(self.milliwatts)


def test_gpus_are_read_by_counter_or_by_samples() -> None:
    """By hand: 5000 to 9000 mJ are 4 J; 100, 200 and 300 W two seconds apart are 300 + 500 J by trapezoids."""
    nvml = _Nvml([0, 5000, 9000], [0, 100_000, 200_000, 300_000])
    sensors, why = find_gpus(nvml=nvml)
    assert why == ""
    counter, samples = sensors
    assert (type(counter), type(samples)) == (NvmlCounter, NvmlSamples)
    assert counter.name == "NVML energy counter, NVIDIA H200"
    counter.start()
    assert counter.read() == 4
    assert isinstance(samples, NvmlSamples)
    samples.clock = iter([10.0, 12.0, 14.0]).__next__
    samples.start()
    assert [samples.read(), samples.read()] == [300, 800]


def test_only_this_processes_gpus() -> None:
    """CUDA_VISIBLE_DEVICES hides boards from the process, not from NVML; torch's UUIDs have no prefix."""
    sensors, _ = find_gpus(["uuid-0"], nvml=_Nvml([0], []))
    assert [sensor.name for sensor in sensors] == ["NVML energy counter, NVIDIA H200"]
    assert find_gpus(["other"], nvml=_Nvml([], [])) == ([], "NVML shows none of this process's GPUs")


class _Counting:
    """A sensor that counts 2 J per reading."""

    def __init__(self, term: str, broken: bool = False) -> None:
        self.term, self.name, self.broken, self.joules = term, f"{term} counter", broken, 0.0

    def start(self) -> None: ...

    def read(self) -> float:
        if self.broken:
            raise OSError("gone")
        self.joules += 2
        return self.joules


def test_measuring_sums_the_sensors() -> None:
    """Two packages of 2 J each, read once at the end: 4 J; the broken GPU sensor makes its term unknown."""
    sensors = [_Counting("cpu"), _Counting("cpu"), _Counting("gpu", broken=True)]
    with measure_energy(sensors=sensors, pue=1.0, intensity=0.36, sample_seconds=60) as meter:
        sum(range(1000))
    with pytest.raises(RuntimeError, match="has ended"):
        _ = Meter().energy
    found = meter.energy
    assert found.joules == {"cpu": 4, "dram": None, "gpu": None}
    assert found.kwh == pytest.approx(4 / 3.6e6)
    assert found.co2_grams == pytest.approx(4 / 3.6e6 * 360)
    assert found.sensors["gpu"] == "gpu counter failed: gone"
    assert found.sensors["cpu"] == "cpu counter, cpu counter"
    assert found.seconds > 0
    assert found.estimated == ()


def test_sensors_are_read_while_the_work_goes_on() -> None:
    """Counters wrap, so they must be read in between; a failing block is measured too and its error goes on."""
    import threading

    sensor = _Counting("cpu")
    read_thrice = threading.Event()
    count = sensor.read

    def read() -> float:
        if (joules := count()) >= 6:
            read_thrice.set()
        return joules

    sensor.read = read  # type: ignore[method-assign]
    meters: list[Meter] = []

    def work() -> None:
        with measure_energy(sensors=[sensor], sample_seconds=0.01) as meter:
            meters.append(meter)
            assert read_thrice.wait(20)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    joules = meters[0].energy.joules["cpu"]
    assert joules is not None
    assert joules >= 6


def test_this_machine_is_honest() -> None:
    """A term has a number and a sensor, or no number and a reason; without estimates nothing is estimated."""
    with measure_energy() as meter:
        sum(range(100_000))
    found = meter.energy
    assert found.estimated == ()
    assert found.joules["gpu"] is None
    assert found.sensors["gpu"] == "the work is on the CPU"
    assert all(found.sensors.values())


def test_estimates_are_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """codecarbon's power model fills what no sensor gives and never overrides one; no file is written, no server asked;
    a processor whose TDP it does not know is refused."""
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(power_model, "_tdp_is_known", lambda: False)
    before = set(Path().iterdir())
    with measure_energy(sensors=[_Counting("gpu")], estimate=True, sample_seconds=0.2) as meter:
        sum(range(3_000_000))
    found = meter.energy
    assert found.joules["gpu"] is not None
    assert set(found.estimated) == {"dram"}
    assert found.joules["cpu"] is None
    assert "does not know" in found.sensors["cpu"]
    assert found.sensors["dram"].startswith("estimate: codecarbon")
    assert "estimated: dram" in str(found)
    assert set(Path().iterdir()) == before


def test_without_codecarbon_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "codecarbon", None)
    with pytest.raises(ImportError, match=r"squeezoo\[eval\]"), measure_energy(estimate=True):
        pass


@pytest.mark.gpu
def test_a_gpu_is_measured() -> None:
    """A second of matrix products on a GPU takes at least 10 J (idle power of a data-centre board is above 40 W)."""
    import time

    import torch

    x = torch.randn(2048, 2048, device="cuda")
    with measure_energy(device="cuda", sample_seconds=0.2) as meter:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            x @ x
            torch.cuda.synchronize()
    joules = meter.energy.joules["gpu"]
    assert joules is not None, meter.energy.sensors
    assert joules > 10
    assert energy_module.TERMS == ("cpu", "dram", "gpu")
