"""The CUDA runtime: puts 2:4 and integer modules in the place of a model's GEMMs, on PyTorch's cuSPARSELt operators.

As on the CPU, GEMMs that read the same tensor (Q, K, V) run as one and round it once, and the first FFN matrix applies
the activation and emits the integers that the second one reads. LayerNorm, residual and rounding are one kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...models.adapter import Gemm, Sites
from .choice import EVER, Choice
from .cpu import _fused_ffns, _shared_inputs
from .cuda_linear import CudaGemm
from .cuda_modules import CudaFfn, CudaLinear, CudaSlice, TracedInput, runtime_modules
from .cuda_source import INT8, CudaOptions, FloatGemm
from .cuda_support import CUDA_BACKENDS, CudaBackend, CudaError, cuda_capability
from .cuda_waiting import use_levels_norms_
from .inference_only import refuse_training_
from .int8_linear import InferenceOnly
from .nonfinite import NonFinite, show_nonfinite_
from .reference import QuantizedGemm, planned_gemms


@dataclass(frozen=True)
class CudaReport:
    """What was put in: GEMMs that run alone, as one with others, fused with the activation between them (pairs), how
    many LayerNorms write levels, and how many GEMMs prefer each kernel."""

    single: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...]
    fused: tuple[tuple[str, str], ...]
    norms: int
    kernels: dict[str, int]


def use_cuda_(
    model: nn.Module,
    sites: Sites,
    gemms: Mapping[str, QuantizedGemm],
    *,
    sparse: Collection[str] = (),
    backend: CudaBackend | None = None,
    options: CudaOptions | None = None,
) -> CudaReport:
    """Replace GEMM modules of ``model``, in place, move it to the device and leave it in evaluation mode.

    All other floating point parameters and buffers are cast to ``options.dtype``. Names of modules stay, parameters of
    the GEMMs go: the result is for inference, gives no gradients and refuses ``train()`` and ``state_dict()``. It
    agrees with :func:`use_reference_` but for the rounding of 16-bit results, and where that moves an input over a
    rounding boundary; exact integer sums. Where the input of any GEMM holds NaN or infinity, the results are NaN.

    Args:
        model: in host memory, with its float weights where ``sparse`` names them.
        sites: of this very model, found before.
        gemms: quantized GEMMs by module name.
        sparse: names of further GEMMs, whose float weights are pruned.
        backend: the kernel of every GEMM that can run it; None: the preferred one of each, until a selection sets
            ``choose``.

    Raises:
        CudaError: no CUDA, a device below capability 8.0, or ``backend`` runs for none of the GEMMs.
        ValueError: see :func:`planned_gemms`, and names of ``sparse`` that are none. Nothing has been changed then.
    """
    options = options or CudaOptions()
    if torch.device(options.device).type == "cuda":
        cuda_capability(options.device)
    if backend is not None and backend not in CUDA_BACKENDS:
        raise CudaError(f"expected a kernel of {', '.join(CUDA_BACKENDS)}, found {backend!r}")
    seen = NonFinite(options.device)
    options = replace(options, allow_fp8=options.allow_fp8 or backend == "sparse_fp8", seen=seen)
    pairs = planned_gemms(model, sites, gemms)
    floats = _float_gemms(sites, sparse, gemms)
    for site in [site for site, _ in pairs] + [site for site, _ in floats]:
        if site.weight_OI.device.type not in ("cpu", "meta"):
            raise CudaError(f"{site.name} is on {site.weight_OI.device}: call model.cpu() before use_cuda_")
    shared, fused = _shared_inputs(pairs), _fused_ffns(model, sites, pairs)
    modules: dict[str, nn.Module] = {}
    for group in shared:
        modules |= _slices(group, options)
    for ffn in fused:
        up = CudaGemm(ffn.up, options, activation=ffn.activation, next_input=ffn.down.input)
        down = CudaGemm(ffn.down, options, takes_levels=True)
        modules[ffn.up.name] = CudaLinear(up, CudaFfn(up, down))
        modules[ffn.activation_name] = nn.Identity()
        modules[ffn.down.name] = CudaLinear(down, None)
    single: list[QuantizedGemm | FloatGemm] = [gemm for _, gemm in pairs if gemm.name not in modules]
    single += [gemm for _, gemm in floats]
    for gemm in single:
        found = CudaGemm(gemm, options)
        modules[gemm.name] = CudaLinear(found, found)
    if backend is not None:
        _force_(modules.values(), backend)

    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    _cast_(model, options)
    model.register_forward_pre_hook(CastInputs(options.dtype), with_kwargs=True)
    norms = use_levels_norms_(model, seen) if any(_first(module) in INT8 for module in runtime_modules(model)) else 0
    show_nonfinite_(model, seen)
    model.eval()
    refuse_training_(model, (InferenceOnly,))
    counts: dict[str, int] = {}
    for runtime in runtime_modules(model):
        counts[_first(runtime)] = counts.get(_first(runtime), 0) + 1
        runtime.gemm.prepare_((_first(runtime),))
    return CudaReport(
        single=tuple(gemm.name for gemm in single),
        shared=tuple(tuple(gemm.name for gemm in group) for group in shared),
        fused=tuple((ffn.up.name, ffn.down.name) for ffn in fused),
        norms=norms,
        kernels=counts,
    )


@dataclass(frozen=True)
class CastInputs:
    """Forward pre-hook of the whole model: floating point inputs (pixels, waves, masks) in the model's dtype. The
    lowest numbers of a mask stay finite: a row of infinities would have no softmax."""

    dtype: torch.dtype

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        first, others = tuple(map(self._cast, args[:1])), tuple(map(self._cast_mask, args[1:]))
        cast = {name: (self._cast_mask if "mask" in name else self._cast)(value) for name, value in kwargs.items()}
        return (*first, *others), cast

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _cast_mask(self, value: Any) -> Any:
        cast = self._cast(value)
        return cast if cast is value else cast.clamp_min(torch.finfo(self.dtype).min)


def _first(module: CudaLinear | CudaSlice) -> str:
    return module.gemm.choose(1 << 10)


def _force_(modules: Collection[nn.Module], backend: CudaBackend) -> None:
    units = [unit for module in modules if isinstance(module, CudaLinear | CudaSlice) for unit in module.units()]
    able = [unit for unit in units if backend in unit.kernels()]
    if units and not able:
        raise CudaError(f"{backend} runs for none of the {len(units)} GEMMs here; they can run {units[0].kernels()}")
    for unit in able:
        unit.choose = Choice(((EVER, backend),))


def _cast_(model: nn.Module, options: CudaOptions) -> None:
    """What is left of the model to the dtype and the device; tied parameters stay one, and tables of int8 keep their
    scales in float32."""
    cast: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                if parameter not in cast:
                    there = parameter.data.to(options.device, options.dtype)
                    cast[parameter] = nn.Parameter(there, requires_grad=False)
                module._parameters[name] = cast[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name != "scale_R":
                module._buffers[name] = buffer.to(options.dtype)
    model.to(options.device)


def _float_gemms(
    sites: Sites, names: Collection[str], gemms: Mapping[str, QuantizedGemm]
) -> list[tuple[Gemm, FloatGemm]]:
    known = {site.name: site for site in (*sites.gemms, *sites.pooler, *([sites.final] if sites.final else []))}
    for name in names:
        if name not in known or name in gemms:
            what = "is quantized already" if name in gemms else "is no GEMM of this model"
            raise ValueError(f"expected names of GEMMs with pruned float weights, found {name!r}, which {what}")
    return [
        (known[name], FloatGemm(name, known[name].weight_OI.detach(), getattr(known[name].module, "bias", None)))
        for name in names
    ]


def _slices(group: list[QuantizedGemm], options: CudaOptions) -> dict[str, nn.Module]:
    """One GEMM with the rows of all of ``group``, as one module for each of them."""
    bias_O: Tensor | None = None
    if any(gemm.bias_O is not None for gemm in group):
        bias_O = torch.cat([torch.zeros(g.out_features) if g.bias_O is None else g.bias_O for g in group])
    whole = QuantizedGemm(
        "+".join(gemm.name for gemm in group),
        torch.cat([gemm.weight_q_OI for gemm in group]),
        torch.cat([gemm.scale_O for gemm in group]),
        group[0].input,
        bias_O,
    )
    shared = TracedInput(CudaGemm(whole, options), tuple(gemm.out_features for gemm in group))  # type: ignore[arg-type]
    return {gemm.name: CudaSlice(shared, index) for index, gemm in enumerate(group)}
