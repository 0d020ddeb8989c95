"""Random quantized GEMMs, their exact results, and a one-block model to put them into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from squeezoo.compress.quantizers import InputQuantization
from squeezoo.compress.runtime import QuantizedGemm, int8_supported
from squeezoo.compress.runtime.int8_linear import Int8Gemm
from squeezoo.models.adapter import Adapter, GemmSite, Sites
from torch import Tensor, nn

SUPPORTED, WHY_NOT = int8_supported()
needs_int8 = pytest.mark.skipif(not SUPPORTED, reason=WHY_NOT)


def symmetric(scale: float, bits: int = 8) -> InputQuantization:
    """Levels -Qp..Qp, as LSQ has them."""
    qp = 2 ** (bits - 1) - 1
    return InputQuantization("static", bits, scale, 0, -qp, qp)


def asymmetric(scale: float, zero_point: int, bits: int = 8) -> InputQuantization:
    """Levels 0..2^bits - 1, as MinMax and PACT have them."""
    return InputQuantization("static", bits, scale, zero_point, 0, 2**bits - 1)


DYNAMIC = InputQuantization("dynamic", 8, None, None, 0, 255)


def random_gemm(out_features: int, in_features: int, seed: int = 0, bias: bool = True, **changes: Any) -> QuantizedGemm:
    """Scales are powers of two and biases multiples of them, so that float32 results are exact up to 2^24 steps."""
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, Any] = dict(
        name="g",
        weight_q_OI=torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8),
        scale_O=2.0 ** torch.randint(-3, 1, (out_features,), generator=generator),
        input=symmetric(0.25),
        bias_O=torch.randint(-9, 10, (out_features,), generator=generator).float() if bias else None,
    )
    return QuantizedGemm(**{**fields, **changes})


def ready(gemm: QuantizedGemm, **how: Any) -> Int8Gemm:
    return Int8Gemm(gemm.weight_q_OI, gemm.scale_O, gemm.bias_O, gemm.input, **how)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    """Multiples of 1/16, a quarter of the step of `random_gemm`: ties, and values past ±127 steps on both sides."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-640, 641, shape, generator=generator) / 16
    return x * torch.where(torch.rand(shape, generator=generator) < 0.1, 4.0, 1.0)


def exact(gemm: QuantizedGemm, x: Tensor) -> Tensor:
    """The definition in 64 bits: round half to even, clamp to the levels, integer sums, then scales and bias."""
    found = gemm.input
    assert found.kind == "static"
    levels = ((x.double() / found.scale).round() + found.zero_point).clamp(found.qmin, found.qmax).long()
    sums = (levels - found.zero_point).reshape(-1, gemm.in_features) @ gemm.weight_q_OI.long().t()
    y = sums.double() * (gemm.scale_O.double() * found.scale)
    y = y if gemm.bias_O is None else y + gemm.bias_O.double()
    return y.reshape(*x.shape[:-1], gemm.out_features)


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
            gemm.name,
            weight_q_OI,
            scale_O,
            symmetric(largest[gemm.name] / 127),
            bias if bias is None else bias.detach().clone(),
        )
    return result
