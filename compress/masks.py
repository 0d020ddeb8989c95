"""N:M masks: at most N non-zeros in each group of M consecutive elements along the last axis.

Legend: O out_features, I in_features (the axis of the groups), R rows in a chunk, G groups, M group size, T groups with
ties across the n-th place. A mask is bool, of the shape of its score; True = kept. Equal scores:
the lower index is kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

_PATTERN = re.compile(r"(0|[1-9][0-9]{0,3}):(0|[1-9][0-9]{0,3})")
_NEAR_MISS = re.compile(r"\s*([0-9]{1,4})\s*[:xX/]\s*([0-9]{1,4})\s*")
# Integers that hold one byte per member of a group: small groups are ranked by arithmetic on these.
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Scores handled at a time on a CPU: the temporaries of a chunk stay in its cache (measured).
_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: ``n`` kept of each ``m`` consecutive elements along in_features.

    Raises:
        ValueError: unless 1 <= n < m and m is a power of two, 2 <= m <= 256.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        n, m = self.n, self.m
        if _allowed(n, m):
            return
        a, b = (n, m) if _allowed(m, n) else (4, 2)
        swap = f" NxMTransformer writes {a}:{b} (or {a}x{b}) for what is {b}:{a} here." if n >= m else ""
        raise ValueError(
            f'pattern "{n}:{m}": expected N:M, N kept of M consecutive weights, with 1 <= N < M and M one of 2, 4, 8, '
            f'16, 32, 64, 128, 256.{swap} Write "{b}:{a}"'
        )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read ``"2:4"``; every other spelling is a ValueError that says what to write."""
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match:
            return cls(int(match[1]), int(match[2]))
        hint = 'write for example "2:4"'
        near = _NEAR_MISS.fullmatch(text) if isinstance(text, str) else None
        if near:
            n, m = sorted((int(near[1]), int(near[2])))
            hint = f'write "{n}:{m}"' if _allowed(n, m) else hint
        elif isinstance(text, int):
            hint += ", with the quotes: YAML reads 2:4 without them as the number 124"
        raise ValueError(f'expected a sparsity pattern "N:M" (N kept of M consecutive weights), found {text!r}; {hint}')

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of the weights that is kept, n / m."""
        return self.n / self.m


def _allowed(n: int, m: int) -> bool:
    return 1 <= n < m and 2 <= m <= 256 and m & (m - 1) == 0


def nm_mask(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """Mask of the N largest scores of each group of M along the last axis: [..., I] -> bool [..., I].

    A tail of r < M columns keeps min(N, r). Scores are compared in float32, float64 in float64.

    Raises:
        ValueError: a score is NaN.
    """
    return _mask_of_largest(score_OI, pattern, absolute=False)


def mask_without_waiting(score_OI: Tensor, pattern: Pattern) -> Tensor:
    """`nm_mask` for scores that were computed a moment ago: a GPU is not waited for, so there NaN is not refused, and
    what is kept beside one is of no meaning."""
    return _mask_of_largest(score_OI, pattern, absolute=False, refuse_nan=score_OI.device.type == "cpu")


def magnitude_mask(w_OI: Tensor, pattern: Pattern) -> Tensor:
    """Mask of the N largest |w| of each group (ASP, Mishra et al., arXiv:2104.08378): [..., I] -> bool [..., I].

    Same as ``nm_mask(w_OI.abs(), pattern)`` without that temporary, and right for int8 -128.
    """
    return _mask_of_largest(w_OI, pattern, absolute=True)


@torch.no_grad()
def _mask_of_largest(x_OI: Tensor, pattern: Pattern, absolute: bool, refuse_nan: bool = True) -> Tensor:
    in_features = x_OI.shape[-1]
    x_RI = x_OI.reshape(-1, in_features)
    mask_RI = torch.empty(x_RI.shape, dtype=torch.bool, device=x_RI.device)
    tail = in_features % pattern.m
    whole = in_features - tail
    step = max(1, x_RI.shape[0])
    if x_RI.device.type == "cpu":
        step = min(step, max(1, _CHUNK_ELEMENTS // max(1, in_features)))
    wide = torch.float64 if x_RI.dtype in (torch.float64, torch.int32, torch.int64) else torch.float32
    buffer_RI = torch.empty((step, in_features), dtype=wide, device=x_RI.device)
    for row in range(0, x_RI.shape[0] if in_features else 0, step):
        score_RI = buffer_RI[: x_RI.shape[0] - row]
        if absolute and x_RI.dtype == wide:  # int8 must be widened first: its -128 has no absolute value
            torch.abs(x_RI[row : row + step], out=score_RI)
        else:
            score_RI.copy_(x_RI[row : row + step])
            if absolute:
                score_RI.abs_()
        if refuse_nan and bool(score_RI.amax().isnan()):  # the maximum is NaN as soon as one score is
            count = int(x_RI.isnan().sum())
            raise ValueError(f"expected scores without NaN, found {count} NaN of {x_RI.numel()}; no mask was made")
        mask_chunk_RI = mask_RI[row : row + step]
        if whole:
            keep = _keep_by_words if pattern.m in _WORDS else _keep_by_threshold
            mask_chunk_RI[:, :whole] = keep(score_RI[:, :whole].reshape(-1, pattern.m), pattern.n).view(-1, whole)
        if tail:
            mask_chunk_RI[:, whole:] = _keep_by_threshold(score_RI[:, whole:], min(pattern.n, tail))
    return mask_RI.view(x_OI.shape)


def _keep_by_words(score_GM: Tensor, n: int) -> Tensor:
    """Rank each member of a group by comparing all pairs: [G, M] -> bool [G, M], M of 2, 4 or 8.

    Member j of a group is byte j of one integer. Each byte counts the members that go before j: those with a larger
    score, and those of equal score at a lower index. A comparison of the flat scores with themselves moved by k
    compares all pairs (j, j + k) at once; contiguous reads are what makes this faster than sorting or top-k.
    """
    m = score_GM.shape[1]
    score, dtype = score_GM.reshape(-1), _WORDS[m]
    start = _signed([128 - n + m - 1 - j for j in range(m)])
    before_G = torch.full(score_GM.shape[:1], start, dtype=dtype, device=score.device)
    wins_GM = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    wins_G = wins_GM.view(dtype)
    for k in range(1, m):
        torch.ge(score[:-k], score[k:], out=wins_GM[:-k])
        wins_G.bitwise_and_(_signed([1] * (m - k)))  # pairs that reach into the next group do not count
        # Byte j loses what it was charged for j + k at the start; byte j + k is charged instead.
        before_G.add_(wins_G, alpha=(1 << 8 * k) - 1)
    # Bytes began at 128 - n, so bit 7 says "n or more go before".
    kept_G = before_G.bitwise_right_shift_(7).bitwise_not_().bitwise_and_(_signed([1] * m))
    return kept_G.view(torch.bool).view(-1, m)


def _signed(bytes_low_first: list[int]) -> int:
    """The signed integer made of these bytes (padded to 2, 4 or 8), the first one lowest."""
    width = next(width for width in _WORDS if width >= len(bytes_low_first))
    return int.from_bytes(bytes(bytes_low_first).ljust(width, b"\0"), "little", signed=True)


def _keep_by_threshold(score_GM: Tensor, n: int) -> Tensor:
    """Keep what is not below the n-th largest; on a CPU only groups with ties across that line are looked at again. To
    find them a GPU would have to be waited for."""
    least_G1 = score_GM.topk(n, dim=1, sorted=False).values.amin(1, keepdim=True)
    if score_GM.device.type != "cpu":
        return _first_of_equals(score_GM, least_G1, n)
    kept_GM = score_GM >= least_G1
    tied = (kept_GM.sum(1, dtype=torch.int16) > n).nonzero().squeeze(1)
    if tied.numel():
        kept_GM[tied] = _first_of_equals(score_GM[tied], least_G1[tied], n)
    return kept_GM


def _first_of_equals(score_TM: Tensor, least_T1: Tensor, n: int) -> Tensor:
    """What is above the n-th largest, and of those equal to it as many as there is room for, from the lowest index."""
    above_TM, equal_TM = score_TM > least_T1, score_TM == least_T1
    room_T1 = n - above_TM.sum(1, keepdim=True)
    return above_TM | (equal_TM & (equal_TM.cumsum(1) <= room_T1))


def project(x_OI: Tensor, pattern: Pattern) -> Tensor:
    """Nearest N:M matrix (Euclidean projection): ``x_OI`` with all but the N largest |x| of each group set to zero."""
    return torch.where(magnitude_mask(x_OI, pattern), x_OI, 0)


@torch.no_grad()
def check_nm(w_OI: Tensor, pattern: Pattern) -> bool:
    """Whether every group, the ragged tail included, has at most N non-zeros along the last axis."""
    nonzero_OI = (w_OI != 0).view(torch.uint8)
    whole = w_OI.shape[-1] // pattern.m * pattern.m
    nonzero_OGM = nonzero_OI[..., :whole].unflatten(-1, (-1, pattern.m)) if whole else None
    counts = [] if nonzero_OGM is None else [nonzero_OGM.sum(-1, dtype=torch.int16)]
    if whole < w_OI.shape[-1]:
        counts.append(nonzero_OI[..., whole:].sum(-1, dtype=torch.int16))
    return all(bool((count <= pattern.n).all()) for count in counts)
