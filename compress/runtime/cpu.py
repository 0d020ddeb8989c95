"""The CPU runtime: puts int8 modules in the place of a model's quantized GEMMs, on native kernels or PyTorch's oneDNN.

Four things make it faster than one kernel per matrix: GEMMs that read the same tensor (Q, K, V) run as one and
quantize it once; the first FFN matrix applies the activation and emits the integers that the second one reads; nothing
is packed or converted at a call; and where the native kernels run, an encoder block with its attention, residuals and
norms is one call.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ...models.adapter import Gemm, Sites
from ..quantizers import InputQuantization
from . import native
from .inference_only import refuse_training_
from .int8_gemm import Activation, Int8Gemm
from .int8_linear import InferenceOnly, Int8Linear, Int8Slice, SharedInput
from .levels import Levels, to_levels
from .native.attention_route import route_attention_
from .native.fuse import fuse_blocks_
from .reference import QuantizedGemm, planned_gemms

# Roles that read the same tensor, in the order of the rows of their common GEMM.
_SHARING: tuple[tuple[str, ...], ...] = (("q", "k", "v"), ("cross_k", "cross_v"), ("ffn_gate", "ffn_up"))

# Activation modules by module and class name (libraries are not imported for this), exact classes only.
_ACTIVATIONS: dict[tuple[str, str], Activation] = {
    ("torch.nn.modules.activation", "ReLU"): "relu",
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
    ("timm.layers.activations", "GELU"): "gelu",
    ("timm.layers.activations", "GELUTanh"): "gelu_tanh",
}


@dataclass(frozen=True)
class Int8Report:
    """What was put in: names of the GEMMs that run alone, that run as one with others, and that are fused with the
    activation between them (pairs of first and second); and of the blocks that run as one native call."""

    single: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...]
    fused: tuple[tuple[str, str], ...]
    blocks: tuple[str, ...] = ()


@cache
def int8_supported() -> tuple[bool, str]:
    """Whether this machine runs the int8 modules, fast and exactly, and why (not). Tried by doing, once per process."""
    if not torch.backends.mkldnn.is_available():
        return False, "this build of PyTorch has no oneDNN (mkldnn)"
    vnni = _vnni()
    if not vnni:
        return (
            False,
            "the CPU has no int8 dot products (x86 AVX-512 VNNI, AVX-VNNI or AMX), so int8 would not be faster",
        )
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not hasattr(torch, "_int_mm"):
        return False, f"PyTorch {torch.__version__} has no operators onednn.qlinear_pointwise and _int_mm; 2.11 has"
    try:
        exact = _is_exact()
    except (RuntimeError, TypeError, AttributeError) as error:
        return False, f"PyTorch {torch.__version__}: the int8 operators fail: {str(error).splitlines()[0]}"
    if not exact:
        return False, f"PyTorch {torch.__version__}: the int8 operators do not add up exactly on this CPU"
    return True, f"oneDNN int8 with {vnni}"


def use_int8_(
    model: nn.Module,
    sites: Sites,
    gemms: Mapping[str, QuantizedGemm],
    fuse_blocks: bool = True,
    bfloat16_attention: bool = True,
) -> Int8Report:
    """Replace the named GEMM modules of ``model`` by int8 modules, in place, and leave it in evaluation mode.

    Names of modules stay (``...attention.self.query``), parameters go: the result is for inference on this CPU, gives
    no gradients, and refuses ``train()`` and ``state_dict()``. ``copy.deepcopy`` works. It agrees with
    :func:`use_reference_`: each GEMM has the exact integer sums and float rounding of 1e-6; but where an input of a
    later quantizer lies that near to a rounding boundary, it falls to the neighbouring level.

    Args:
        sites: of this very model, found before.
        gemms: by module name; block GEMMs and ``sites.final``, all or some of them.
        fuse_blocks: run whole encoder blocks as one native call, where native kernels and the adapter's form allow it.
        bfloat16_attention: attention rounds Q, K, V and P to bfloat16 where the CPU has AVX512_BF16, which doubles its
            speed (its output is rounded to int8 levels right after; scores and sums stay float32): in such blocks, and
            in other blocks of transformers models (`route_attention_`). False: exact in float32.

    Raises:
        ValueError: see :func:`planned_gemms`. Nothing has been changed then.
        RuntimeError: this machine cannot run it (see :func:`int8_supported`), or a module is not on the CPU.
    """
    pairs = planned_gemms(model, sites, gemms)
    if pairs:
        supported, reason = int8_supported()
        if not supported:
            raise RuntimeError(f"int8 cannot run here: {reason}; use_reference_ computes the same in float32")
        native.say_if_unavailable()
    for site, _ in pairs:
        if site.weight_OI.device.type not in ("cpu", "meta"):
            raise RuntimeError(f"{site.name} is on {site.weight_OI.device}: call model.cpu() before use_int8_")
    shared = _shared_inputs(pairs)
    fused = _fused_ffns(model, sites, pairs)
    modules: dict[str, nn.Module] = {}
    for group in shared:
        modules |= _slices(group)
    for ffn in fused:
        modules[ffn.up.name] = _linear(ffn.up, activation=ffn.activation, next_input=ffn.down.input)
        modules[ffn.activation_name] = nn.Identity()
        modules[ffn.down.name] = _linear(ffn.down, takes_levels=True)
    single = tuple(gemm for _, gemm in pairs if gemm.name not in modules)
    modules |= {gemm.name: _linear(gemm) for gemm in single}

    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    model.eval()
    refuse_training_(model, (InferenceOnly,))
    blocks = fuse_blocks_(model, sites, bfloat16_attention) if fuse_blocks and pairs else ()
    if bfloat16_attention and pairs and len(blocks) < len(sites.blocks):
        route_attention_(model)
    return Int8Report(
        single=tuple(gemm.name for gemm in single),
        shared=tuple(tuple(gemm.name for gemm in group) for group in shared),
        fused=tuple((ffn.up.name, ffn.down.name) for ffn in fused),
        blocks=blocks,
    )


def _linear(
    gemm: QuantizedGemm,
    activation: Activation | None = None,
    next_input: InputQuantization | None = None,
    takes_levels: bool = False,
) -> Int8Linear:
    return Int8Linear(
        Int8Gemm(gemm.weight_q_OI, gemm.scale_O, gemm.bias_O, gemm.input, activation, next_input, takes_levels)
    )


def _shared_inputs(pairs: Iterable[tuple[Gemm, QuantizedGemm]]) -> list[list[QuantizedGemm]]:
    """Groups of GEMMs that read one tensor with the same levels: siblings in the module tree with roles of one of
    `_SHARING`."""
    found: dict[tuple[str, tuple[str, ...]], list[tuple[str, QuantizedGemm]]] = {}
    for site, gemm in pairs:
        roles = next((roles for roles in _SHARING if site.role in roles), None)
        if roles is not None:
            found.setdefault((site.name.rpartition(".")[0], roles), []).append((site.role, gemm))
    groups = []
    for (_, roles), members in found.items():
        present = [role for role, _ in members]
        inputs = {(gemm.in_features, gemm.input) for _, gemm in members}
        if len(members) > 1 and len(set(present)) == len(present) and len(inputs) == 1:
            groups.append([gemm for _, gemm in sorted(members, key=lambda member: roles.index(member[0]))])
    return groups


def _slices(group: Iterable[QuantizedGemm]) -> dict[str, nn.Module]:
    """One GEMM with the rows of all of ``group``, as one module for each of them."""
    group = list(group)
    bias_O = None
    if any(gemm.bias_O is not None for gemm in group):
        bias_O = torch.cat([torch.zeros(g.out_features) if g.bias_O is None else g.bias_O for g in group])
    whole = Int8Gemm(
        torch.cat([gemm.weight_q_OI for gemm in group]),
        torch.cat([gemm.scale_O for gemm in group]),
        bias_O,
        group[0].input,
    )
    shared = SharedInput(whole, tuple(gemm.out_features for gemm in group))
    return {gemm.name: Int8Slice(shared, index) for index, gemm in enumerate(group)}


@dataclass(frozen=True)
class _Ffn:
    up: QuantizedGemm
    activation: Activation
    activation_name: str
    down: QuantizedGemm


def _fused_ffns(model: nn.Module, sites: Sites, pairs: Iterable[tuple[Gemm, QuantizedGemm]]) -> list[_Ffn]:
    """Blocks whose two FFN matrices are both replaced, with only a known activation between them. The levels of the
    second one's input must be known beforehand, so a dynamic input is not fused."""
    in_blocks: dict[int | None, list[tuple[Gemm, QuantizedGemm]]] = {}
    for site, gemm in pairs:
        if site.role.startswith("ffn_"):
            in_blocks.setdefault(site.block, []).append((site, gemm))
    fused = []
    for block in sites.blocks:
        ffn = {site.role: gemm for site, gemm in in_blocks.get(block.index, []) if _inside(site.name, block.name)}
        if block.activation is None or set(ffn) != {"ffn_up", "ffn_down"}:
            continue
        activation = _known_activation(model.get_submodule(block.activation))
        if activation is not None and ffn["ffn_down"].input.kind == "static":
            fused.append(_Ffn(ffn["ffn_up"], activation, block.activation, ffn["ffn_down"]))
    return fused


def _inside(name: str, block: str) -> bool:
    return name.startswith(f"{block}.")


def _known_activation(module: nn.Module) -> Activation | None:
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _ACTIVATIONS.get((type(module).__module__, type(module).__qualname__))


def _vnni() -> str:
    """Names of the int8 dot product instructions of this CPU that PyTorch reports, empty if none."""
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
    else:
        found = {"avx512_vnni": getattr(torch.cpu, "_is_vnni_supported", lambda: False)()}
    names = {"amx_int8": "AMX", "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI"}
    return ", ".join(label for flag, label in names.items() if found.get(flag))


def _is_exact() -> bool:
    """Both kernels against int64 arithmetic, on the largest sums, where instructions without VNNI saturate."""
    level_TI = torch.tensor([[127, 127], [-127, 127], [-127, -127], [-127, 126]]).repeat(9, 24)
    weight_OI = torch.tensor([[127, 127], [-127, 127], [1, -127], [-128, -128]]).repeat(7, 24)
    symmetric = InputQuantization("static", 8, 1.0, 0, -127, 127)
    asymmetric = InputQuantization("static", 8, 1.0, 127, 0, 255)
    results: list[Tensor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch 2.13 says once per process that quantize_per_tensor will go
        x_TI = level_TI.float()
        for found in (symmetric, asymmetric):
            gemm = Int8Gemm(weight_OI.to(torch.int8), torch.ones(weight_OI.shape[0]), None, found)
            levels = Levels.of(found, x_TI)
            results.append(gemm._run_plain(to_levels(x_TI, levels, signed=True), levels, None))
            results.append(gemm._run_packed(to_levels(x_TI, levels, signed=False), levels, None))
    expected_TO = level_TI @ weight_OI.t()
    return all(bool((y_TO == expected_TO).all()) for y_TO in results)
