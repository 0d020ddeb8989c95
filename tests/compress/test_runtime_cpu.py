"""The CPU runtime put into models: fused FFNs and whole models against the fake-quantized reference."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import tiny
import torch
from gemms import DYNAMIC, TOY, Toy, asymmetric, needs_int8, quantize, random_gemm, symmetric
from squeezoo.compress.quantizers import InputQuantization
from squeezoo.compress.runtime import QuantizedGemm, cpu, int8_supported, native, use_int8_, use_reference_
from squeezoo.compress.runtime.int8_gemm import Int8Gemm, Kernel
from squeezoo.compress.runtime.int8_linear import Int8Linear, Int8Slice
from squeezoo.compress.runtime.levels import Levels, to_levels
from squeezoo.models import all_adapters
from squeezoo.models.adapter import Adapter, AttentionSite, GemmSite, find_sites
from squeezoo.models.dense import logits
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _one_thread_without_gradients() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def toy(
    activation: nn.Module,
    input_scale: float = 0.03,
    next_scale: float = 0.02,
    down: InputQuantization | None = None,
    kernel: Kernel | None = None,
) -> tuple[Toy, Toy, cpu.Int8Report]:
    """The same random FFN as int8 and as reference. ``down``: levels of the second matrix's input."""
    torch.manual_seed(0)
    fast = Toy(activation).eval()
    slow = copy.deepcopy(fast)
    up = random_gemm(36, 20, 1, name="blocks.0.up", scale_O=torch.rand(36) / 40, bias_O=torch.randn(36))
    gemms = {
        up.name: QuantizedGemm(up.name, up.weight_q_OI, up.scale_O / 10, symmetric(input_scale), up.bias_O),
        "blocks.0.down": random_gemm(20, 36, 2, name="blocks.0.down", input=down or symmetric(next_scale)),
    }
    report = use_int8_(fast, find_sites(fast, TOY), gemms)
    if kernel is not None:
        for module in fast.modules():
            if isinstance(module, Int8Linear):
                module.gemm.kernels = ((1 << 40, kernel),)
    use_reference_(slow, find_sites(slow, TOY), gemms)
    return fast, slow, report


def assert_equal_but_for_flips(fast: Tensor, slow: Tensor, gemm: Int8Gemm, share: float = 2e-3) -> None:
    """Equal to 1e-5, or off by the effect of at most three inputs that fell to the neighbouring level, in few rows."""
    assert gemm.input.scale is not None
    tolerance = 1e-5 * float(slow.abs().max())
    one_flip_O = gemm.weight_q_OI.float().abs().amax(1) * gemm.scale_O * gemm.input.scale
    assert ((fast - slow).abs() <= 3 * one_flip_O + tolerance).all()
    rows_off = ((fast - slow).abs() > tolerance).any(-1).float().mean()
    assert rows_off <= share * gemm.in_features


ACTIVATIONS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "relu": nn.ReLU()}


KERNELS = [
    "plain",
    "packed",
    pytest.param("native", marks=pytest.mark.skipif(not native.available()[0], reason=native.available()[1])),
]


@needs_int8
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [1, 9, 700])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_is_fused_between_the_ffn_matrices(name: str, rows: int, kernel: Kernel) -> None:
    """Expected: the reference. Levels may differ from it by one, only where a value lies at a rounding boundary."""
    fast, slow, report = toy(ACTIVATIONS[name], kernel=kernel)
    assert report == cpu.Int8Report((), (), (("blocks.0.up", "blocks.0.down"),))
    up, down = fast.blocks[0].up, fast.blocks[0].down
    assert type(fast.blocks[0].act) is nn.Identity
    x = torch.randn(rows, 20)
    h = slow.blocks[0].act(slow.blocks[0].up(x))
    levels = up(x)
    assert levels.dtype == (torch.int8 if kernel == "plain" else torch.uint8)
    signed = levels.long() - (0 if kernel == "plain" else 128)
    expected = to_levels(h, Levels.of(symmetric(0.02), h), signed=True).long()
    assert rows == 1 or expected.unique().numel() > 20
    assert (signed - expected).abs().max() <= 1
    assert (signed != expected).float().mean() < 1e-3
    torch.testing.assert_close(down(levels), down.gemm(signed.float() * 0.02), rtol=1e-5, atol=1e-3)
    assert_equal_but_for_flips(fast(x), slow(x), down.gemm)


@needs_int8
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_a_tiny_step_after_gelu_never_gives_level_minus_128(name: str, kernel: Kernel) -> None:
    """GELU reaches -0.17: with a step of 0.0005 that is below -127 levels, where uint8 would hold -128."""
    fast, slow, _ = toy(ACTIVATIONS[name], next_scale=0.0005, kernel=kernel)
    x = torch.randn(99, 20)
    levels = fast.blocks[0].up(x)
    assert int(levels.min()) == (-127 if kernel == "plain" else 1)
    assert_equal_but_for_flips(fast(x), slow(x), fast.blocks[0].down.gemm)


FEW = {"minmax": asymmetric(0.005, 20), "pact4": asymmetric(0.2, 2, bits=4), "lsq4": symmetric(0.3, bits=4)}


@needs_int8
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("down", FEW.values(), ids=FEW)
def test_the_fused_ffn_emits_levels_of_any_kind(down: InputQuantization, name: str, kernel: Kernel) -> None:
    """Expected: the reference, and no level outside those of the second matrix's input."""
    fast, slow, report = toy(ACTIVATIONS[name], down=down, kernel=kernel)
    assert report.fused
    x = torch.randn(99, 20)
    levels = fast.blocks[0].up(x).long() + (128 if kernel == "plain" else 0)
    assert levels.min() >= (0 if down.qmin == 0 else 128 + down.qmin)
    assert levels.max() == (down.qmax if down.qmin == 0 else 128 + down.qmax)
    assert_equal_but_for_flips(fast(x), slow(x), fast.blocks[0].down.gemm)


@needs_int8
def test_a_dynamic_input_is_not_fused_but_shared() -> None:
    """Expected: the reference; the range of the second matrix's input is not known when the first one ends, but Q, K
    and V of one tensor have one range."""
    fast, slow, report = toy(nn.GELU(), down=DYNAMIC)
    assert report == cpu.Int8Report(("blocks.0.up", "blocks.0.down"), (), ())
    assert type(fast.blocks[0].act) is nn.GELU
    x = torch.randn(50, 20)
    scale = float(torch.nn.functional.gelu(slow.blocks[0].up(x)).max()) / 255
    gemm = fast.blocks[0].down.gemm
    one_flip_O = gemm.weight_q_OI.float().abs().amax(1) * gemm.scale_O * scale
    assert ((fast(x) - slow(x)).abs() <= 4 * one_flip_O).all()
    model = tiny.TINY["bert"]()
    sites = find_sites(model, all_adapters()["bert"])
    gemms = quantize(model, sites, lambda: logits(model, tiny.tiny_batch("bert")))
    gemms = {n: QuantizedGemm(n, g.weight_q_OI, g.scale_O, DYNAMIC, g.bias_O) for n, g in gemms.items()}
    slow_model = copy.deepcopy(model)
    report = use_int8_(model, sites, gemms)
    assert [len(group) for group in report.shared] == [3, 3]
    assert report.fused == ()
    use_reference_(slow_model, find_sites(slow_model, all_adapters()["bert"]), gemms)
    expected = logits(slow_model, tiny.tiny_batch("bert"))
    found = logits(model, tiny.tiny_batch("bert"))
    assert float((found - expected).abs().max()) <= 0.05 * float(expected.abs().max())


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
    chosen[key.name] = QuantizedGemm(
        key.name, key.weight_q_OI, key.scale_O, symmetric((key.input.scale or 1.0) * 1.5), key.bias_O
    )
    fast, slow = tiny.TINY["bert"](), tiny.TINY["bert"]()
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
    for model in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        for part in (model, model.blocks, model.blocks[0], model.blocks[0].attn.qkv):
            with pytest.raises(RuntimeError, match="inference only"):
                part.train()
        assert not any(module.training for module in model.modules())  # none of them has been changed
        assert model.eval() is model
        assert model.train(False) is model
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv is an int8 runtime module"):
        fast.state_dict()


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
    saturating = lambda self, level, levels, emitted: torch.zeros(level.shape[0], self.out_features)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(Int8Gemm, "_run_plain", saturating)
        patch.setattr(Int8Gemm, "_run_packed", saturating)
        assert int8_supported.__wrapped__() == (
            False,
            f"PyTorch {torch.__version__}: the int8 operators do not add up exactly on this CPU",
        )
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_is_exact", lambda: torch.ops.onednn.no_such_operator)
        supported, reason = int8_supported.__wrapped__()
        assert not supported
        assert "no attribute 'no_such_operator'" in reason


@needs_int8
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kernel", ["native", "packed", "plain", "dense"])
def test_activations_that_are_not_finite_are_refused(kernel: str, bad: float) -> None:
    """They have no level: silently they would become some number. One value among many, at any kernel."""
    source = random_gemm(36, 20, name="g")
    gemm = cpu.Int8Gemm(source.weight_q_OI, source.scale_O, source.bias_O, source.input)
    if kernel not in gemm.candidates():
        pytest.skip(f"no {kernel} kernel here")
    x = torch.full((7, 20), 3e38)  # finite, but not its sum
    gemm.run_with(kernel, x)  # type: ignore[arg-type]
    x[5, 11] = bad
    with pytest.raises(ValueError, match="expected finite values in the input of an int8 matrix, found 1 of 140"):
        gemm.run_with(kernel, x)  # type: ignore[arg-type]


@needs_int8
@pytest.mark.parametrize("name", ["timm_vit", "bert"])
def test_a_model_refuses_them_too(name: str) -> None:
    """A fused block where the model has one; else its first GEMM."""
    fast = copy.deepcopy(pair(name)[0])
    batch = tiny.tiny_batch(name)
    logits(fast, batch)
    broken = next(tensor for key, tensor in fast.named_parameters() if "norm" in key.lower())
    broken[3] = float("nan")
    with pytest.raises(
        ValueError, match=r"the input of an int8 (matrix|Block|BertLayer).*(NaN or inf|parameters with)"
    ):
        logits(fast, batch)
