"""Predicted time of GEMMs on hardware that is not here: a roofline model. Its numbers are never measurements.

Sources: ALGORITHMS H.1 (Deep Compression's Amdahl model of a systolic array that skips zero weights) and H.2 (Williams
et al. 2009, Roofline). Legend: M tokens, K in_features, N_out out_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .hardware import Efficiency, Hardware
from .ratio import speed_up

BYTES = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}
_FORMATS = {32: "fp32", 16: "fp16", 8: "int8", 4: "int4"}
GemmData = Mapping[str, Any]  # one of ``plan.to_dict()["gemms"]``
Tokens = int | Callable[[GemmData], int]


def amdahl_speedup(fraction: float, kappa: float = 2.0) -> float:
    """Speed-up when a share ``fraction`` of the dense time becomes ``kappa`` = M/N times faster (H.1).

    Raises:
        ValueError: the share is outside [0, 1], or kappa below 1.
    """
    if not 0 <= fraction <= 1 or kappa < 1:
        raise ValueError(f"expected a share of 0 to 1 and kappa of at least 1, got {fraction!r} and {kappa!r}")
    return 1 / (1 - fraction + fraction / kappa)


def int4_fraction(int8_fraction: float) -> float:
    """Share of the pruned layers after int4 has halved their time and nothing else's (H.1)."""
    if not 0 <= int8_fraction <= 1:
        raise ValueError(f"expected a share of 0 to 1, got {int8_fraction!r}")
    return (int8_fraction / 2) / (1 - int8_fraction / 2)


def storage_ratio(sparsity: str | None, bits: int) -> float:
    """Bytes of N:M weights over those of dense ones of the same width: ``N (b + log2 M) / (M b)``, indices included."""
    if sparsity is None:
        return 1.0
    kept, _, group = sparsity.partition(":")
    n, m = int(kept), int(group)
    return n * (bits + max(1, math.ceil(math.log2(m)))) / (m * bits)


@dataclass(frozen=True)
class GemmWork:
    """One GEMM as a kernel sees it.

    Args:
        compute: number format that is multiplied. weight, input, output: formats that are read and written.
        sparse: whether a 2:4 kernel runs it. sparsity: N:M of the stored weights, None for dense ones.
    """

    m: int
    k: int
    n_out: int
    compute: str
    weight: str
    input: str
    output: str
    sparse: bool = False
    sparsity: str | None = None

    @property
    def kind(self) -> str:
        """Of the kernel, as `Hardware.efficiencies` names it."""
        return self.compute + ("_2:4" if self.sparse else "")

    @property
    def flops(self) -> int:
        """Operations of the dense GEMM; a 2:4 kernel is said to do them at twice the rate."""
        return 2 * self.m * self.k * self.n_out

    @property
    def bytes(self) -> float:
        """Traffic when each tensor moves once."""
        ratio = storage_ratio(self.sparsity, int(BYTES[self.weight] * 8))
        weights = self.n_out * self.k * BYTES[self.weight] * ratio
        return self.m * self.k * BYTES[self.input] + weights + self.m * self.n_out * BYTES[self.output]


@dataclass(frozen=True)
class GemmTime:
    """Seconds of one GEMM by the model, what limits it, and the efficiency behind it."""

    name: str
    work: GemmWork
    compute_s: float
    memory_s: float
    overhead_s: float
    efficiency: Efficiency

    @property
    def fitted(self) -> bool:
        """Whether measurements stand behind all of its efficiency."""
        return self.efficiency.fitted

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.memory_s) + self.overhead_s

    @property
    def bound(self) -> Literal["compute", "memory"]:
        return "compute" if self.compute_s >= self.memory_s else "memory"


def predict_gemm(
    work: GemmWork, hardware: Hardware, *, efficiency: Efficiency | None = None, name: str = ""
) -> GemmTime:
    """Time of one GEMM by the roofline model; ``efficiency`` None takes what the hardware knows.

    Raises:
        ValueError: the hardware has no rate for the format.
    """
    used = hardware.efficiency(work.compute, work.sparse) if efficiency is None else efficiency
    compute = work.flops / (used.compute * hardware.rate(work.compute, work.sparse))
    return GemmTime(name, work, compute, work.bytes / (used.memory * hardware.bandwidth), used.overhead_s, used)


def gemm_work(gemm: GemmData, tokens: int, hardware: Hardware, *, dense_format: str, dense: bool = False) -> GemmWork:
    """What a planned GEMM asks of this hardware.

    A format that the hardware cannot multiply is stored only: int4 runs as int8 (or as the dense format), and weights
    without quantized inputs are widened to the dense format. N:M that no hardware kernel takes runs dense.

    Args:
        gemm: one of ``plan.to_dict()["gemms"]``: shape [out, in], sparsity, weight, input, accelerated.
        dense_format: of the dense model, e.g. ``fp16``. dense: the GEMM of the dense model instead.
    """
    n_out, k = gemm["shape"]
    if dense:
        return GemmWork(tokens, k, n_out, dense_format, dense_format, dense_format, dense_format)
    weight = _format(gemm["weight"], dense_format)
    input_ = _format(gemm["input"], dense_format)
    widest = max(weight, input_, key=BYTES.__getitem__)
    compute = widest
    while compute not in hardware.rates and BYTES[compute] < BYTES[dense_format]:
        compute = _FORMATS[int(BYTES[compute] * 16)]
    sparse = gemm["sparsity"] == "2:4" and bool(gemm["accelerated"]) and compute in hardware.sparse
    # narrower tensors are unpacked before the kernel, but for dense weight-only kernels, which widen as they read
    input_ = max(input_, compute, key=BYTES.__getitem__)
    if gemm["input"] is not None or sparse:
        weight = max(weight, compute, key=BYTES.__getitem__)
    # the outputs have the width of the dense model's (H.2: an int8 GEMM writes 2 bytes beside fp16)
    kept = gemm["sparsity"] if sparse else None
    return GemmWork(tokens, k, n_out, compute, weight, input_, dense_format, sparse, kept)


def _format(quantizer: Mapping[str, Any] | None, dense_format: str) -> str:
    return dense_format if quantizer is None else _FORMATS[4 if int(quantizer["bits"]) <= 4 else 8]


@dataclass(frozen=True)
class Prediction:
    """What the roofline model says of one model on one hardware. Not a `Speed`: nothing was run.

    Args:
        hardware: its name. dense_format: number format of the dense model. tokens: rows of the largest GEMM.
        dense, compressed: every GEMM of the plan.
        other_s: seconds of all that is no planned GEMM, the same for both; None: left out, times are of GEMMs only.
    """

    hardware: str
    dense_format: str
    tokens: int
    dense: tuple[GemmTime, ...]
    compressed: tuple[GemmTime, ...]
    other_s: float | None

    @property
    def dense_s(self) -> float:
        return sum(gemm.seconds for gemm in self.dense) + (self.other_s or 0)

    @property
    def compressed_s(self) -> float:
        return sum(gemm.seconds for gemm in self.compressed) + (self.other_s or 0)

    @property
    def speedup(self) -> float:
        return self.dense_s / self.compressed_s

    @property
    def fitted(self) -> bool:
        """Whether measurements stand behind every efficiency factor; else placeholders do, and the text says so."""
        return all(gemm.fitted for gemm in (*self.dense, *self.compressed))

    @property
    def efficiencies(self) -> dict[str, Efficiency]:
        """Kind of kernel (``fp32``, ``int8_2:4``) to the factors that were used for it."""
        return {gemm.work.kind: gemm.efficiency for gemm in (*self.dense, *self.compressed)}

    def factors(self) -> str:
        """Which factors of which kernels are measured and which are guessed, in words."""
        return "; ".join(f"{kind} {efficiency.told()}" for kind, efficiency in self.efficiencies.items())

    def __str__(self) -> str:
        scope = "GEMMs only" if self.other_s is None else "whole model"
        factors = "fitted efficiency" if self.fitted else "placeholder efficiency"
        return (
            f"model ({factors}): {self.hardware}, {self.tokens} tokens, {scope}: dense {self.dense_format} "
            f"{self.dense_s * 1e6:.1f} us, compressed {self.compressed_s * 1e6:.1f} us, {speed_up(self.speedup)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data for tables; ``kind`` says that it is a model, so nobody takes it for a measurement."""
        return {
            "kind": "model",
            "hardware": self.hardware,
            "dense_format": self.dense_format,
            "tokens": self.tokens,
            "scope": "gemms" if self.other_s is None else "model",
            "efficiency": "fitted" if self.fitted else "placeholder",
            "factors": {kind: asdict(efficiency) for kind, efficiency in self.efficiencies.items()},
            "dense_us": self.dense_s * 1e6,
            "compressed_us": self.compressed_s * 1e6,
            "speedup": self.speedup,
            "gemms": [
                {
                    "name": after.name, "dense_us": before.seconds * 1e6, "compressed_us": after.seconds * 1e6,
                    "dense_bound": before.bound, "compressed_bound": after.bound, "compute": after.work.compute,
                    "sparse_kernel": after.work.sparse,
                }
                for before, after in zip(self.dense, self.compressed, strict=True)
            ],
        }  # fmt: skip


def predict_model(
    gemms: Sequence[GemmData],
    tokens: Tokens,
    hardware: Hardware,
    *,
    dense_format: str = "fp16",
    efficiency: Efficiency | None = None,
    other_s: float | None = None,
) -> Prediction:
    """Predict a model's time from its plan.

    Args:
        gemms: ``plan.to_dict()["gemms"]``.
        tokens: rows of every GEMM (batch x length), or a function of the GEMM, see `count_tokens`.
        efficiency: for every kernel, instead of what the hardware knows; `hardware.IDEAL` gives the bound itself.
        other_s: seconds of the rest of the model, if they were measured.

    Raises:
        ValueError: no GEMMs, or a dense format without a rate on this hardware.
    """
    if not gemms:
        raise ValueError("a prediction needs the plan's GEMMs, got none")
    if dense_format not in BYTES:
        raise ValueError(f"dense_format is one of {', '.join(BYTES)}; found {dense_format!r}")
    hardware.rate(dense_format)  # refused before anything is computed
    rows = [tokens(gemm) if callable(tokens) else tokens for gemm in gemms]
    if min(rows) < 1:
        raise ValueError(f"a GEMM needs at least one row, got {min(rows)}")
    sides: list[tuple[GemmTime, ...]] = []
    for dense in (True, False):
        works = [gemm_work(g, m, hardware, dense_format=dense_format, dense=dense) for g, m in zip(gemms, rows)]
        sides.append(
            tuple(predict_gemm(w, hardware, efficiency=efficiency, name=g["name"]) for w, g in zip(works, gemms))
        )
    return Prediction(hardware.name, dense_format, max(rows), sides[0], sides[1], other_s)


def count_tokens(batch: int, length: int, *, final: int | None = None, target: int | None = None) -> Tokens:
    """Rows of each GEMM for a batch of sequences.

    Args:
        final: positions per sequence that reach the final projection: 1 for classifiers, None for all.
        target: tokens per sequence on the decoder's side of an encoder-decoder (modules below ``decoder``; keys and
            values of cross-attention read the encoder's side).
    """

    def rows(gemm: GemmData) -> int:
        decoder = target is not None and "decoder" in gemm["name"] and gemm["role"] not in ("cross_k", "cross_v")
        side = target if target is not None and (decoder or gemm["role"] == "final") else length
        return batch * (final if gemm["role"] == "final" and final is not None else side)

    return rows
