"""Int8 linears against exact integer arithmetic; several of one input as one."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gemms import exact, inputs, needs_int8, random_gemm, ready
from squeezoo.compress.runtime import QuantizedGemm, cpu, int8_linear
from squeezoo.compress.runtime.int8_linear import Int8Gemm, prefers_plain, to_levels, to_levels_by_arithmetic
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _one_thread_without_gradients() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


# --- one GEMM -------------------------------------------------------------------------------------------------------


SHAPES = [(1, 5, 3), (1, 96, 64), (4, 7, 2), (17, 33, 10), (9, 64, 1), (40, 100, 48), (300, 16, 512), (33, 640, 1024)]


@needs_int8
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), SHAPES)
def test_a_gemm_equals_exact_integer_arithmetic(rows: int, in_features: int, out_features: int, bias: bool) -> None:
    """Expected: the definition in int64. Every scale is a power of two and the sums stay below 2^24, so float32 is
    exact: all bits must agree, odd shapes and saturated inputs included."""
    gemm = random_gemm(out_features, in_features, bias=bias)
    x = inputs(rows, in_features)
    assert (x / 0.25).abs().max() > 128
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = ready(gemm)(x)
        assert y.dtype == torch.float32
        assert torch.equal(y.double(), exact(gemm, x))


@needs_int8
@pytest.mark.parametrize("run", ["_run_plain", "_run_packed"])
def test_both_kernels_are_exact_at_the_largest_sums(run: str) -> None:
    """Expected: 127 * 127 * K, the sum that saturates 16-bit intermediates on CPUs without VNNI (K = 1024: exact)."""
    weight_OI = torch.full((40, 1024), 127, dtype=torch.int8)
    weight_OI[1::2] = -127
    gemm = Int8Gemm(weight_OI, torch.ones(40), None, 1.0)
    for sign in (1, -1):
        levels_TI = to_levels(torch.full((20, 1024), sign * 999.0), 1.0, signed=run == "_run_plain")
        expected_O = torch.tensor([1.0, -1.0]).repeat(20) * (sign * 127 * 127 * 1024)
        assert torch.equal(getattr(gemm, run)(levels_TI, None), expected_O.expand(20, 40))


def test_both_kernels_are_used() -> None:
    """The shapes above reach both sides of the choice; else half of the runtime would go untested."""
    assert {prefers_plain(rows, o, i, False) for rows, i, o in SHAPES} == {True, False}
    assert prefers_plain(1, 4096, 4096, True)
    assert not prefers_plain(1024, 384, 384, False)


@pytest.mark.parametrize("quantize", [to_levels, to_levels_by_arithmetic])
@pytest.mark.parametrize("signed", [True, False])
def test_levels_round_half_to_even_and_stop_at_127(quantize: Callable[..., Tensor], signed: bool) -> None:
    """Expected by hand, step 2: 0.5, 1.5, 2.5 steps → 0, 2, 2; below -127 steps → -127, never -128."""
    x = torch.tensor([[1.0, 3.0, 5.0, -1.0, -3.0, -253.0, -255.0, -256.0, -1e9, 255.0, 1e9, float("-inf")]])
    expected = torch.tensor([[0, 2, 2, 0, -2, -126, -127, -127, -127, 127, 127, -127]])
    levels = quantize(x, 2.0, signed)
    assert levels.dtype == (torch.int8 if signed else torch.uint8)
    assert torch.equal(levels.long() - (0 if signed else 128), expected)


def test_levels_of_views() -> None:
    """Expected: the same as for a contiguous copy; the result must not keep the strides of its source."""
    x = inputs(8, 12, seed=3)
    for view in (x.t(), x[:, ::2], x[2:7], x[:0], x.unsqueeze(0).expand(3, 8, 12)):
        levels = to_levels(view, 0.25, signed=True)
        assert torch.equal(levels, to_levels(view.contiguous(), 0.25, signed=True))
        assert levels.is_contiguous()


@needs_int8
def test_any_leading_dimensions_and_strides() -> None:
    """Expected: the definition; [I], [B, I], [B, L, I], an empty batch, transposed, sliced and expanded inputs."""
    gemm = random_gemm(24, 20)
    fast = ready(gemm)
    x = inputs(3, 6, 20)
    views = [x, x[0, 0], x[0], x[:, :1], x[:0], x[:, :0], x.transpose(0, 1), x[::2, 1:], inputs(20, 5).t()]
    for view in [*views, inputs(2, 6, 40)[..., ::2], x[:1].expand(4, 6, 20), inputs(2, 20, 3, 5).permute(0, 2, 3, 1)]:
        y = fast(view)
        assert y.shape == (*view.shape[:-1], 24)
        assert torch.equal(y.double(), exact(gemm, view))


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_cast_in_and_out(dtype: torch.dtype) -> None:
    """Expected: the float32 result of the same (representable) input, cast."""
    gemm = random_gemm(24, 20, bias=False)
    x = inputs(5, 20).to(dtype)
    y = ready(gemm)(x)
    assert y.dtype == dtype
    assert torch.equal(y, exact(gemm, x.float()).to(torch.float32).to(dtype))


@needs_int8
def test_wrong_inputs_are_refused() -> None:
    """A last dimension that only happens to divide must not be reshaped away, and integers are not levels."""
    fast = ready(random_gemm(4, 20))
    with pytest.raises(ValueError, match=r"20 features, found the shape \[3, 40\]"):
        fast(torch.zeros(3, 40))
    with pytest.raises(ValueError, match=r"found the shape \[\]"):
        fast(torch.zeros(()))
    with pytest.raises(TypeError, match="floating point input, found uint8"):
        fast(torch.zeros(3, 20, dtype=torch.uint8))


@needs_int8
def test_gradients_stop_and_nothing_warns(recwarn: pytest.WarningsRecorder) -> None:
    """Integers have no gradient: an input that requires one gives a result that does not."""
    with torch.enable_grad():
        y = ready(random_gemm(4, 20))(torch.zeros(3, 20, requires_grad=True) * 1)
    assert not y.requires_grad
    assert [str(w.message) for w in recwarn if "quantize_per_tensor" in str(w.message)] == []


def test_gelu_bounds() -> None:
    """The lower bounds that spare a pass over the result: the true minima, found on a fine grid."""
    x = torch.linspace(-3, 3, 600_001, dtype=torch.float64)
    minima = {"gelu": F.gelu(x).min(), "gelu_tanh": F.gelu(x, approximate="tanh").min(), "relu": F.relu(x).min()}
    for name, (_, _, smallest) in int8_linear._POST_OPS.items():
        if name is not None:
            assert smallest <= float(minima[name]) <= smallest + 2e-4


# --- Q, K and V as one ----------------------------------------------------------------------------------------------


def three(**how: Any) -> tuple[list[QuantizedGemm], list[nn.Module]]:
    """Q, K and V of different heights, K without bias."""
    gemms = [random_gemm(o, 20, seed=o, bias=o != 16, name=f"g{o}") for o in (24, 16, 8)]
    return gemms, list(cpu._slices(gemms).values())


@needs_int8
def test_a_shared_input_is_multiplied_once() -> None:
    """Expected: the definition for each of the three, from one GEMM call, and nothing kept afterwards."""
    gemms, modules = three()
    shared = modules[0].shared
    calls = []
    run, shared.gemm = shared.gemm, lambda x: calls.append(x) or run(x)
    x = inputs(2, 5, 20)
    for gemm, module in zip(gemms, modules):
        y = module(x)
        assert torch.equal(y.double(), exact(gemm, x))
        y.view(2, 5, -1, 4).transpose(1, 2)  # what attention code does with it
    assert len(calls) == 1
    assert shared._waiting is None


@needs_int8
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("order", ["012", "210", "0011", "01012", "2", "000", "01|2", "0|12", "0x0", "012x012"])
def test_shared_input_in_any_order(order: str, inference: bool) -> None:
    """Expected: the definition at every call. `|` switches to another tensor or back, `x` alters the tensor in
    place; between two of the three this is noticed where tensors record it, that is not under inference_mode."""
    gemms, modules = three()
    order += "" if inference else "0x12"
    with torch.inference_mode(inference):
        x, other = inputs(3, 20, seed=1), inputs(3, 20, seed=2)
        for step in order:
            if step == "|":
                x, other = other, x
            elif step == "x":
                x.mul_(-0.5)
            else:
                assert torch.equal(modules[int(step)](x).double(), exact(gemms[int(step)], x))


@needs_int8
def test_shared_input_keeps_nothing_alive() -> None:
    """The waiting results must go when the input dies, even if K and V are never asked for."""
    _, modules = three()
    x = inputs(3, 20)
    modules[0](x)
    results = [weakref.ref(y) for y in modules[0].shared._waiting[2] if y is not None]
    assert len(results) == 2
    del x
    gc.collect()
    assert [ref() for ref in results] == [None, None]
    assert modules[0].shared._waiting is None


@needs_int8
def test_shared_input_under_several_threads() -> None:
    """Expected: the definition in every thread, with different tensors and with one common tensor."""
    gemms, modules = three()
    common = inputs(7, 20, seed=99)
    wrong: list[str] = []

    def work(seed: int) -> None:
        for turn in range(60):
            x = common if turn % 3 == 0 else inputs(7, 20, seed=seed * 1000 + turn)
            for gemm, module in zip(gemms, modules):
                if not torch.equal(module(x).double(), exact(gemm, x)):
                    wrong.append(f"{seed}/{turn}/{gemm.name}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
