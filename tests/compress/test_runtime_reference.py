"""The fake-quantized reference, and what is refused before a model is changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from gemms import DYNAMIC, TOY, Toy, asymmetric, exact, inputs, needs_int8, quantize, random_gemm, symmetric
from squeezoo.compress.quantizers import InputQuantization, input_quantizer
from squeezoo.compress.runtime import QuantizedGemm, int8_supported, use_int8_, use_reference_
from squeezoo.compress.runtime.inputs import FakeQuantizedInput, fake_quantize, step_of, stretch_
from squeezoo.compress.runtime.reference import use_quantized_inputs_
from squeezoo.models import all_adapters
from squeezoo.models.adapter import Adapter, GemmSite, find_sites
from squeezoo.models.dense import logits
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread_without_gradients() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


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
    if int8_supported()[0]:
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
    use_quantized_inputs_(model, {"0": symmetric(1.0, 4)})
    x = torch.tensor([-9.0, -7.5, -2.5, 0.5, 1.5, 7.4, 100.0])
    expected = torch.tensor([-7.0, -7.0, -2.0, 0.0, 2.0, 7.0, 7.0])
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x.bfloat16()), expected.bfloat16())
    assert torch.equal(copy.deepcopy(model)(x), expected)
    for wrong, message in (
        ({"0": symmetric(1.0, 9)}, "2 to 8 bits .*found 9"),
        ({"0": symmetric(0.0)}, "input scale, found 0.0"),
        ({"0": InputQuantization("static", 8, 1.0, 0, -128, 127)}, r"levels -127..127 or 0..255 .*found -128..127"),
        ({"0": asymmetric(1.0, 256)}, r"zero point among the levels 0..255, found 256"),
        ({"0": symmetric(1.0), "5": symmetric(1.0)}, "no module '5' in this Sequential"),
    ):
        with pytest.raises(ValueError, match=message):
            use_quantized_inputs_(model, wrong)
    assert len(model[0]._forward_pre_hooks) == 1
    assert FakeQuantizedInput(symmetric(0.5))(model, (torch.tensor([63.4, 70.0]),))[0].tolist() == [63.5, 63.5]


@pytest.mark.parametrize(
    "record",
    [
        {"method": "lsq", "bits": 8},
        {"method": "lsq", "bits": 3},
        {"method": "minmax", "bits": 8},
        {"method": "minmax", "bits": 4},
        {"method": "pact", "bits": 4, "low": 0.01, "high": 0.99},
        {"method": "q8bert", "bits": 8},
        {"method": "q8bert", "bits": 5, "dynamic": True},
        {"method": "dynamic", "bits": 8},
    ],
    ids=lambda record: "-".join(str(value) for value in record.values()),
)
def test_every_input_quantizer_is_repeated_exactly(record: dict[str, Any]) -> None:
    """Expected: what the quantizer itself computes in evaluation mode, bit for bit, from its exported levels."""
    generator = torch.Generator().manual_seed(0)
    quantizer = input_quantizer(record)
    quantizer.start_observing_()
    for _ in range(3):
        quantizer(torch.randn(40, 30, generator=generator) + 0.4)
    quantizer.finish_calibration_()
    quantizer.eval()
    found = quantizer.export()
    for x in (torch.randn(40, 30, generator=generator) * 2, torch.rand(9, 30, generator=generator), torch.zeros(3, 30)):
        assert torch.equal(fake_quantize(x, found), quantizer(x))
        assert torch.equal(fake_quantize(x.bfloat16(), found), quantizer(x.bfloat16()))


def test_a_dynamic_input_matches_pytorch() -> None:
    """Expected: vector dynamic_quant, scale and zero point of torch.ao.quantization's quantize_dynamic."""
    vector = json.loads((Path(__file__).parents[1] / "vectors" / "dynamic_quant.json").read_text())
    x = torch.tensor(vector["x"])
    assert step_of(x, DYNAMIC) == (pytest.approx(vector["x_scale"], rel=1e-6), vector["x_zero_point"])
    levels = torch.tensor(vector["x_q"]) - vector["x_zero_point"]
    torch.testing.assert_close(fake_quantize(x, DYNAMIC), levels * vector["x_scale"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="finite input to quantize, found values from nan to nan"):
        fake_quantize(torch.tensor([1.0, float("nan")]), DYNAMIC)


def test_stretching_moves_every_scale_and_back() -> None:
    """Expected by hand: levels of step 2 become levels of step 3 and again of step 2; dynamic ones too."""
    model = nn.Sequential(nn.Identity(), nn.Identity())
    use_quantized_inputs_(model, {"0": symmetric(2.0)})
    x = torch.tensor([5.0, -7.0])
    assert stretch_(model, 1.5) == 1
    assert model(x).tolist() == [6.0, -6.0]
    assert stretch_(model, 1.0) == 1
    assert model(x).tolist() == [4.0, -8.0]
    use_quantized_inputs_(model, {"1": DYNAMIC})
    assert stretch_(model, 1.0) == 2


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
    model = tiny.TINY["timm_vit"]()
    sites = find_sites(model, all_adapters()["timm_vit"])
    gemms = quantize(model, sites, lambda: logits(model, tiny.tiny_batch("timm_vit")))
    spoil, message = wrong_plans()[case]
    spoil(model, gemms)
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        use(model, sites, gemms)
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_q_OI": torch.zeros(4, 8)}, r"expected weights int8 .*, found float32 \[4, 8\]"),
        ({"weight_q_OI": torch.zeros(4, dtype=torch.int8)}, r"found int8 \[4\]"),
        ({"scale_O": torch.ones(4, 1)}, r"expected scales float32 \[4\], found float32 \[4, 1\]"),
        ({"scale_O": torch.tensor([1.0, 0.0, 1.0, 1.0])}, "positive scales, found 0.0"),
        ({"scale_O": torch.tensor([1.0, float("nan"), 1.0, 1.0])}, "finite scales, found 1 others"),
        ({"bias_O": torch.ones(5)}, r"expected bias float32 \[4\]"),
        ({"input": symmetric(0.0)}, "input scale, found 0.0"),
        ({"input": symmetric(float("inf"))}, "input scale, found inf"),
    ],
)
def test_a_quantized_gemm_checks_itself(changes: dict[str, Any], message: str) -> None:
    """Expected: an error that says what was expected and found."""
    with pytest.raises(ValueError, match=f"^g: .*{message}"):
        random_gemm(4, 8, **changes)
