"""What a process frees stays its own, unless the user chose otherwise."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
PROGRAM = """
import ctypes, sys
from pathlib import Path
from squeezoo.eval.allocator import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

kept = keep_freed_memory() if sys.argv[1] == "keep" else False
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
before = resident()
blocks = [c.malloc(1 << 20) for _ in range(64)]
for block in blocks:
    c.memset(block, 1, 1 << 20)
full = resident()
for block in blocks:
    c.free(block)
print(kept, (resident() - before) / (full - before))
"""


def _kept(how: str, **environment: str) -> tuple[str, float]:
    """What `keep_freed_memory` says, and the share of freed blocks that is still resident."""
    command = [sys.executable, "-c", PROGRAM, how]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    said, share = run.stdout.split()
    return said, float(share)


def test_freed_memory_stays() -> None:
    said, share = _kept("keep")
    assert said == "True"
    assert share > 0.9
    assert _kept("leave")[1] < 0.1


def test_the_users_own_settings_stay() -> None:
    said, share = _kept("keep", MALLOC_TRIM_THRESHOLD_="100000", MALLOC_MMAP_THRESHOLD_="100000")
    assert said == "False"
    assert share < 0.1
