"""Int8 linears against exact integer arithmetic; several of one input as one."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gemms import DYNAMIC, asymmetric, exact, inputs, needs_int8, random_gemm, symmetric
from gemms import ready as ready_by_rule
from squeezoo.compress.quantizers import InputQuantization
from squeezoo.compress.runtime import QuantizedGemm, cpu, int8_gemm, native
from squeezoo.compress.runtime.inputs import step_of
from squeezoo.compress.runtime.int8_gemm import Int8Gemm, Kernel, prefers_plain
from squeezoo.compress.runtime.levels import Levels, to_levels, to_levels_by_arithmetic
from torch import Tensor, nn

VECTORS = Path(__file__).parents[1] / "vectors"


@pytest.fixture(autouse=True)
def _one_thread_without_gradients() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


KERNELS = [
    "plain",
    "packed",
    pytest.param("native", marks=pytest.mark.skipif(not native.available()[0], reason=native.available()[1])),
]


def ready(gemm: QuantizedGemm, kernel: Kernel | None = None) -> Int8Gemm:
    """As the runtime has it, by one kernel for any number of rows, or by the built-in rule."""
    fast = ready_by_rule(gemm)
    if kernel is not None:
        fast.kernels = ((1 << 40, kernel),)
    return fast


# --- one GEMM -------------------------------------------------------------------------------------------------------


SHAPES = [(1, 5, 3), (1, 96, 64), (4, 7, 2), (17, 33, 10), (9, 64, 1), (40, 100, 48), (300, 16, 512), (33, 640, 1024)]


@needs_int8
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "in_features", "out_features"), SHAPES)
def test_a_gemm_equals_exact_integer_arithmetic(
    rows: int, in_features: int, out_features: int, bias: bool, kernel: Kernel
) -> None:
    """Expected: the definition in int64. Every scale is a power of two and the sums stay below 2^24, so float32 is
    exact: all bits must agree, odd shapes and saturated inputs included."""
    gemm = random_gemm(out_features, in_features, bias=bias)
    x = inputs(rows, in_features)
    assert (x / 0.25).abs().max() > 128
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = ready(gemm, kernel)(x)
        assert y.dtype == torch.float32
        assert torch.equal(y.double(), exact(gemm, x))


@needs_int8
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_exact_at_the_largest_sums(kernel: Kernel) -> None:
    """Expected: 127 * 127 * K, the sum that saturates 16-bit intermediates on CPUs without VNNI (K = 1024: exact)."""
    weight_OI = torch.full((40, 1024), 127, dtype=torch.int8)
    weight_OI[1::2] = -127
    gemm = Int8Gemm(weight_OI, torch.ones(40), None, symmetric(1.0))
    for sign in (1, -1):
        x = torch.full((20, 1024), sign * 999.0)
        expected_O = torch.tensor([1.0, -1.0]).repeat(20) * (sign * 127 * 127 * 1024)
        assert torch.equal(gemm.run_with(kernel, x), expected_O.expand(20, 40))


INPUTS = {
    "minmax": asymmetric(0.25, 76),
    "odd": asymmetric(0.25, 127),
    "positive": asymmetric(0.25, 0),
    "negative": asymmetric(0.25, 255),
    "pact4": asymmetric(1.0, 6, bits=4),
    "minmax2": asymmetric(4.0, 1, bits=2),
    "lsq4": symmetric(2.0, bits=4),
    "lsq2": symmetric(8.0, bits=2),
}


@needs_int8
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [1, 17, 300])
@pytest.mark.parametrize("found", INPUTS.values(), ids=INPUTS)
def test_zero_points_and_few_bits_equal_exact_integer_arithmetic(
    found: InputQuantization, rows: int, kernel: Kernel
) -> None:
    """Expected: the definition in int64, saturated inputs included, and ties where the zero point is even (PyTorch adds
    an odd one before it rounds half to even, the native kernel does not); weights down to -128, as PyTorch's dynamic
    quantization has them."""
    gemm = random_gemm(96, 40, input=found)
    gemm.weight_q_OI[::3, ::5] = -128
    odd = kernel != "native" and found.qmin == 0 and bool(found.zero_point and found.zero_point % 2)
    x = inputs(rows, 40) + (1 / 64 if odd else 0)
    y = ready(gemm, kernel)(x)
    assert torch.equal(y.double(), exact(gemm, x))
    levels = to_levels(x, Levels.of(found, x), signed=False)
    assert levels.min() == (0 if found.qmin == 0 else 128 + found.qmin) or rows == 1
    assert levels.max() == (found.qmax if found.qmin == 0 else 128 + found.qmax) or rows == 1


@needs_int8
def test_dynamic_inputs_match_pytorch() -> None:
    """Expected: vector dynamic_quant: integers of the weight and the input exact, the output that of the same integers
    (both engines of PyTorch requantize and lie within 0.1; the float output of the vector is 0.02 away)."""
    vector = json.loads((VECTORS / "dynamic_quant.json").read_text())
    x, weight_q_OI = torch.tensor(vector["x"]), torch.tensor(vector["weight_q"], dtype=torch.int8)
    assert step_of(x, DYNAMIC) == (pytest.approx(vector["x_scale"], rel=1e-6), vector["x_zero_point"])
    levels = Levels.of(DYNAMIC, x)
    assert to_levels(x, levels, signed=False).tolist() == vector["x_q"]
    assert to_levels_by_arithmetic(x, levels, signed=False).tolist() == vector["x_q"]
    scale_O = torch.full((4,), vector["weight_scale"])
    gemm = QuantizedGemm("g", weight_q_OI, scale_O, DYNAMIC, torch.tensor(vector["bias"]))
    sums = (torch.tensor(vector["x_q"]) - vector["x_zero_point"]) @ weight_q_OI.long().t()
    expected = vector["x_scale"] * vector["weight_scale"] * sums.double() + torch.tensor(vector["bias"]).double()
    y = ready(gemm)(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    assert (y - torch.tensor(vector["y_fbgemm"])).abs().max() < 0.02
    assert (y - torch.tensor(vector["y_float"])).abs().max() < 0.02


@needs_int8
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [1, 9, 60])
def test_dynamic_inputs_take_their_range_from_each_call(rows: int, kernel: Kernel) -> None:
    """Expected: the exact result for the range of this very input; all positive and all zero inputs included."""
    fast = ready(random_gemm(96, 40, input=DYNAMIC), kernel)
    noise = torch.randn(2, rows, 40, generator=torch.Generator().manual_seed(3))  # no input between two levels
    for x in (noise[0], noise[1] * 100, noise[0].abs() + 3, -noise[1].abs(), torch.zeros(rows, 40)):
        scale, zero_point = step_of(x, DYNAMIC)
        static = random_gemm(96, 40, input=asymmetric(scale, zero_point))
        torch.testing.assert_close(fast(x).double(), exact(static, x), rtol=1e-5, atol=1e-5 * float(x.abs().max()))
    assert torch.equal(fast(torch.zeros(2, 0, 40)), torch.zeros(2, 0, 96))
    with pytest.raises(ValueError, match=r"finite input to quantize, found values from .* to (inf|nan)"):
        fast(torch.full((rows, 40), float("inf")))
    with pytest.raises(ValueError, match="finite input to quantize"):
        fast(torch.full((rows, 40), float("nan")))


def test_the_choice_of_kernel() -> None:
    """By the table where there is one: its last entry serves all larger numbers of rows. Else native, or by rule."""
    gemm = ready(random_gemm(96, 40))
    gemm.kernels = ((1, "plain"), (64, "native"), (512, "packed"))
    chosen = [gemm.kernel_for(rows) for rows in (0, 1, 2, 64, 65, 512, 513, 99_999)]
    assert chosen == ["plain", "plain", "native", "native", "packed", "packed", "packed", "packed"]
    gemm.kernels = None
    assert gemm.kernel_for(9) == gemm.candidates()[0] if native.available()[0] else "plain"
    assert {"plain", "packed"} <= set(gemm.candidates())
    assert {prefers_plain(rows, o, i, False) for rows, i, o in SHAPES} == {True, False}
    assert prefers_plain(1, 4096, 4096, True)
    assert not prefers_plain(1024, 384, 384, False)


LEVELS_OF_2 = Levels(2.0, 128, 1, 255)  # symmetric, 8 bits, step 2


@pytest.mark.parametrize("quantize", [to_levels, to_levels_by_arithmetic])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("zero_point", [2, 4])
def test_asymmetric_levels_round_half_to_even_and_clip(
    quantize: Callable[..., Tensor], signed: bool, zero_point: int
) -> None:
    """Expected by hand, step 2, levels 0..15: half steps go to even steps; the ends clip."""
    x = torch.tensor([[1.0, 3.0, 5.0, -1.0, -3.0, 0.0, -100.0, 100.0]])
    expected = torch.tensor([[0, 2, 2, 0, -2, 0, -zero_point, 15 - zero_point]]) + zero_point
    levels = quantize(x, Levels(2.0, zero_point, 0, 15), signed)
    assert torch.equal(levels.long() + (128 if signed else 0), expected)


@pytest.mark.parametrize("quantize", [to_levels, to_levels_by_arithmetic])
@pytest.mark.parametrize("signed", [True, False])
def test_levels_round_half_to_even_and_stop_at_127(quantize: Callable[..., Tensor], signed: bool) -> None:
    """Expected by hand, step 2: 0.5, 1.5, 2.5 steps → 0, 2, 2; below -127 steps → -127, never -128."""
    x = torch.tensor([[1.0, 3.0, 5.0, -1.0, -3.0, -253.0, -255.0, -256.0, -1e9, 255.0, 1e9, float("-inf")]])
    expected = torch.tensor([[0, 2, 2, 0, -2, -126, -127, -127, -127, 127, 127, -127]])
    levels = quantize(x, LEVELS_OF_2, signed)
    assert levels.dtype == (torch.int8 if signed else torch.uint8)
    assert torch.equal(levels.long() - (0 if signed else 128), expected)


def test_levels_of_views() -> None:
    """Expected: the same as for a contiguous copy; the result must not keep the strides of its source."""
    x = inputs(8, 12, seed=3)
    for view in (x.t(), x[:, ::2], x[2:7], x[:0], x.unsqueeze(0).expand(3, 8, 12)):
        levels = to_levels(view, LEVELS_OF_2, signed=True)
        assert torch.equal(levels, to_levels(view.contiguous(), LEVELS_OF_2, signed=True))
        assert levels.is_contiguous()


@needs_int8
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_leading_dimensions_and_strides(kernel: Kernel) -> None:
    """Expected: the definition; [I], [B, I], [B, L, I], an empty batch, transposed, sliced and expanded inputs."""
    gemm = random_gemm(24, 20)
    fast = ready(gemm, kernel)
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
    for name, (_, _, smallest) in int8_gemm._POST_OPS.items():
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
