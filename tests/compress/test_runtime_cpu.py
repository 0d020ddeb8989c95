"""The CPU runtime: int8 modules against exact integer arithmetic and against the fake-quantized reference."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from squeezoo.compress.runtime import QuantizedGemm, cpu, int8_linear, int8_supported, use_int8_, use_reference_
from squeezoo.compress.runtime.int8_linear import (
    Int8Gemm,
    Int8Linear,
    Int8Slice,
    SharedInput,
    prefers_plain,
    to_levels,
    to_levels_by_arithmetic,
)
from squeezoo.compress.runtime.reference import FakeQuantizedInput, use_input_scales_
from squeezoo.models import all_adapters
from squeezoo.models.adapter import Adapter, AttentionSite, GemmSite, Sites, find_sites
from squeezoo.models.dense import logits
from torch import Tensor, nn

SUPPORTED, WHY_NOT = int8_supported()
needs_int8 = pytest.mark.skipif(not SUPPORTED, reason=WHY_NOT)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def random_gemm(out_features: int, in_features: int, seed: int = 0, bias: bool = True, **changes: Any) -> QuantizedGemm:
    """Scales are powers of two and biases multiples of them, so that float32 results are exact up to 2^24 steps."""
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, Any] = dict(
        name="g",
        weight_q_OI=torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8),
        scale_O=2.0 ** torch.randint(-3, 1, (out_features,), generator=generator),
        input_scale=0.25,
        bias_O=torch.randint(-9, 10, (out_features,), generator=generator).float() if bias else None,
    )
    return QuantizedGemm(**{**fields, **changes})


def ready(gemm: QuantizedGemm, **how: Any) -> Int8Gemm:
    return Int8Gemm(gemm.weight_q_OI, gemm.scale_O, gemm.bias_O, gemm.input_scale, **how)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    """Multiples of 1/16, a quarter of the step of `random_gemm`: ties, and values past ±127 steps on both sides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-640, 641, shape, generator=generator) / 16
    return x * torch.where(torch.rand(shape, generator=generator) < 0.1, 4.0, 1.0)


def exact(gemm: QuantizedGemm, x: Tensor) -> Tensor:
    """The definition in 64 bits: round half to even, clamp to ±127, integer sums, then scales and bias."""
    levels = (x.double() / gemm.input_scale).round().clamp(-127, 127).long()
    sums = levels.reshape(-1, gemm.in_features) @ gemm.weight_q_OI.long().t()
    y = sums.double() * (gemm.scale_O.double() * gemm.input_scale)
    y = y if gemm.bias_O is None else y + gemm.bias_O.double()
    return y.reshape(*x.shape[:-1], gemm.out_features)


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


# --- the FFN: up, activation, down ----------------------------------------------------------------------------------


class Toy(nn.Module):
    """One "block" with an FFN and nothing else that matters."""

    def __init__(self, activation: nn.Module, width: int = 20, hidden: int = 36) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        block = self.blocks[0]
        block.up, block.act, block.drop = nn.Linear(width, hidden), activation, nn.Dropout(0.5)
        block.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        block = self.blocks[0]
        return block.down(block.drop(block.act(block.up(x))))


TOY = Adapter(
    name="toy",
    model_types=("toy",),
    library="torch",
    block=r"blocks\.(\d+)",
    gemms=(GemmSite("up", "ffn_up"), GemmSite("down", "ffn_down")),
    attention=(),
    final_projection=None,
    per_block=2,
    activation="act",
)


def toy(activation: nn.Module, input_scale: float = 0.03, next_scale: float = 0.02) -> tuple[Toy, Toy, cpu.Int8Report]:
    """The same random FFN as int8 and as reference."""
    torch.manual_seed(0)
    fast = Toy(activation).eval()
    slow = copy.deepcopy(fast)
    up = random_gemm(36, 20, 1, name="blocks.0.up", scale_O=torch.rand(36) / 40, bias_O=torch.randn(36))
    gemms = {
        up.name: QuantizedGemm(up.name, up.weight_q_OI, up.scale_O / 10, input_scale, up.bias_O),
        "blocks.0.down": random_gemm(20, 36, 2, name="blocks.0.down", input_scale=next_scale),
    }
    report = use_int8_(fast, find_sites(fast, TOY), gemms)
    use_reference_(slow, find_sites(slow, TOY), gemms)
    return fast, slow, report


def assert_equal_but_for_flips(fast: Tensor, slow: Tensor, gemm: Int8Gemm, share: float = 2e-3) -> None:
    """Equal to 1e-5, or off by the effect of at most three inputs that fell to the neighbouring level, in few rows."""
    tolerance = 1e-5 * float(slow.abs().max())
    one_flip_O = gemm.weight_q_OI.float().abs().amax(1) * gemm.scale_O * gemm.input_scale
    assert ((fast - slow).abs() <= 3 * one_flip_O + tolerance).all()
    rows_off = ((fast - slow).abs() > tolerance).any(-1).float().mean()
    assert rows_off <= share * gemm.in_features


ACTIVATIONS = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(),
}


@needs_int8
@pytest.mark.parametrize("rows", [1, 9, 700])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_is_fused_between_the_ffn_matrices(name: str, rows: int) -> None:
    """Expected: the reference. Levels may differ from it by one, only where a value lies at a rounding boundary; 700
    rows take the packed kernel, fewer the plain one."""
    fast, slow, report = toy(ACTIVATIONS[name])
    assert report == cpu.Int8Report((), (), (("blocks.0.up", "blocks.0.down"),))
    up, down = fast.blocks[0].up, fast.blocks[0].down
    assert type(fast.blocks[0].act) is nn.Identity
    x = torch.randn(rows, 20)
    h = slow.blocks[0].act(slow.blocks[0].up(x))
    levels = up(x)
    assert levels.dtype == (torch.uint8 if rows == 700 else torch.int8)
    signed = levels.long() - (128 if rows == 700 else 0)
    expected = to_levels(h, 0.02, signed=True).long()
    assert rows == 1 or expected.unique().numel() > 20
    assert (signed - expected).abs().max() <= 1
    assert (signed != expected).float().mean() < 1e-3
    torch.testing.assert_close(down(levels), down.gemm(signed.float() * 0.02), rtol=1e-5, atol=1e-3)
    assert_equal_but_for_flips(fast(x), slow(x), down.gemm)


@needs_int8
@pytest.mark.parametrize("rows", [9, 700])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_a_tiny_step_after_gelu_never_gives_level_minus_128(name: str, rows: int) -> None:
    """GELU reaches -0.17: with a step of 0.0005 that is below -127 levels, where uint8 would hold -128."""
    fast, slow, _ = toy(ACTIVATIONS[name], next_scale=0.0005)
    x = torch.randn(rows, 20)
    levels = fast.blocks[0].up(x)
    assert int(levels.min()) == (1 if rows == 700 else -127)
    assert_equal_but_for_flips(fast(x), slow(x), fast.blocks[0].down.gemm)


@needs_int8
def test_transformers_and_timm_activations_are_known() -> None:
    """Each named class computes what it is taken for; subclasses and anything else are not fused."""
    from timm.layers.activations import GELU, GELUTanh
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 1001)
    known = [GELU(), GELUTanh(), ACT2FN["gelu"], ACT2FN["gelu_new"], ACT2FN["gelu_pytorch_tanh"], ACT2FN["relu"]]
    for module in known:
        name = cpu._known_activation(module)
        assert name is not None, module
        torch.testing.assert_close(module(x), ACTIVATIONS[name](x), rtol=0, atol=1e-6)

    class Odd(nn.ReLU):
        pass

    for module in (nn.SiLU(), nn.Identity(), Odd(), ACT2FN["quick_gelu"]):
        assert cpu._known_activation(module) is None


@needs_int8
def test_an_unknown_activation_is_left_alone() -> None:
    """Expected: the reference; the activation stays and the two matrices run alone."""
    fast, slow, report = toy(nn.SiLU())
    assert report == cpu.Int8Report(("blocks.0.up", "blocks.0.down"), (), ())
    assert type(fast.blocks[0].act) is nn.SiLU
    x = torch.randn(50, 20)
    assert_equal_but_for_flips(fast(x), slow(x), fast.blocks[0].down.gemm)


@needs_int8
def test_half_models_keep_their_type_through_the_fused_ffn() -> None:
    """Expected: bfloat16 in, bfloat16 out (levels could not tell the type), near the float32 result."""
    fast, slow, _ = toy(nn.GELU())
    x = torch.randn(50, 20).bfloat16()
    y = fast(x)
    assert y.dtype == torch.bfloat16
    assert float((y.float() - slow(x.float())).norm() / slow(x.float()).norm()) < 0.02


# --- whole models ---------------------------------------------------------------------------------------------------


def quantize(model: nn.Module, sites: Sites, run: Callable[[], Any]) -> dict[str, QuantizedGemm]:
    """Per-channel weights and inputs scaled by their largest value while ``run``, the final projection included."""
    largest: dict[str, float] = {}
    gemms = [*sites.gemms, *([sites.final] if sites.final is not None else [])]

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args: largest.__setitem__(name, float(args[0].abs().max()))

    handles = [gemm.module.register_forward_pre_hook(watch(gemm.name)) for gemm in gemms]
    run()
    for handle in handles:
        handle.remove()
    result = {}
    for gemm in gemms:
        scale_O = gemm.weight_OI.abs().amax(1) / 127
        weight_q_OI = (gemm.weight_OI / scale_O[:, None]).round().to(torch.int8)
        bias = gemm.module.bias
        result[gemm.name] = QuantizedGemm(
            gemm.name, weight_q_OI, scale_O, largest[gemm.name] / 127, bias if bias is None else bias.detach().clone()
        )
    return result


@cache
def pair(name: str) -> tuple[nn.Module, nn.Module, cpu.Int8Report, dict[str, QuantizedGemm]]:
    """A tiny model as int8 and as reference, not to be changed."""
    adapter = all_adapters()[name]
    fast, slow = tiny.TINY[name](), tiny.TINY[name]()
    sites = find_sites(fast, adapter)
    gemms = quantize(fast, sites, lambda: logits(fast, tiny.tiny_batch(name, seed=5)))
    report = use_int8_(fast, sites, gemms)
    use_reference_(slow, find_sites(slow, adapter), gemms)
    return fast, slow, report, gemms


@needs_int8
@pytest.mark.parametrize("name", ["bert", "vit", "timm_vit"])
@pytest.mark.parametrize("n", [1, 4])
def test_a_whole_model_agrees_with_the_reference(name: str, n: int) -> None:
    """Expected: the reference's logits. Tolerance 5 % of the largest: float rounding of 1e-7 in LayerNorm or softmax
    may move a value over a rounding boundary, which changes one of 32 to 64 summands by 1/127 of the range."""
    fast, slow, report, gemms = pair(name)
    batch = tiny.tiny_batch(name, n)
    expected = logits(slow, batch)
    found = logits(fast, batch)
    assert float((found - expected).abs().max()) <= 0.05 * float(expected.abs().max())
    assert torch.equal(found, logits(fast, batch))
    groups = (report.single, *report.shared, *report.fused)
    assert sorted(name for group in groups for name in group) == sorted(gemms)
    assert [len(group) for group in report.shared] == ([] if name == "timm_vit" else [3, 3])
    assert len(report.fused) == 2


@needs_int8
@pytest.mark.parametrize("name", ["bert", "vit", "timm_vit"])
def test_every_gemm_agrees_on_the_inputs_of_the_reference(name: str) -> None:
    """Expected: each linear of the reference, on the very input it saw, to 1e-5: here no boundary can be crossed but in
    the fused FFNs, whose down projection is compared apart from flipped levels."""
    fast, slow, report, gemms = pair(name)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    modules = dict(slow.named_modules())

    def record(gemm_name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.__setitem__(gemm_name, (unrounded[gemm_name], output))

    unrounded: dict[str, Tensor] = {}
    for gemm_name in gemms:
        modules[gemm_name].register_forward_pre_hook(
            lambda module, args, n=gemm_name: unrounded.__setitem__(n, args[0]), prepend=True
        )
        modules[gemm_name].register_forward_hook(record(gemm_name))
    logits(slow, tiny.tiny_batch(name))
    ups = dict(report.fused)
    for gemm_name, (x, expected) in seen.items():
        module = fast.get_submodule(gemm_name)
        if gemm_name in ups:
            down = fast.get_submodule(ups[gemm_name])
            assert_equal_but_for_flips(down(module(x)), seen[ups[gemm_name]][1], down.gemm)
        else:
            assert float((module(x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert set(seen) == set(gemms)


@needs_int8
def test_names_stay_and_parameters_go() -> None:
    """The module tree keeps its names; int8 matrices are no parameters, the others are left alone."""
    fast, slow, _, gemms = pair("bert")
    assert isinstance(fast.get_submodule("bert.encoder.layer.0.attention.self.query"), Int8Slice)
    assert isinstance(fast.get_submodule("classifier"), Int8Linear)
    replaced = {f"{name}.{kind}" for name in gemms for kind in ("weight", "bias")}
    assert {n for n, _ in fast.named_parameters()} == {n for n, _ in slow.named_parameters()} - replaced
    assert "out_features=32, part 2 of 3" in repr(fast)


@needs_int8
def test_only_named_gemms_are_replaced_and_unequal_scales_are_not_shared() -> None:
    """A partial plan: Q and K with different input scales stay apart, an FFN with one matrix is not fused."""
    name = "bert.encoder.layer.0"
    _, slow, _, gemms = pair("bert")
    chosen = {n: gemms[n] for n in (f"{name}.attention.self.query", f"{name}.intermediate.dense")}
    key = gemms[f"{name}.attention.self.key"]
    chosen[key.name] = QuantizedGemm(key.name, key.weight_q_OI, key.scale_O, key.input_scale * 1.5, key.bias_O)
    fast, slow = tiny.tiny_bert(), tiny.tiny_bert()
    report = use_int8_(fast, find_sites(fast, all_adapters()["bert"]), chosen)
    use_reference_(slow, find_sites(slow, all_adapters()["bert"]), chosen)
    assert set(report.single) == set(chosen)
    assert (report.shared, report.fused) == ((), ())
    batch = tiny.tiny_batch("bert")
    expected = logits(slow, batch)
    assert float((logits(fast, batch) - expected).abs().max()) <= 0.05 * float(expected.abs().max())


@needs_int8
def test_cross_attention_shares_k_and_v_only() -> None:
    """Roles decide: Q of a cross attention reads another tensor than its K and V."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Module()])
            for role in ("q", "k", "v"):
                self.layers[0].add_module(role, nn.Linear(20, 12))

    model = Cross()
    sites_ = tuple(GemmSite(role, f"cross_{role}") for role in ("q", "k", "v"))  # type: ignore[arg-type]
    adapter = Adapter("cross", ("cross",), "torch", r"layers\.(\d+)", sites_, (AttentionSite(""),)[:0], None, 3)
    gemms = {f"layers.0.{r}": random_gemm(12, 20, name=f"layers.0.{r}") for r in ("q", "k", "v")}
    report = use_int8_(model, find_sites(model, adapter), gemms)
    assert report == cpu.Int8Report(("layers.0.q",), (("layers.0.k", "layers.0.v"),), ())


@needs_int8
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_an_int8_model_can_be_copied(clone: Callable[[nn.Module], nn.Module]) -> None:
    """Expected: equal results; oneDNN's packed tensors cannot be copied, so the copy packs again. Q, K and V of the
    copy still share one GEMM, which is not the original's."""
    fast, _, _, _ = pair("bert")
    batch = tiny.tiny_batch("bert")
    expected = logits(fast, batch)
    other = clone(fast)
    assert torch.equal(logits(other, batch), expected)
    mine, theirs = (m.get_submodule("bert.encoder.layer.1.attention.self") for m in (fast, other))
    assert theirs.query.shared is theirs.value.shared
    assert theirs.query.shared is not mine.query.shared


@needs_int8
def test_an_int8_model_refuses_training_and_state_dict() -> None:
    """Both would silently do nothing, or leave the matrices out of a file."""
    fast, _, _, _ = pair("timm_vit")
    assert not any(module.training for module in fast.modules())
    with pytest.raises(RuntimeError, match="inference only"):
        fast.train()
    fast.eval()
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv is an int8 runtime module"):
        fast.state_dict()


# --- what must be refused before anything is changed ----------------------------------------------------------------


def wrong_plans() -> dict[str, tuple[Callable[[nn.Module, dict[str, QuantizedGemm]], Any], str]]:
    name = "blocks.0.mlp.fc1"
    return {
        "unknown": (
            lambda m, g: g.__setitem__("nope", random_gemm(4, 4, name="nope")),
            "this model's 9 GEMMs .*'nope'",
        ),
        "misnamed": (lambda m, g: g.__setitem__(name, g["head"]), "holding the matrix of 'head'"),
        "shape": (
            lambda m, g: g.__setitem__(name, random_gemm(32, 64, name=name)),
            r"the module is \[64, 32\] .*, the quantized matrix \[32, 64\]",
        ),
        "moved on": (lambda m, g: setattr(m, "head", nn.Linear(32, 3)), "belong to another model"),
    }


@needs_int8
@pytest.mark.parametrize("use", [use_int8_, use_reference_])
@pytest.mark.parametrize("case", wrong_plans())
def test_a_wrong_plan_changes_nothing(case: str, use: Callable[..., Any]) -> None:
    """One clear message, and every module and weight as before."""
    model = tiny.tiny_timm_vit()
    sites = find_sites(model, all_adapters()["timm_vit"])
    gemms = quantize(model, sites, lambda: logits(model, tiny.tiny_batch("timm_vit")))
    spoil, message = wrong_plans()[case]
    spoil(model, gemms)
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        use(model, sites, gemms)
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_an_unsupported_machine_is_said_and_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without VNNI: the reason, and what to use instead."""
    monkeypatch.setattr(cpu, "_vnni", lambda: "")
    monkeypatch.setattr(cpu, "int8_supported", int8_supported.__wrapped__)
    model = Toy(nn.ReLU())
    gemms = {"blocks.0.up": random_gemm(36, 20, name="blocks.0.up")}
    modules = list(model.modules())
    with pytest.raises(RuntimeError, match=r"no int8 dot products .*use_reference_"):
        use_int8_(model, find_sites(model, TOY), gemms)
    assert list(model.modules()) == modules
    assert use_int8_(model, find_sites(model, TOY), {}) == cpu.Int8Report((), (), ())


def test_inexact_or_missing_operators_are_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators are tried, not only looked up: a kernel that saturates is refused."""
    monkeypatch.setattr(cpu, "_vnni", lambda: "AVX-512 VNNI")
    saturating = lambda self, levels, scale: torch.zeros(levels.shape[0], self.out_features)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(Int8Gemm, "_run_plain", saturating)
        patch.setattr(Int8Gemm, "_run_packed", saturating)
        patch.setattr(Int8Gemm, "_pack", lambda self: None)
        assert int8_supported.__wrapped__() == (
            False,
            f"PyTorch {torch.__version__}: the int8 operators do not add up exactly on this CPU",
        )
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_is_exact", lambda: torch.ops.onednn.no_such_operator)
        supported, reason = int8_supported.__wrapped__()
        assert not supported
        assert "no attribute 'no_such_operator'" in reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_q_OI": torch.zeros(4, 8)}, r"expected weights int8 .*, found float32 \[4, 8\]"),
        ({"weight_q_OI": torch.zeros(4, dtype=torch.int8)}, r"found int8 \[4\]"),
        ({"scale_O": torch.ones(4, 1)}, r"expected scales float32 \[4\], found float32 \[4, 1\]"),
        ({"scale_O": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "positive scales, found 0.0"),
        ({"scale_O": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, "finite scales, found 1 others"),
        ({"bias_O": torch.ones(5)}, r"expected bias float32 \[4\]"),
        ({"input_scale": 0.0}, "input scale, found 0.0"),
        ({"input_scale": float("inf")}, "input scale, found inf"),
    ],
)
def test_a_quantized_gemm_checks_itself(changes: dict[str, Any], message: str) -> None:
    """Expected: an error that says what was expected and found."""
    with pytest.raises(ValueError, match=f"^g: .*{message}"):
        random_gemm(4, 8, **changes)


# --- the reference --------------------------------------------------------------------------------------------------


def test_the_reference_is_the_definition() -> None:
    """Expected: float64 arithmetic of the definition; classes and keys of the model stay."""
    model = Toy(nn.ReLU())
    keys = list(model.state_dict())
    gemm = random_gemm(36, 20, name="blocks.0.up")
    use_reference_(model, find_sites(model, TOY), {gemm.name: gemm})
    x = inputs(3, 5, 20)
    assert torch.equal(model.blocks[0].up(x).double(), exact(gemm, x))
    assert type(model.blocks[0].up) is nn.Linear
    assert list(model.state_dict()) == keys
    assert not model.training


def test_the_reference_of_a_transposed_layer() -> None:
    """Expected: GPT-2's Conv1D [in, out] computes the same as the linear with the transposed matrix."""
    from transformers.pytorch_utils import Conv1D

    model = Toy(nn.ReLU())
    model.blocks[0].up = Conv1D(36, 20)
    sites = (GemmSite("up", "ffn_up", "in_out"), TOY.gemms[1])
    adapter = Adapter("toy", ("toy",), "torch", r"blocks\.(\d+)", sites, (), None, 2)
    gemm = random_gemm(36, 20, name="blocks.0.up")
    x = inputs(3, 20)
    use_reference_(model, find_sites(model, adapter), {gemm.name: gemm})
    assert torch.equal(model.blocks[0].up(x).double(), exact(gemm, x))
    if SUPPORTED:
        fresh = Toy(nn.ReLU())
        fresh.blocks[0].up = Conv1D(36, 20)
        use_int8_(fresh, find_sites(fresh, adapter), {gemm.name: gemm})
        assert torch.equal(fresh.blocks[0].up(x).double(), exact(gemm, x))


def test_a_bias_that_has_no_place_is_refused() -> None:
    """Expected: an error, not a bias that is dropped; without one the module's own bias becomes zero."""
    model = Toy(nn.ReLU())
    model.blocks[0].up = nn.Linear(20, 36, bias=False)
    gemm = random_gemm(36, 20, name="blocks.0.up")
    with pytest.raises(ValueError, match=r"blocks\.0\.up has no bias, but a bias of 36"):
        use_reference_(model, find_sites(model, TOY), {gemm.name: gemm})
    down = random_gemm(20, 36, name="blocks.0.down", bias=False)
    use_reference_(model, find_sites(model, TOY), {down.name: down})
    assert not model.blocks[0].down.bias.any()


def test_input_scales_of_other_widths() -> None:
    """Expected by hand, 4 bits, step 1: levels -7..7, half to even; the type of the input stays."""
    model = nn.Sequential(nn.Identity())
    use_input_scales_(model, {"0": (1.0, 4)})
    x = torch.tensor([-9.0, -7.5, -2.5, 0.5, 1.5, 7.4, 100.0])
    expected = torch.tensor([-7.0, -7.0, -2.0, 0.0, 2.0, 7.0, 7.0])
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x.bfloat16()), expected.bfloat16())
    assert torch.equal(copy.deepcopy(model)(x), expected)
    for scales, message in (
        ({"0": (1.0, 9)}, "2 to 8 bits .*found 9"),
        ({"0": (0.0, 8)}, "input scale, found 0.0"),
        ({"0": (1.0, 8), "5": (1.0, 8)}, "no module '5' in this Sequential"),
    ):
        with pytest.raises(ValueError, match=message):
            use_input_scales_(model, scales)
    assert len(model[0]._forward_pre_hooks) == 1
    assert FakeQuantizedInput(0.5, 127)(model, (torch.tensor([63.4, 70.0]),))[0].tolist() == [63.5, 63.5]


def test_gelu_bounds() -> None:
    """The lower bounds that spare a pass over the result: the true minima, found on a fine grid."""
    x = torch.linspace(-3, 3, 600_001, dtype=torch.float64)
    minima = {"gelu": F.gelu(x).min(), "gelu_tanh": F.gelu(x, approximate="tanh").min(), "relu": F.relu(x).min()}
    for name, (_, _, smallest) in int8_linear._POST_OPS.items():
        if name is not None:
            assert smallest <= float(minima[name]) <= smallest + 2e-4
    assert issubclass(Int8Slice, nn.Module)
    assert not issubclass(SharedInput, nn.Module)
