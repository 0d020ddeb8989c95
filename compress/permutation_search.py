"""Which order of the columns keeps the most of a matrix under N:M (ALGORITHMS B.2).

Legend: I in_features, O out_features, G groups, M group size, P positions of a column = G * M.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import Pattern

# A swap must gain this share of what is kept: below lies the rounding of float32 sums.
_LEAST_GAIN = 1e-6


@torch.no_grad()
def find_permutation(
    w_OI: Tensor, pattern: Pattern, *, max_swaps: int | None = None, width: int | None = None
) -> Tensor:
    """Order of the columns that raises sum |Pi_{N:M}(W[:, p])|: int64 [I], ``w_OI[:, p]`` is the permuted matrix.

    Greedy: of all swaps of two columns of different groups the best one is made, until none gains. With t the N-th
    largest |w| of a group without column i, column c in its place keeps max(|w_c| - t, 0) more in each row; summed over
    rows this is an L1 distance, so all pairs of columns are valued by one distance matrix, and after a swap only the
    rows of the two groups are valued again.

    Args:
        max_swaps: at most so many; default 10 * I (of each segment, with ``width``).
        width: columns stay inside segments of so many columns, such as heads; a multiple of M. None: anywhere.

    Raises:
        ValueError: ``width`` does not divide I or is no multiple of M, or the weight holds NaN.
    """
    in_features = w_OI.shape[1]
    width = in_features if width is None else width
    if width != in_features and (width < 1 or in_features % width or width % pattern.m):
        raise ValueError(
            f"expected segments that divide {in_features} in_features, a multiple of M = {pattern.m}, found {width}"
        )
    if bool(w_OI.isnan().any()):
        raise ValueError(f"expected a weight without NaN, found {int(w_OI.isnan().sum())} of {w_OI.numel()}")
    x_IO = w_OI.abs().float().t().contiguous()
    parts = []
    for start in range(0, in_features, width):
        search = _Search(x_IO[start : start + width], pattern)
        search.run_(10 * width if max_swaps is None else max_swaps)
        parts.append(start + search.order_I)
    return torch.cat(parts)


class _Search:
    """The state of one greedy search. ``kept_PP[p, q]``: what the group of position p keeps with the column of position
    q in the place of p's own."""

    def __init__(self, x_IO: Tensor, pattern: Pattern) -> None:
        self.n, self.m, self.columns = pattern.n, pattern.m, len(x_IO)
        # Columns of zeros fill up a ragged last group: they change nothing there and are never swapped.
        self.x_PO = torch.nn.functional.pad(x_IO, (0, 0, 0, -len(x_IO) % self.m))
        positions = len(self.x_PO)
        self.groups = positions // self.m
        self._order_P = torch.arange(positions, device=x_IO.device)
        self.sum_P = self.x_PO.sum(1)
        self.energy_G = torch.zeros(self.groups, device=x_IO.device)
        self.kept_PP = torch.zeros(positions, positions, device=x_IO.device)
        self.gain_GG = torch.full((self.groups, self.groups), -torch.inf, device=x_IO.device)
        step = max(1, (1 << 24) // (positions * self.m))  # groups at a time
        for start in range(0, self.groups, step):
            self._value_(torch.arange(start, min(start + step, self.groups), device=x_IO.device))
        for start in range(0, self.groups, step):
            self._gain_(torch.arange(start, min(start + step, self.groups), device=x_IO.device))

    @property
    def order_I(self) -> Tensor:
        return self._order_P[: self.columns]

    def run_(self, max_swaps: int) -> int:
        """Make the best swap until none gains; returns how many were made."""
        for swaps in range(max_swaps):
            best = int(self.gain_GG.argmax())
            a, b = divmod(best, self.groups)
            if not float(self.gain_GG[a, b]) > _LEAST_GAIN * float(self.energy_G[a] + self.energy_G[b]):
                return swaps
            block_MM = self._gains(torch.tensor([a]))[0, :, b]
            i, j = divmod(int(block_MM.argmax()), self.m)
            self._swap_(a * self.m + i, b * self.m + j)
        return max_swaps

    def _swap_(self, p: int, q: int) -> None:
        there, here = [p, q], [q, p]
        for rows in (self.x_PO, self._order_P, self.sum_P):
            rows[there] = rows[here]
        self.kept_PP[:, there] = self.kept_PP[:, here]
        changed = torch.tensor([p // self.m, q // self.m], device=self.x_PO.device)
        self._value_(changed)
        self._gain_(changed)

    def _value_(self, some_G: Tensor) -> None:
        """Fill ``energy_G`` and the rows of ``kept_PP`` that belong to these groups."""
        rows_P = self._positions(some_G)
        x_GMO = self.x_PO[rows_P].view(len(some_G), self.m, -1)
        top_GNO = x_GMO.topk(self.n + 1, dim=1).values
        last_G1O, next_G1O = top_GNO[:, -2:-1], top_GNO[:, -1:]
        self.energy_G[some_G] = top_GNO[:, :-1].sum((1, 2))
        # t: what a newcomer has to beat when column i has left
        t_PO = torch.where(x_GMO >= last_G1O, next_G1O, last_G1O).flatten(0, 1)
        lost_P = (x_GMO - next_G1O).clamp_min_(0).sum(2).flatten()
        left_P = self.energy_G[some_G].repeat_interleave(self.m) - lost_P
        # sum of max(x - t, 0) = (sum x - sum t + sum |x - t|) / 2
        distance_PP = torch.cdist(t_PO, self.x_PO, p=1)
        won_PP = (self.sum_P[None] - t_PO.sum(1)[:, None] + distance_PP) / 2
        self.kept_PP[rows_P] = left_P[:, None] + won_PP

    def _gain_(self, some_G: Tensor) -> None:
        """Fill the rows and columns of ``gain_GG`` that belong to these groups."""
        gain_GG = self._gains(some_G).amax((1, 3))
        gain_GG[torch.arange(len(some_G)), some_G] = -torch.inf
        self.gain_GG[some_G] = gain_GG
        self.gain_GG[:, some_G] = gain_GG.t()

    def _gains(self, some_G: Tensor) -> Tensor:
        """Gain of every swap between these groups and all others: [some, M, G, M]."""
        rows_P = self._positions(some_G)
        both_PP = self.kept_PP[rows_P] + self.kept_PP[:, rows_P].t()
        both_PP[:, self.columns :] = -torch.inf  # padding stays where it is
        both_PP[rows_P >= self.columns] = -torch.inf
        gain = both_PP.view(len(some_G), self.m, self.groups, self.m)
        return gain - self.energy_G[some_G][:, None, None, None] - self.energy_G[None, None, :, None]

    def _positions(self, some_G: Tensor) -> Tensor:
        return (some_G[:, None] * self.m + torch.arange(self.m, device=some_G.device)).flatten()
