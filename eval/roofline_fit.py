"""Efficiency factors of the roofline model from timed GEMMs, and this CPU as a `Hardware` measured on the spot."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .environment import device_name
from .hardware import PLACEHOLDER, Efficiency, Hardware
from .roofline import GemmWork

# (M, K, N_out): from one token to large batches, square and with the feed-forward's shapes
CPU_SHAPES = (
    (1, 256, 256), (1, 768, 3072), (1, 2048, 2048), (16, 384, 1536), (64, 768, 768), (128, 384, 384), (256, 768, 768),
    (256, 768, 3072), (512, 384, 1536),
)  # fmt: skip


@dataclass(frozen=True)
class TimedGemm:
    """One GEMM and the median seconds that it took."""

    work: GemmWork
    seconds: float

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"a timed GEMM needs positive seconds, got {self.seconds!r}")


def fit_efficiency(timed: Sequence[TimedGemm], rate: float, bandwidth: float) -> Efficiency:
    """Least squares on the relative error of ``max(flops / (eta_c rate), bytes / (eta_m bandwidth)) + t0``.

    A factor that no measurement depends on at the optimum (all GEMMs bound by compute, say) keeps its placeholder and
    is named in ``guessed``.

    Args:
        timed: at least three GEMMs of one kernel kind. rate, bandwidth: datasheet, operations and bytes per second.

    Raises:
        ValueError: fewer than three measurements.
    """
    from scipy.optimize import least_squares

    if len(timed) < 3:
        raise ValueError(f"three factors need at least three timed GEMMs, got {len(timed)}")
    flops_s = np.array([gemm.work.flops / rate for gemm in timed])
    bytes_s = np.array([gemm.work.bytes / bandwidth for gemm in timed])
    seconds = np.array([gemm.seconds for gemm in timed])
    unit = float(seconds.min())  # the parameters should be of one size

    def error(factors: np.ndarray) -> np.ndarray:
        # 1 / eta_c, 1 / eta_m, t0 / unit: linear in them on either side of the ridge
        return (np.maximum(factors[0] * flops_s, factors[1] * bytes_s) + factors[2] * unit - seconds) / seconds

    # the maximum has corners, so the search starts from several sides of them
    highest = float(min((seconds / flops_s).max(), 1e9)), float(min((seconds / bytes_s).max(), 1e9))
    starts = [(a * highest[0], b * highest[1], t) for a in (0.03, 0.3, 1) for b in (0.03, 0.3, 1) for t in (0.01, 0.5)]
    fits = [least_squares(error, start, bounds=([1e-9] * 2 + [0.0], np.inf), x_scale=start) for start in starts]
    best = min(fits, key=lambda fit: fit.cost)
    by_compute = best.x[0] * flops_s >= best.x[1] * bytes_s
    guessed = [name for name, told in (("compute", by_compute.any()), ("memory", (~by_compute).any())) if not told]
    return Efficiency(
        compute=PLACEHOLDER.compute if "compute" in guessed else float(1 / best.x[0]),
        memory=PLACEHOLDER.memory if "memory" in guessed else float(1 / best.x[1]),
        overhead_s=float(best.x[2] * unit),
        measurements=len(timed),
        guessed=tuple(guessed),
    )


def fit_hardware(hardware: Hardware, timed: Mapping[str, Sequence[TimedGemm]]) -> Hardware:
    """A copy of ``hardware`` with factors fitted for each kernel kind, e.g. ``fp16`` and ``fp16_2:4``."""
    fitted = {}
    for kind, gemms in timed.items():
        number_format, _, sparse = kind.partition("_")
        fitted[kind] = fit_efficiency(gemms, hardware.rate(number_format, bool(sparse)), hardware.bandwidth)
    return hardware.with_efficiencies(**fitted)


def measure_gemms(
    shapes: Sequence[tuple[int, int, int]] = CPU_SHAPES, *, repeats: int = 20, min_seconds: float = 0.002
) -> list[TimedGemm]:
    """Time float32 ``linear`` calls on this CPU: the median of ``repeats``, each of as many calls as fill
    ``min_seconds``. The weights are read from memory or cache as they happen to lie, as in a model."""
    timed = []
    for m, k, n_out in shapes:
        x_MK, w_OI = torch.randn(m, k), torch.randn(n_out, k)
        seconds = _median_seconds(lambda x=x_MK, w=w_OI: torch.nn.functional.linear(x, w), repeats, min_seconds)  # type: ignore[misc]
        timed.append(TimedGemm(GemmWork(m, k, n_out, "fp32", "fp32", "fp32", "fp32"), seconds))
    return timed


def measure_bandwidth(*, megabytes: int = 128, repeats: int = 5) -> float:
    """Bytes per second of a copy in this machine's memory, reading and writing counted; the best of ``repeats``."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(_seconds(lambda: target.copy_(source), 1) for _ in range(repeats))
    return 2 * source.numel() * 4 / best


def this_cpu(*, repeats: int = 20, shapes: Sequence[tuple[int, int, int]] = CPU_SHAPES) -> Hardware:
    """This processor with its threads as they are set: rate and bandwidth are the best measured, factors are fitted.

    It runs for a few seconds. A share of bandwidth above 1 says that weights came from the cache, as those of small
    models do. int8 has no rate here: whether it gains anything depends on the kernels, so it is timed, not modelled.
    """
    bandwidth = measure_bandwidth()
    with torch.inference_mode():
        timed = measure_gemms(shapes, repeats=repeats)
    rate = max(gemm.work.flops / gemm.seconds for gemm in timed)
    source = f"measured: best of {len(timed)} float32 GEMMs with PyTorch {torch.__version__}, and a memory copy"
    cpu = Hardware(device_name("cpu"), {"fp32": rate}, bandwidth, None, None, (), source)
    return fit_hardware(cpu, {"fp32": timed})


def _median_seconds(call: Callable[[], object], repeats: int, min_seconds: float) -> float:
    call()
    calls = max(1, round(min_seconds / max(_seconds(call, 1), 1e-9)))
    return statistics.median(_seconds(call, calls) / calls for _ in range(repeats))


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start
