"""A speed-up as people read it, the same in every table, card and command."""

from __future__ import annotations

import math


def speed_up(ratio: float) -> str:
    """``2.31x``, rounded down to two decimals so that a slower model never shows as 1.00x; slower is said so."""
    shown = math.floor(100 * ratio + 1e-9) / 100
    return f"{shown:.2f}x" if ratio >= 1 else f"{shown:.2f}x, slower"
