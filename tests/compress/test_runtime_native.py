"""The native kernels against definitions in 64 bits, and how they are compiled."""

from __future__ import annotations

import math
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezoo.compress.runtime import native
from squeezoo.compress.runtime.levels import Levels
from squeezoo.compress.runtime.native import build, library
from squeezoo.compress.runtime.native.build import BuildError
from torch import Tensor

AVAILABLE, WHY_NOT = native.available()
needs_native = pytest.mark.skipif(not AVAILABLE, reason=WHY_NOT)
SYMMETRIC = Levels(0.05, 128, 1, 255)
ONE_STEP = Levels(1.0, 0, 0, 255)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- GEMM -----------------------------------------------------------------------------------------------------------


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 40), inputs=st.integers(1, 130), outputs=st.integers(1, 140), zero_point=st.integers(0, 255),
    extreme=st.booleans(), threads=st.integers(1, 3), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_sums_are_exact_for_any_shape(
    rows: int, inputs: int, outputs: int, zero_point: int, extreme: bool, threads: int, seed: int
) -> None:
    """Expected: int64 arithmetic, every bit, the largest values (255, 127, -128) included; scales 1, so float32 holds
    the sums below 2^24 exactly (130 * 255 * 128 = 4.2e6)."""
    torch.set_num_threads(threads)
    level_TI = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8, generator=generator(seed))
    q_OI = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8, generator=generator(seed + 1))
    if extreme:
        level_TI = torch.where(level_TI > 127, 255, 0).to(torch.uint8)
        q_OI = torch.where(q_OI > 0, 127, -128).to(torch.int8)
    gemm = native.NativeGemm(q_OI, torch.ones(outputs), None)
    found_TO = gemm(level_TI, Levels(1.0, zero_point, 0, 255))
    assert torch.equal(found_TO.long(), (level_TI.long() - zero_point) @ q_OI.long().t())


@needs_native
@pytest.mark.parametrize("shape", [(13, 3072, 70), (700, 64, 130), (2500, 516, 65)])
def test_large_inputs_in_pieces_equal_themselves_on_any_number_of_threads(shape: tuple[int, int, int]) -> None:
    """Expected: int64 arithmetic; pieces of rows (384 KiB of input) and panels of 64 outputs have ends everywhere."""
    rows, inputs, outputs = shape
    level_TI = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8, generator=generator(1))
    q_OI = torch.randint(-3, 4, (outputs, inputs), dtype=torch.int8, generator=generator(2))
    expected = (level_TI.double() - 7) @ q_OI.double().t()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found = native.NativeGemm(q_OI, torch.ones(outputs), None)(level_TI, Levels(1.0, 7, 0, 255))
        assert torch.equal(found.double(), expected)


ACTIVATIONS = {
    None: lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


@needs_native
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_exact_to_float32(name: str | None) -> None:
    """Expected: PyTorch in float64, absolute error below 2e-7 up to |y| = 1 and 2 units in the last place above; from
    far left of the table's end to far right of it, both sides of every piece."""
    y = torch.cat([torch.linspace(-9, 9, 200_001), torch.arange(-24, 25) * 0.375, torch.tensor([-1e9, 1e9, 0.0])])
    gemm = native.NativeGemm(torch.ones(16, 1, dtype=torch.int8), torch.ones(16), None, name)  # type: ignore[arg-type]
    zeros = torch.zeros(len(y), 1, dtype=torch.uint8)
    found = gemm(zeros, ONE_STEP, residual_TO=y[:, None].expand(-1, 16).contiguous())
    expected = ACTIVATIONS[name](y.double())
    assert torch.equal(found[:, 0], found[:, 15])
    assert ((found[:, 0] - expected).abs() <= 2e-7 * expected.abs().clamp_min(1)).all()
    nan = torch.full((1, 16), math.nan)
    assert gemm(zeros[:1], ONE_STEP, residual_TO=nan).isnan().all()


@needs_native
@pytest.mark.parametrize(
    "emitted", [SYMMETRIC, Levels(0.1, 20, 0, 255), Levels(0.5, 3, 0, 15), Levels(0.3, 128, 121, 135)]
)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_emitted_levels_are_those_of_the_floats(name: str | None, emitted: Levels) -> None:
    """Expected: the float result, divided, rounded half to even and clamped by PyTorch; scale, bias, residual and the
    zero point of the input take part."""
    level_TI = torch.randint(0, 256, (50, 36), dtype=torch.uint8, generator=generator(3))
    q_OI = torch.randint(-127, 128, (70, 36), dtype=torch.int8, generator=generator(4))
    scale_O, bias_O = torch.rand(70, generator=generator(5)) / 100, torch.randn(70, generator=generator(6))
    residual_TO = torch.randn(50, 70, generator=generator(7))
    gemm = native.NativeGemm(q_OI, scale_O, bias_O, name)  # type: ignore[arg-type]
    floats = gemm(level_TI, SYMMETRIC, residual_TO=residual_TO)
    sums = (level_TI.double() - 128) @ q_OI.double().t()
    expected = ACTIVATIONS[name](sums * (scale_O.double() * 0.05) + bias_O + residual_TO)
    torch.testing.assert_close(floats.double(), expected, rtol=1e-6, atol=1e-6)
    levels = gemm(level_TI, SYMMETRIC, emitted, residual_TO)
    assert torch.equal(levels, native.quantize(floats, emitted))
    assert levels.float().std() > 0


# --- levels and norms -----------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("levels", [Levels(0.25, 77, 0, 255), Levels(0.25, 128, 1, 255), Levels(0.25, 5, 0, 15)])
def test_levels_follow_the_definition(levels: Levels) -> None:
    """Expected: round(x / scale) half to even, then the zero point (odd ones too), then the ends;
    by hand for ties and for the largest numbers; NaN and infinity are refused, wherever they are."""
    x = torch.randint(-2000, 2000, (37, 53), generator=generator(0)) / 32
    expected = ((x.double() / 0.25).round() + levels.zero_point).clamp(levels.low, levels.high)
    assert torch.equal(native.quantize(x, levels).double(), expected)
    assert torch.equal(native.quantize(x.t(), levels).double(), expected.t())
    odd = torch.tensor([[0.125, 0.375, -0.125, -0.375, 3e38, -3e38]])
    z = levels.zero_point
    by_hand = [z, z + 2, z, z - 2, levels.high, levels.low]
    assert native.quantize(odd, levels).tolist() == [by_hand]
    for at, bad in ((0, math.nan), (37, math.inf), (1960, -math.inf)):
        with pytest.raises(ValueError, match=r"int8 matrix, found 1 of 1961 that are NaN or infinite.*reference"):
            native.quantize(x.flatten().index_fill(0, torch.tensor(at), bad).view(37, 53), levels)


@needs_native
@pytest.mark.parametrize("width", [4, 32, 384, 771])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(width: int, affine: bool) -> None:
    """Expected: PyTorch in float64 to 2e-6, a large common offset included; the levels are those of the floats."""
    x = torch.randn(19, width, generator=generator(0)) * 3 + torch.arange(19)[:, None]
    weight, bias = (torch.randn(width, generator=generator(i)) if affine else None for i in (1, 2))
    double = (None if t is None else t.double() for t in (weight, bias))
    expected = F.layer_norm(x.double(), (width,), *double, eps=1e-5)
    y, level = native.layer_norm(x, weight, bias, 1e-5, SYMMETRIC)
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=2e-6)
    assert level is not None
    assert torch.equal(level, native.quantize(y, SYMMETRIC))
    assert native.layer_norm(x, weight, bias, 1e-5)[1] is None


# --- attention ------------------------------------------------------------------------------------------------------


def expected_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """In float64, written out; a row without a valid key gives 0."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    out = scores.softmax(-1).nan_to_num(0.0) @ v
    return out.transpose(1, 2).flatten(2)


SHAPES = [
    (1, 1, 1, 4),
    (2, 9, 2, 16),
    (2, 37, 3, 20),
    (1, 128, 4, 64),
    (3, 197, 2, 32),
    (1, 70, 2, 80),
    (1, 33, 1, 129),
]


@needs_native
@pytest.mark.parametrize("kind", ["none", "padding", "bool", "float", "minimum", "causal", "nothing valid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_on_a_fused_qkv(shape: tuple[int, int, int, int], kind: str) -> None:
    """Expected: the definition in float64 to 3e-6; Q, K and V are strided views of one tensor; masks of several ranks
    of broadcasting; one thread and several give the same bits."""
    batch, length, heads, width = shape
    qkv = torch.randn(batch, length, 3 * heads * width, generator=generator(0))
    q, k, v = (t.unflatten(-1, (heads, width)) for t in qkv.chunk(3, -1))
    mask, given = None, None
    if kind == "padding":
        mask = given = (
            torch.arange(length).expand(batch, 1, 1, length) < torch.arange(1, batch + 1)[:, None, None, None] * 5
        )
    elif kind == "bool":
        mask = given = torch.rand(batch, heads, length, length, generator=generator(1)) < 0.5
    elif kind == "float":
        mask = given = torch.randn(1, heads, length, length, generator=generator(1)) * 3
    elif kind == "minimum":
        valid = torch.rand(batch, 1, 1, length, generator=generator(1)) < 0.7
        valid[..., 0] = True
        mask = given = torch.zeros(valid.shape).masked_fill(~valid, torch.finfo(torch.float32).min)
    elif kind == "nothing valid":
        mask = given = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    elif kind == "causal":
        mask = torch.ones(length, length, dtype=torch.bool).tril()
    expected = expected_attention(q, k, v, mask, None)
    found = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        found.append(native.attention(q, k, v, given, causal=kind == "causal"))
        torch.testing.assert_close(found[-1].double(), expected, rtol=3e-6, atol=3e-6)
    assert torch.equal(*found)


@needs_native
def test_attention_with_shared_keys_other_lengths_scale_and_levels() -> None:
    """Expected: the definition in float64; two query heads read each key head, queries are fewer than keys (as with a
    cache: the last query sees all keys), and the levels are those of the floats."""
    q = torch.randn(2, 5, 6, 24, generator=generator(0))
    k, v = (torch.randn(2, 3, 19, 24, generator=generator(i)).transpose(1, 2) for i in (1, 2))
    for causal in (False, True):
        mask = torch.ones(5, 19, dtype=torch.bool).tril(14) if causal else None
        found = native.attention(q, k, v, scale=0.3, causal=causal)
        torch.testing.assert_close(found.double(), expected_attention(q, k, v, mask, 0.3), rtol=3e-6, atol=3e-6)
        levels = native.attention(q, k, v, scale=0.3, causal=causal, levels=Levels(0.01, 128, 1, 255))
        assert torch.equal(levels, native.quantize(found.flatten(0, 1), Levels(0.01, 128, 1, 255)).view(levels.shape))


@needs_native
def test_large_scores_do_not_overflow() -> None:
    """Expected: the definition; scores of thousands leave one key, and its value unchanged."""
    q = torch.full((1, 3, 1, 16), 30.0)
    k = torch.stack([torch.full((16,), value) for value in (-30.0, 0.0, 30.0)])[None, :, None]
    v = torch.randn(1, 3, 1, 16, generator=generator(0))
    assert torch.equal(native.attention(q, k, v), v[:, 2:].expand(1, 3, 1, 16).flatten(2))


# --- threads --------------------------------------------------------------------------------------------------------


ONE_POOL = """
import os, re
from pathlib import Path
import torch
from squeezoo.compress.runtime import native
from squeezoo.compress.runtime.levels import Levels

torch.set_num_threads(2)
x, levels = torch.randn(600, 512), Levels(0.05, 128, 1, 255)
(x @ x.t()).relu_()
gemm = native.NativeGemm(torch.ones(512, 512, dtype=torch.int8), torch.ones(512), None)
before = len(os.listdir("/proc/self/task"))
gemm(native.quantize(x, levels), levels)
libraries = set(re.findall(r"/\\S*lib(?:gomp|iomp5|omp)[-.]\\S*", Path("/proc/self/maps").read_text()))
print(len(os.listdir("/proc/self/task")) - before, len(libraries))
"""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_there_is_one_openmp_and_one_pool_of_threads() -> None:
    """Two OpenMP libraries would each keep threads that fight for the cores: after work on two threads by PyTorch, the
    same work by the kernels must start no new one. In a process of its own, since other packages bring OpenMP too."""
    done = subprocess.run([sys.executable, "-c", ONE_POOL], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    new_threads, libraries = map(int, done.stdout.split())
    assert new_threads <= 0
    assert libraries == 1


# --- compiling ------------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An explanation and what to install, no exception that would reach a user."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\).*install g\+\+"):
        build.find_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no-such-compiler"):
        build.find_compiler()


def compiler(folder: Path, script: str) -> Path:
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for the compiler")
def test_a_library_is_compiled_once_and_named_by_what_made_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in writes its calls down: one per source and one to link; none when it is there; anew for other flags.
    Nothing but the library and the lock stays in the folder."""
    log = tmp_path / "log"
    fake = compiler(tmp_path, f'echo "$@" >> {log}; for last; do :; done; echo made > "$last"')
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    first = build.library_path()
    assert first.read_text() == "made\n"
    calls = log.read_text().splitlines()
    assert len(calls) == len(build.SOURCES) + 1
    assert all("-fopenmp" in call for call in calls[:-1])
    assert "-fopenmp" not in calls[-1]  # else a second OpenMP library would be linked
    assert build.library_path() == first
    assert len(log.read_text().splitlines()) == len(calls)
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DOTHER"))
    second = build.library_path()
    assert second != first
    assert sorted(p.name for p in first.parent.iterdir()) == sorted([first.name, second.name, "lock"])
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700  # what lies there is run


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for the compiler")
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its first error is in the reason; the next start tries again."""
    monkeypatch.setenv("CXX", str(compiler(tmp_path, "echo 'warning: x' >&2; echo 'error: no such flag' >&2; exit 1")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    with pytest.raises(BuildError, match="cannot compile the native kernels: error: no such flag"):
        build.library_path()
    assert [p.name for p in (tmp_path / "cache" / "squeezoo" / "native").iterdir()] == ["lock"]


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("win32", "AMD64"), ("linux", "aarch64")])
def test_other_systems_are_told_so(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(build.sys, "platform", system)
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    with pytest.raises(BuildError, match=f"for Linux on x86-64, this is {system} on {machine}"):
        build.library_path()


def test_a_cpu_without_the_instructions_never_loads_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason names what is missing; nothing is compiled for it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True}, raising=False)
    monkeypatch.setattr(library, "library_path", lambda: pytest.fail("compiled for nothing"))
    with pytest.raises(BuildError, match=r"the CPU lacks .*avx512_vnni"):
        library.load.__wrapped__()


def test_shapes_that_an_int32_cannot_add_up_are_not_supported() -> None:
    """65,793 * 255 * 128 = 2^31: the limit stays below it."""
    assert native.supported(1, 65_536)
    assert not native.supported(1, 65_537)
    assert 65_536 * 255 * 128 < 2**31
