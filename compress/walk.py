"""Forward passes over a calibration set that stop together in front of each group of GEMMs.

Every piece of the set gets a pass of its own. In front of a group, GEMMs that read the same tensor, all wait until the
last has arrived; then something may be done to the group, and the passes go on through what it has become. So one
forward pass in all measures and propagates, memory does not grow with depth, and any architecture will do.

Legend: I in_features, T tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .calibration_rows import CalibrationDataError, Rows, Side, call, cut, real_tokens
from .lockstep import HaltingCall, give_back_memory, share_one_heap


class Statistics(Protocol):
    """What is kept of a GEMM's inputs. ``sums`` add up over data and over processes; NaN in an input shows in them."""

    sums: Tensor

    def add_(self, x_TI: Tensor, sequences: int) -> None: ...


@dataclass(frozen=True)
class Stop:
    """A GEMM to stop in front of: full name, module, and which mask tells padding from tokens of its input."""

    name: str
    module: nn.Module
    side: Side


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no key-value cache, which would grow with depth; all restored afterwards."""
    training = [module for module in model.modules() if module.training]
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    model.eval()
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for config in caching:
            config.use_cache = True


def groups_of(model: nn.Module, stops: list[Stop], row: Rows) -> tuple[list[list[Stop]], int]:
    """Stops that read the very same tensor, in the order of the forward pass; and the most tokens of one row.

    Found by calling the model on one row: what reads what is a fact of the model, not of the adapter.

    Raises:
        ValueError: the model does not call some module.
    """
    groups: list[list[Stop]] = []
    read: list[weakref.ref[Tensor]] = []
    waiting = {stop.name for stop in stops}
    tokens = 1

    def watch(stop: Stop, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal tokens
        x = args[0]
        tokens = max(tokens, x.numel() // x.shape[-1])
        if stop.name not in waiting:  # a block that is called again and again: its first call counts
            return
        waiting.remove(stop.name)
        for group, ref in zip(groups, read, strict=True):
            if ref() is x and group[0].side == stop.side:
                group.append(stop)
                break
        else:
            groups.append([stop])
            read.append(weakref.ref(x))
        if not waiting:
            once.halt()

    once = HaltingCall(partial(_forward, model, row))
    handles = [stop.module.register_forward_pre_hook(partial(watch, stop), prepend=True) for stop in stops]
    try:
        once.resume()
    finally:
        for handle in handles:
            handle.remove()
        once.cancel()
    if waiting:
        name = next(stop.name for stop in stops if stop.name in waiting)
        raise ValueError(
            f"the model never calls {name} ({len(waiting)} such GEMMs) on this data: nothing is known of its inputs; "
            f"prune it with `method: magnitude`, or leave it out"
        )
    return groups, tokens


class Walk:
    """The passes of all pieces side by side; a context manager that ends them wherever they stand.

    Args:
        model: in evaluation mode. runs: the calibration set.
        rows_at_a_time: of one piece; more is not faster once a piece has some thousand tokens, and takes more memory.
        recompute: modules (blocks) that passes wait in front of instead of inside. For every stop inside one it is
            run again up to there and what it computed is dropped: less memory, about twice the time.
    """

    def __init__(
        self, model: nn.Module, runs: list[Rows], rows_at_a_time: int, recompute: Sequence[nn.Module] = ()
    ) -> None:
        share_one_heap()
        self.model, self.pieces, self.tokens = model, cut(runs, rows_at_a_time), 0
        self._calls = [HaltingCall(partial(_forward, model, piece)) for piece in self.pieces]
        self._number = 0  # of the piece whose pass is running
        self._stop: nn.Module | None = None
        self._again = False
        self._handles = [
            module.register_forward_pre_hook(self._wait_in_front, with_kwargs=True, prepend=True)
            for module in recompute
        ]

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for each in self._calls:
            each.cancel()

    def advance_to(self, stop: Stop, statistics: Statistics) -> None:
        """Let every pass go on until it stands before ``stop``, and add what comes in there to ``statistics``.

        Under ``torch.distributed`` the sums of all processes are added up. ``tokens`` tells this process's share.

        Raises:
            CalibrationDataError: NaN or infinity in the input, or padding that cannot be told.
            ValueError: a pass ended without coming here.
        """
        self.tokens, self._stop = 0, stop.module
        seen: list[Statistics] = [statistics]  # emptied below: what a halted hook can reach is held as long as it halts

        def arrive(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._see(stop, seen[0], args[0])
            if self._again:
                raise _Reached
            self._calls[self._number].halt()

        handle = stop.module.register_forward_pre_hook(arrive, prepend=True)
        try:
            for number, each in enumerate(self._calls):
                self._number = number
                if not each.resume():
                    raise ValueError(f"what the model computes depends on the data: not all of it reaches {stop.name}")
                give_back_memory()
        finally:
            handle.remove()
            seen.clear()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(statistics.sums)

    def _see(self, stop: Stop, statistics: Statistics, x: Tensor) -> None:
        piece = self.pieces[self._number]
        x_TI = real_tokens(self.model, piece, x, stop.side)
        statistics.add_(x_TI, len(piece))
        self.tokens += len(x_TI)
        if not _finite(statistics.sums):
            raise CalibrationDataError(f"NaN or infinity in the input of {stop.name}, {_where(piece, x)}")

    def _wait_in_front(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a block that is to be recomputed: run it up to every stop inside it, then let it run in earnest."""
        if self._again:
            return
        inside = set(block.modules())
        while self._stop in inside:
            self._again = True
            try:
                block(*args, **kwargs)
            except _Reached:
                pass
            finally:
                self._again = False
            self._calls[self._number].halt()


class _Reached(BaseException):
    """Ends a run that was made for the statistics alone; no handler for ordinary exceptions may catch it."""


@torch.no_grad()  # a thread starts with gradients on
def _forward(model: nn.Module, rows: Rows) -> None:
    call(model, rows)


def _finite(sums: Tensor) -> bool:
    """Sums of squares, on the diagonal of a matrix, are finite exactly if all inputs are and do not overflow."""
    return bool((sums.diagonal() if sums.dim() == 2 else sums).isfinite().all())


def _where(piece: Rows, x: Tensor) -> str:
    if x.shape[0] == len(piece):
        for row, (batch, row_of_batch) in enumerate(piece.origins):
            if not bool(x[row].isfinite().all()):
                return f"calibration batch {batch}, row {row_of_batch}"
    return f"calibration batches {piece.origins[0][0]} to {piece.origins[-1][0]}"
