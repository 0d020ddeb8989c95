"""Expected validation performance: what the best of n trials is worth (Dodge et al. 2019, arXiv:1909.03004)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def expected_validation_performance(
    values: Sequence[float], higher_is_better: bool = True
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the best of n draws with replacement, for n = 1 .. N; never beyond N.

    ``P(max = v_i | n) = (i / N)^n - ((i - 1) / N)^n`` over the ascending values; for metrics where lower is better the
    minimum instead.

    Args:
        values: validation values of N trials, in any order.

    Returns:
        (E_n, sd_n), each of length N; E_1 is the mean.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    sign = 1.0 if higher_is_better else -1.0
    v_N = np.sort(sign * np.asarray(values, dtype=np.float64))
    if not v_N.size or not np.isfinite(v_N).all():
        raise ValueError(f"expected finite validation values of at least one trial, got {list(values)!r}")
    share_N = np.arange(v_N.size + 1) / v_N.size
    budgets_B = np.arange(1, v_N.size + 1)
    p_BN = np.diff(share_N[None] ** budgets_B[:, None], axis=1)
    mean_B = p_BN @ v_N
    sd_B = np.sqrt((p_BN * (v_N[None] - mean_B[:, None]) ** 2).sum(1))
    return (sign * mean_B).tolist(), sd_B.tolist()
