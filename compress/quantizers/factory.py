"""From a recipe's record to a quantizer. Records are plain mappings, as the plan holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .absmax import AbsmaxQuantizer
from .base import Quantizer
from .dynamic import DynamicQuantizer
from .lsq import LsqQuantizer
from .minmax import MinMaxQuantizer
from .pact import PactQuantizer
from .q8bert import Q8BertQuantizer
from .sawb import SawbQuantizer, sawb_note

Record = Mapping[str, Any]


def weight_quantizer(record: Record, shape: tuple[int, int], parts: int = 1) -> Quantizer:
    """The quantizer of a weight.

    Args:
        record: e.g. ``{"method": "sawb", "bits": 4}``; see ``compress.rules``.
        shape: (out_features, in_features).
        parts: 3 for a fused QKV matrix: what is per tensor elsewhere is per third of the rows there, so that fused and
            separate matrices agree.

    Raises:
        ValueError: a method that is not for weights, bits that it does not have, or rows that cannot be cut in parts.
    """
    rows = shape[0]
    if parts < 1 or rows % parts:
        raise ValueError(f"expected out_features that {parts} parts share evenly, found {rows}")
    method, bits = record["method"], record["bits"]
    made: Quantizer
    if method == "lsq":
        made = LsqQuantizer(bits, (rows, 1))
    elif method == "absmax":
        made = AbsmaxQuantizer(bits, rows)
    elif method == "sawb":
        channel = record.get("granularity", "tensor") == "channel"
        options = {key: record[key] for key in ("levels", "gradient", "fit") if key in record}
        made = SawbQuantizer(bits, rows if channel else parts, **options)
    elif method == "q8bert":
        made = AbsmaxQuantizer(bits, parts)
    elif method == "dynamic":
        made = AbsmaxQuantizer(bits, parts, span=127.5, lowest=-128)
    else:
        raise ValueError(f"no weight quantizer {method!r}; known: lsq, absmax, sawb, q8bert, dynamic")
    return _with_record(made, record)


def weight_note(record: Record) -> str:
    """What a weight quantizer uses in place of what its record asks for; "" where it does as asked."""
    if record["method"] != "sawb":
        return ""
    return sawb_note(record["bits"], **{key: record[key] for key in ("levels", "fit") if key in record})


def input_quantizer(record: Record) -> Quantizer:
    """The quantizer of a GEMM's input.

    Raises:
        ValueError: a method that is not for inputs, or options that it does not allow.
    """
    method, bits = record["method"], record["bits"]
    options = {key: value for key, value in record.items() if key not in ("method", "bits")}
    made: Quantizer
    if method == "lsq":
        made = LsqQuantizer(bits)
    elif method == "minmax":
        made = MinMaxQuantizer(bits, **options)
    elif method == "pact":
        made = PactQuantizer(bits, **options)
    elif method == "q8bert":
        made = Q8BertQuantizer(bits, **options)
    elif method == "dynamic":
        made = DynamicQuantizer(bits)
    else:
        raise ValueError(f"no input quantizer {method!r}; known: lsq, minmax, pact, q8bert, dynamic")
    return _with_record(made, record)


def map_quantizer(record: Record, which: str = "") -> Quantizer:
    """The quantizer of one factor of an attention product: ``which`` is q, k, p or v. Zero stays exactly zero.

    Raises:
        ValueError: a method that is not for attention maps.
    """
    if record["method"] not in ("lsq", "minmax", "pact"):
        of = f" of {which}" if which else ""
        raise ValueError(f"no attention map quantizer{of} {record['method']!r}; known: lsq, minmax, pact")
    return input_quantizer(record)


def _with_record(made: Quantizer, record: Record) -> Quantizer:
    made.record = dict(record)
    return made
