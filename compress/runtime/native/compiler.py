"""The system's C++ compiler: found, and run on several files at once."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_COMPILERS = ("c++", "g++", "clang++")
_POLL_S = 0.02


class BuildError(Exception):
    """The kernels cannot be compiled here; the text says why, in one line."""


def find_compiler() -> tuple[str, ...]:
    """The command of a C++ compiler, its program as a full path: ``CXX`` where it is set, which may have options or a
    program in front (``g++ -m64``, ``ccache g++``), else the first of c++, g++ and clang++.

    Raises:
        BuildError: there is none.
    """
    stated = os.environ.get("CXX", "")
    try:
        wanted = shlex.split(stated)
    except ValueError as error:
        raise BuildError(f"the environment variable CXX is no command ({error}): {stated}") from None
    for name in wanted[:1] or _COMPILERS:
        if found := shutil.which(name):
            return (found, *wanted[1:])
    raise BuildError(
        f"no C++ compiler ({stated if wanted else ', '.join(_COMPILERS)}) for the native kernels: install g++ (Debian, "
        "Ubuntu: apt install g++), and they are compiled at the next start"
    )


def identity(command: Sequence[str]) -> tuple[object, ...]:
    """What changes when the compiler does: the command, and size and time of each program in it. (Asking for its
    version would start it at every load.)"""
    programs = [os.stat(found) for word in command if (found := shutil.which(word))]
    return (*command, *((found.st_size, found.st_mtime_ns) for found in programs))


def run_all(commands: Sequence[Sequence[str]], scratch: Path, start: float, most_s: float) -> None:
    """Run commands, as many at once as this process has cores.

    Args:
        scratch: an existing folder for what they print. most_s: seconds after ``start``, of ``time.monotonic``.

    Raises:
        BuildError: one fails, or the time is over; all others have been ended then.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting, running = list(enumerate(commands)), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                running.append(_start(scratch, *waiting.pop(0)))
            for done in [one for one in running if one.process.poll() is not None]:
                running.remove(done)
                done.check()
            if time.monotonic() > start + most_s:
                raise BuildError(f"{commands[0][0]} took more than {most_s:g} seconds for the native kernels")
            time.sleep(_POLL_S)
    finally:
        for left in running:
            left.end()


@dataclass(frozen=True)
class _Running:
    process: subprocess.Popen[bytes]
    name: str
    printed: Path

    def check(self) -> None:
        if self.process.returncode:
            lines = self.printed.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            line = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
            raise BuildError(f"{self.name} cannot compile the native kernels: {line}")

    def end(self) -> None:
        """With the processes that it started: a compiler is more than one."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _start(scratch: Path, number: int, command: Sequence[str]) -> _Running:
    printed = scratch / f"{number}.txt"
    with printed.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    return _Running(process, command[0], printed)
