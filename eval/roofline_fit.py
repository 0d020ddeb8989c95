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

LEAST_SHARE = 0.9  # of one core; a timed GEMM never waits, so that less was taken by other processes
MakeGemm = Callable[[int, int, int], Callable[[], object]]
"""(M, K, N_out) to a call that runs such a GEMM once."""


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


def float32_gemm(m: int, k: int, n_out: int) -> Callable[[], object]:
    """A ``linear`` call on random numbers."""
    x_MK, w_OI = torch.randn(m, k), torch.randn(n_out, k)
    return lambda: torch.nn.functional.linear(x_MK, w_OI)


def measure_gemms(
    shapes: Sequence[tuple[int, int, int]] = CPU_SHAPES,
    kernels: Mapping[str, MakeGemm] | None = None,
    *,
    repeats: int = 20,
    min_seconds: float = 0.002,
) -> dict[str, list[TimedGemm]]:
    """Time GEMMs on this CPU: the median of ``repeats``, each of as many calls as fill ``min_seconds``.

    The kinds take turns at each shape, so that what else runs on the machine slows all of them alike. The weights are
    read from memory or cache as they happen to lie, as in a model.

    Args:
        kernels: number format, with ``_2:4`` behind it for sparse kernels, to what makes the call for a shape; None:
            float32 alone.
    """
    kernels = {"fp32": float32_gemm} if kernels is None else kernels
    timed: dict[str, list[TimedGemm]] = {kind: [] for kind in kernels}
    for shape in shapes:
        calls = {kind: make(*shape) for kind, make in kernels.items()}
        counts = {kind: _calls_that_fill(min_seconds, call) for kind, call in calls.items()}
        found: dict[str, list[float]] = {kind: [] for kind in kernels}
        for _ in range(repeats):
            for kind, call in calls.items():
                found[kind].append(_seconds(call, counts[kind]) / counts[kind])
        for kind, seconds in found.items():
            number_format, _, sparsity = kind.partition("_")
            formats = number_format, number_format, number_format, "fp32"
            work = GemmWork(*shape, *formats, bool(sparsity), sparsity or None)
            timed[kind].append(TimedGemm(work, statistics.median(seconds)))
    return timed


def measure_bandwidth(*, megabytes: int = 128, repeats: int = 5) -> float:
    """Bytes per second of a copy in this machine's memory, reading and writing counted; the best of ``repeats``."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(_seconds(lambda: target.copy_(source), 1) for _ in range(repeats))
    return 2 * source.numel() * 4 / best


def this_cpu(
    kernels: Mapping[str, MakeGemm] | None = None,
    *,
    repeats: int = 20,
    shapes: Sequence[tuple[int, int, int]] = CPU_SHAPES,
) -> Hardware:
    """This processor with its threads as they are set: rates and bandwidth are the best measured, factors are fitted.

    It runs for a few seconds. A share of bandwidth above 1 says that weights came from the cache, as those of small
    models do. Where other processes took this one's time, ``source`` says so: long calls suffer more than short ones,
    so the numbers flatter int8 then.

    Args:
        kernels: kinds beside float32, ``int8`` and ``int8_2:4``, to what makes a call for a shape. Whether integers or
            zeros gain anything depends on the kernels alone, so a format that has none here has no rate. The rate of
            2:4 is twice the dense one, as GPUs' datasheets have it; its fitted share says what is left of that.

    Raises:
        ValueError: a sparse kind without its dense one.
    """
    makers = {"fp32": float32_gemm, **(kernels or {})}
    lonely = [kind for kind in makers if kind.partition("_")[0] not in makers]
    if lonely:
        raise ValueError(f"kernels: {lonely[0]} needs its dense kind too, {lonely[0].partition('_')[0]}")
    bandwidth = measure_bandwidth()
    started, worked = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        timed = measure_gemms(shapes, makers, repeats=repeats)
    share = (time.process_time() - worked) / (time.perf_counter() - started)
    rates = {kind: max(gemm.work.flops / gemm.seconds for gemm in found) for kind, found in timed.items()}
    source = (
        f"measured: the best of {len(shapes)} GEMMs each of {', '.join(makers)} (float32: PyTorch "
        f"{torch.__version__}), and a memory copy"
    )
    if share < LEAST_SHARE:
        source += f"; on a busy machine, which left {share:.0%} of a core to this process: measure again on an idle one"
    sparse = tuple(kind.partition("_")[0] for kind in makers if "_" in kind)
    dense = {kind: rate for kind, rate in rates.items() if "_" not in kind}
    return fit_hardware(Hardware(device_name("cpu"), dense, bandwidth, None, None, sparse, source), timed)


def _calls_that_fill(seconds: float, call: Callable[[], object]) -> int:
    call()
    return max(1, round(seconds / max(_seconds(call, 1), 1e-9)))


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start
