"""How the native kernels are compiled when something is in the way: the compiler, the cache, another process, time.

A shell script stands for the compiler, and says what it was called with."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from squeezoo.compress.runtime import caches, native
from squeezoo.compress.runtime.native import build, kernels
from squeezoo.compress.runtime.native.build import BuildError, built_library, find_compiler, library_path

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a shell script stands for the compiler")
MAKES = 'for last; do :; done; echo made > "$last"'


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A cache and a temporary folder of the test's own, on Linux on x86."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    for cached in (caches._private_root, caches._say_private):
        cached.cache_clear()
    yield
    caches._private_root.cache_clear()


def use_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, name: str = "c++") -> Path:
    path = tmp_path / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


def test_a_compiler_may_have_options_or_a_program_in_front(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CXX is a command, as in make. The options reach every call, and another compiler behind the same wrapper makes
    another library."""
    log = tmp_path / "log"
    wrapper = use_compiler(monkeypatch, tmp_path, f'echo "$@" >> {log}; exec "$@"', "wrapper")
    inner = use_compiler(monkeypatch, tmp_path, MAKES, "inner")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", "wrapper inner -m64 '-DA=b c'")
    assert find_compiler() == (str(wrapper), "inner", "-m64", "-DA=b c")
    first = library_path()
    calls = log.read_text().splitlines()
    assert len(calls) == len(build.SOURCES) + 1
    assert all(call.startswith("inner -m64 -DA=b c ") for call in calls)
    inner.write_text(inner.read_text() + "# a newer version\n")
    assert library_path() != first
    monkeypatch.setenv("CXX", "wrapper 'inner")
    with pytest.raises(BuildError, match=r"CXX is no command .*No closing quotation"):
        find_compiler()
    monkeypatch.setenv("CXX", " ")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\)"):
        find_compiler()


def test_compiling_is_said_once_and_a_ready_library_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    use_compiler(monkeypatch, tmp_path, MAKES)
    assert built_library() is None
    path = library_path()
    assert library_path() == built_library() == path
    assert [record.getMessage() for record in caplog.records] == ["compiling the native kernels, once; some 10 seconds"]
    assert {(record.name, record.levelno) for record in caplog.records} == {("squeezoo", logging.WARNING)}


def test_a_build_that_takes_too_long_ends_whole_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The compiler's own children end too (each writes its number down first), nothing stays, and the next attempt
    compiles."""
    children = tmp_path / "children"
    slow = use_compiler(monkeypatch, tmp_path, f"sleep 60 & echo $! >> {children}; wait")
    monkeypatch.setattr(build, "_BUILD_S", 1.0)
    start = time.monotonic()
    with pytest.raises(BuildError, match=r"c\+\+ took more than 1 seconds for the native kernels"):
        library_path()
    assert time.monotonic() - start < 30
    deadline = time.monotonic() + 20
    while (left := [child for child in children.read_text().split() if _runs(child)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert [p.name for p in (tmp_path / "cache" / "squeezoo" / "native").iterdir()] == ["lock"]
    slow.write_text(f"#!/bin/sh\n{MAKES}\n")
    monkeypatch.setattr(build, "_BUILD_S", 60.0)
    assert library_path().is_file()


def _runs(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_wait_for_another_process_has_an_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody holds the lock: said once, then an error that names the file; free again, it is compiled."""
    use_compiler(monkeypatch, tmp_path, MAKES)
    monkeypatch.setattr(build, "_WAIT_S", 0.3)
    folder = tmp_path / "cache" / "squeezoo" / "native"
    folder.mkdir(parents=True, mode=0o700)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BuildError, match=r"another process has held .*lock for 0 s.*end it"):
            library_path()
    waiting = "waiting for another process that compiles the native kernels, once"
    assert [record.getMessage() for record in caplog.records] == [waiting]
    assert library_path().is_file()


@pytest.mark.parametrize("why", ["file", "no home", "relative", "open to all"])
def test_without_a_cache_a_private_folder_is_taken_and_said(
    why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file where the folder should be; no home; a relative XDG_CACHE_HOME (which the XDG specification says to
    ignore); a folder that everybody may write into. The same private folder at every start, closed to others."""
    log = tmp_path / "log"
    use_compiler(monkeypatch, tmp_path, f"echo x >> {log}; {MAKES}")
    expected = {"file": "cannot be made", "open to all": "everybody may write"}.get(why, "no home folder")
    if why == "file":
        (tmp_path / "cache").write_text("")
    elif why == "open to all":
        (tmp_path / "cache/squeezoo/native").mkdir(parents=True)
        (tmp_path / "cache/squeezoo/native").chmod(0o777)
        (tmp_path / "cache/squeezoo/native/kernels-0.so").write_text("not ours")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "" if why == "no home" else "cache")
        monkeypatch.setattr(Path, "home", _no_home)
    path = library_path()
    root = tmp_path / "tmp" / f"squeezoo-{os.getuid()}"
    assert path.parent == root / "native"
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    (said, _) = [record.getMessage() for record in caplog.records]
    assert expected in said
    assert str(root) in said
    calls = log.read_text()
    caches._private_root.cache_clear()
    assert library_path() == path
    assert log.read_text() == calls


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("prepared", ["open", "link"])
def test_a_private_folder_that_another_could_have_made_is_not_used(
    prepared: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Someone made the folder before us, open or as a link to his own: neither read nor written; a new one is made."""
    use_compiler(monkeypatch, tmp_path, MAKES)
    (tmp_path / "cache").write_text("")
    root = tmp_path / "tmp" / f"squeezoo-{os.getuid()}"
    if prepared == "open":
        (root / "native").mkdir(parents=True)
        root.chmod(0o755)
    else:
        (tmp_path / "his" / "native").mkdir(parents=True)
        root.symlink_to(tmp_path / "his")
    path = library_path()
    assert root not in path.parents
    assert path.parent.parent.name.startswith("squeezoo-")
    assert stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    assert not list((root / "native").iterdir())


def test_int8_on_such_a_cpu_warns_once_why_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the CPU could: one without the instructions is another machine, not a fault."""
    monkeypatch.setattr(kernels, "available", lambda: (False, "no C++ compiler"))
    for missing, expected in ((["avx512_vnni"], 0), ([], 1)):
        monkeypatch.setattr(kernels, "missing_instructions", lambda missing=missing: missing)
        kernels.say_if_unavailable.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            native.say_if_unavailable()
            native.say_if_unavailable()
        assert len(caught) == expected
        assert all("slower than the native kernels: no C++ compiler" in str(one.message) for one in caught)
        assert all(one.category is RuntimeWarning for one in caught)
    kernels.say_if_unavailable.cache_clear()


WITHOUT_COMPILER = """
import sys, torch, warnings
sys.path.insert(0, "tests")
from gemms import TOY, Toy, random_gemm
from squeezoo.compress.runtime import use_int8_
from squeezoo.models.adapter import find_sites
from torch import nn
for _ in range(2):
    model = Toy(nn.GELU(), width=48, hidden=64).eval()
    gemms = {f"blocks.0.{n}": random_gemm(*s, name=f"blocks.0.{n}") for n, s in (("up", (64, 48)), ("down", (48, 64)))}
    use_int8_(model, find_sites(model, TOY), gemms)
    print(float(model(torch.ones(2, 48)).isfinite().all()))
"""


@pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
def test_a_process_without_compiler_computes_slowly_and_says_why_once(tmp_path: Path) -> None:
    """A real process: an empty cache and a PATH without any compiler."""
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.0", "1.0"]
    assert done.stderr.count("slower than the native kernels: no C++ compiler (c++, g++, clang++)") == 1
    assert torch.backends.mkldnn.is_available()
