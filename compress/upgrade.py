"""Manifests of older checkpoint formats, read as if they had been written today.

1: 2026, the first: LSQ only, ``weight_bits`` and ``input_bits`` in the plan. Tensors lie as in format 2.
2: quantizer records, attention maps, embedding tables, bitmaps, one scale where all are equal, tied tensors once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMAT_VERSION = 2


def upgraded(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest in the newest format; ``manifest`` itself is not changed.

    Raises:
        KeyError: it lacks an entry of its own format.
    """
    data = dict(manifest)
    if data["format_version"] == 1:
        gemms = [_with_quantizers(gemm) for gemm in data["plan"]["gemms"]]
        data["plan"] = {**data["plan"], "gemms": gemms}
    data["format_version"] = FORMAT_VERSION
    return data


def _with_quantizers(gemm: Mapping[str, Any]) -> dict[str, Any]:
    record = {key: value for key, value in gemm.items() if key not in ("weight_bits", "input_bits")}
    for side in ("weight", "input"):
        bits = gemm[f"{side}_bits"]
        record[side] = None if bits is None else {"method": "lsq", "bits": bits}
    return record
