"""Calls that can be halted in the middle and go on later, so that several of them advance step by step together.

A forward pass over a whole calibration set does not fit into memory at once, but it must be halted in front of a GEMM
until the inputs of all samples are known. So each part of the set gets a call of its own; only one runs at any moment.
A thread is merely the place where a halted call keeps its stack.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path


class _Cancelled(BaseException):
    """Unwinds a halted call; no handler for ordinary exceptions may catch it."""


class HaltingCall:
    """One call of ``run``; `halt`, called anywhere below it, gives control back to whoever resumed it.

    Args:
        run: called in a thread of its own at the first `resume`.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self._finished = self._cancelled = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def resume(self) -> bool:
        """Let the call run until it halts (True) or ends (False). What it raises is raised here."""
        if self._finished:
            return False
        if self._thread is None:
            self._thread = threading.Thread(target=self._body, daemon=True)
            self._thread.start()
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return not self._finished

    def cancel(self) -> None:
        """Unwind the call where it stands. Safe at any time, also after it has ended."""
        self._cancelled = True
        if self._thread is not None:
            self._go.release()
            self._thread.join()
        self._finished = True

    def halt(self) -> None:
        """Only from inside the call: wait until it is resumed."""
        self._back.release()
        self._go.acquire()
        if self._cancelled:
            raise _Cancelled

    def _body(self) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                self._run()
        except _Cancelled:
            pass
        except BaseException as error:  # goes to the thread that waits in `resume`
            self._error = error
        finally:
            self._finished = True
            self._back.release()


def give_back_memory() -> None:
    """Return freed memory to the system. glibc keeps for each thread what that thread has freed, and MKL the buffers of
    each thread's last product: without this, every halted call would go on holding the most it ever needed. Elsewhere
    nothing is done."""
    if (free := _mkl_free_buffers()) is not None:
        free()
    if (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def share_one_heap() -> None:
    """Let threads that start from now on use the heaps there are. glibc would give each one of its own, and no halted
    call could use what another has freed; only one runs at any moment, so none waits for another. It cannot be undone
    and costs little elsewhere; where there is no glibc nothing is done."""
    arena_max = -8  # M_ARENA_MAX of malloc.h
    if _malloc_trim() is not None:
        ctypes.CDLL(None).mallopt(arena_max, 1)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return None


@cache
def _mkl_free_buffers() -> Callable[[], None] | None:
    """``mkl_free_buffers`` of oneMKL, which PyTorch links in without its public names."""
    import torch

    try:
        free = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).mkl_serv_free_buffers
    except (AttributeError, OSError):  # another system, or PyTorch with another BLAS
        return None
    free.restype = None
    return free
