"""What a quantized GEMM computes, written down slowly: the float32 reference that every fast backend must agree with.

    y_TO = fake(x_TI) @ (q_OI * s_O)^T + b_O,   fake(x) = the input rounded to its levels (``inputs.py``)

One scale per output channel of the weight (equal ones where the quantizer has one per tensor), symmetric: the forward
pass of LSQ (Esser et al., arXiv:1902.08153, equations 1 and 2), SAWB and Q8BERT alike.
Legend: T rows (tokens of the whole batch), I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...models.adapter import Gemm, Sites
from ..quantizers import InputQuantization
from .inputs import FakeQuantizedInput, check_input


@dataclass(frozen=True, eq=False)
class QuantizedGemm:
    """One weight matrix as integers, with all that is needed to execute it.

    Args:
        name: full name of the module that it replaces.
        weight_q_OI: int8 [out_features, in_features], whatever its width on disk; pruned weights are zeros among the
            others.
        scale_O: float32 [out_features], positive; the weight is ``weight_q_OI * scale_O[:, None]``.
        input: the levels of the input, 2 to 8 bits, static or dynamic.
        bias_O: float32 [out_features], or None.

    Raises:
        ValueError: a wrong type or shape, a scale that is not positive and finite, a bias that is not finite, levels
            that no backend executes.
    """

    name: str
    weight_q_OI: Tensor = field(repr=False)
    scale_O: Tensor = field(repr=False)
    input: InputQuantization
    bias_O: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        w_OI = self.weight_q_OI
        if w_OI.dtype != torch.int8 or w_OI.ndim != 2 or not w_OI.numel():
            raise ValueError(
                f"{self.name}: expected weights int8 [out_features, in_features], found {_shown(w_OI)}; quantize first"
            )
        for what, tensor in (("scales", self.scale_O), ("bias", self.bias_O)):
            if tensor is None:
                continue
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != (w_OI.shape[0],):
                raise ValueError(f"{self.name}: expected {what} float32 [{w_OI.shape[0]}], found {_shown(tensor)}")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{self.name}: expected finite {what}, found {int((~tensor.isfinite()).sum())} others")
        if not bool((self.scale_O > 0).all()):
            raise ValueError(f"{self.name}: expected positive scales, found {float(self.scale_O.min())}")
        check_input(self.name, self.input)

    @property
    def out_features(self) -> int:
        return self.weight_q_OI.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight_q_OI.shape[1]


def use_reference_(model: nn.Module, sites: Sites, gemms: Mapping[str, QuantizedGemm]) -> None:
    """Make ``model`` the fake-quantized model in place: dequantized weights, every input rounded to its levels.

    Modules, their classes and the keys of the state dict stay. The model is left in evaluation mode.

    Raises:
        ValueError: see :func:`planned_gemms`; nothing has been changed then.
    """
    pairs = planned_gemms(model, sites, gemms)
    for site, gemm in pairs:
        if gemm.bias_O is not None and getattr(site.module, "bias", None) is None:
            raise ValueError(f"{site.name} has no bias, but a bias of {gemm.out_features} values is to be put into it")
    with torch.no_grad():
        for site, gemm in pairs:
            site.weight_OI.copy_(gemm.weight_q_OI.float() * gemm.scale_O[:, None])
            bias = getattr(site.module, "bias", None)
            if isinstance(bias, Tensor):
                bias.copy_(torch.zeros_like(bias) if gemm.bias_O is None else gemm.bias_O)
    use_quantized_inputs_(model, {gemm.name: gemm.input for _, gemm in pairs})
    model.eval()


def use_quantized_inputs_(model: nn.Module, inputs: Mapping[str, InputQuantization]) -> None:
    """Round the input of each named module to its levels, by a forward pre-hook.

    Raises:
        ValueError: no module of that name, or levels that `check_input` refuses; nothing has been changed then.
    """
    modules = dict(model.named_modules())
    for name, found in inputs.items():
        if name not in modules:
            raise ValueError(f"no module {name!r} in this {type(model).__name__}, so its input cannot be quantized")
        check_input(name, found)
    for name, found in inputs.items():
        modules[name].register_forward_pre_hook(FakeQuantizedInput(found))


def planned_gemms(
    model: nn.Module, sites: Sites, gemms: Mapping[str, QuantizedGemm]
) -> list[tuple[Gemm, QuantizedGemm]]:
    """Each quantized GEMM with its site, in model order, after checking that they fit together.

    Raises:
        ValueError: a name that is no GEMM of ``sites``, a shape that differs from the module's, or ``sites`` that were
            found in another model (a copy, or this one before its modules were replaced).
    """
    final = [sites.final] if sites.final is not None else []
    known = {site.name: site for site in (*sites.gemms, *sites.pooler, *final)}
    modules = dict(model.named_modules())
    for name, gemm in gemms.items():
        site = known.get(name)
        if site is None or gemm.name != name:
            found = f"{name!r}" if gemm.name == name else f"{name!r} holding the matrix of {gemm.name!r}"
            raise ValueError(
                f"expected names of this model's {len(known)} GEMMs ({', '.join(list(known)[:2])}, ...), found {found}"
            )
        if modules.get(name) is not site.module:
            raise ValueError(
                f"{name}: the sites belong to another model, or its modules were replaced since: "
                "call find_sites on this model, before any runtime is put into it"
            )
        if (gemm.out_features, gemm.in_features) != (site.out_features, site.in_features):
            raise ValueError(
                f"{name}: the module is {[site.out_features, site.in_features]} (out_features, in_features), "
                f"the quantized matrix {[gemm.out_features, gemm.in_features]}"
            )
    return [(site, gemms[name]) for name, site in known.items() if name in gemms]


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
