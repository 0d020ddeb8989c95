"""Costs to put into a card, built in memory; no number in it is a result."""

from __future__ import annotations

from typing import Any

from squeezoo.eval.decode_speed import DecodeSpeed
from squeezoo.eval.energy import Energy
from squeezoo.eval.loading import Loading, Memory
from squeezoo.eval.timing import Timing
from squeezoo.zoo_cards.parts import StorageForm
from squeezoo.zoo_cards.resources import EnergyRow, LoadingRow, Machine, MemoryRow, Modelled, Resources
from squeezoo.zoo_cards.search import Search

LIBRARIES = {"torch": "2.13.0"}
CPU = "Test CPU (2 threads)"
# 5,308,416 + 1,327,104 bytes of values and indices, as in the fixture card
STORAGE = (
    StorageForm("2:4", "int8", 36, 10_616_832, 6_635_520, 50_000, ""),
    StorageForm("table", "int8", 1, 11_720_448, 11_720_448, 122_088, "embeddings.word_embeddings"),
)


def time(median: float) -> Timing:
    return Timing(median, 0.9 * median, 1.1 * median, 0.8 * median)


def energy(cpu: float | None, **changes: Any) -> Energy:
    """``cpu`` joules in 100 seconds, and nothing else known."""
    fields: dict[str, Any] = dict(
        device=CPU, seconds=100.0, joules={"cpu": cpu, "dram": None, "gpu": None}, estimated=(), pue=1.59,
        intensity=0.43, libraries=LIBRARIES,
        sensors={
            "cpu": "no RAPL zones" if cpu is None else "RAPL package-0", "dram": "no RAPL zone of memory",
            "gpu": "the work is on the CPU",
        },
    )  # fmt: skip
    return Energy(**{**fields, **changes})


def search(**changes: Any) -> Search:
    fields: dict[str, Any] = dict(
        task="glue/sst2", metric="accuracy", higher_is_better=True, split="held-out",
        validation="6,735 of 67,349 rows of 'train' held out", method="grid", seed=0,
        space={"learning_rate": [1e-5, 3e-5], "rho": {"low": 4e-4, "high": 1e-2, "log": True, "integer": False}},
        planned=4, failed=1, values=(0.90, 0.92, 0.91), best={"learning_rate": 3e-5, "rho": 0.001},
        mean_seconds=600.0, device=CPU, model=None, recipe=None,
    )  # fmt: skip
    return Search(**{**fields, **changes})


def loading(source: str, first: float, warm_ms: float) -> Loading:
    return Loading(
        source=source, loader="module:load", device=CPU, dtype="float32", threads=2, first_seconds=first, evicted=True,
        warm=time(warm_ms), import_seconds=2.5, repeats=5, libraries=LIBRARIES,
    )  # fmt: skip


def memory(source: str, tensors: int, peak: int) -> Memory:
    return Memory(
        source=source, loader="module:load", device=CPU, backend="pytorch", dtype="float32", threads=2, batch=8,
        sequence=128, image_size=None, audio_seconds=None, repeats=3, tensors=tensors, baseline=200_000_000,
        loaded=300_000_000, load_peak=310_000_000, run_peak=peak, cuda_loaded=None, cuda_peak=None, libraries=LIBRARIES,
    )  # fmt: skip


def resources() -> Resources:
    return Resources(
        decode=(
            DecodeSpeed(
                CPU, "Int8Linear", "float32", 4, 128, 32, 20, 2, time(80.0), time(40.0), time(10.0), time(8.0),
                (1.9, 2.1), (1.2, 1.3), LIBRARIES,
            ),
        ),
        loading=(
            LoadingRow("dense", loading("dense", 3.0, 1500.0)), LoadingRow("compressed", loading("c", 1.5, 800.0)),
        ),
        memory=(
            MemoryRow("dense", memory("dense", 91_000_000, 500_000_000)),
            MemoryRow("compressed", memory("c", 48_000_000, 420_000_000)),
        ),
        energy=(
            EnergyRow("dense", "inference, batch 8", 800, energy(2000.0)),
            EnergyRow("compressed", "inference, batch 8", 800, energy(None)),
        ),
        modelled=(Modelled("H100-SXM", "fp16", "batch 8", 1024, "gemms", "placeholder", 200.0, 100.0),),
        machine=Machine("Test CPU", ("avx2",), 2, 2, 16_000_000_000, (), {}),
    )  # fmt: skip
