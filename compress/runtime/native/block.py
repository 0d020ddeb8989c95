"""A whole encoder block in one native call: QKV, attention, output, residual and norm, FFN, residual and norm.

It computes what the block's own forward computes on the int8 modules in it. Norms are float32, exact but for rounding.
So is the attention without ``bfloat16``; with it, Q, K, V and P have 8 significant bits (measured: the result is within
0.8 % of the largest |V| of the exact one). A later quantizer's input that lies near a rounding boundary may fall to the
neighbouring level. A map whose four factors have static levels is computed in their integers.

The module tree stays: the block's own forward is still there, and is what runs whenever a call is not the plain case.
"""

from __future__ import annotations

import inspect
from ctypes import addressof
from typing import Any

import torch
from torch import Tensor, nn

from ...attention_map import ATTENTION_MAP
from ...attention_transformers import IMPLEMENTATION
from ..int8_gemm import Int8Gemm
from ..levels import MapLevels, not_finite
from .attention_route import NATIVE_ATTENTION
from .kernels import c_map_levels, mask_record, norm_record
from .library import CBlock, CMapLevels, c_levels, load
from .map_levels import MapReader

_WITHOUT_EFFECT = ("use_cache", "return_dict")  # on an encoder block; some models pass them on
# Implementations of transformers that compute what the kernel computes; ours does, with or without quantizers.
_PLAIN_ATTENTION = ("sdpa", "eager", IMPLEMENTATION, NATIVE_ATTENTION)
_MOST_KEYS = 65_536  # 255 * 128 * 65,536 is the largest sum of a quantized map's row that an int32 holds


class FusedForward:
    """Stands in a block's instance attribute ``forward``.

    Args:
        block: the block. attention: the module in it that computes its map.
        gemms: QKV as one matrix (all of Q's heads, then K's, then V's), output projection, and the two of the FFN, of
            which the first emits the levels that the second takes. Inputs are static.
        norms: after or before the attention, after or before the FFN. norm_first: before.
        heads, head_width, scale: of the attention.
        mask: name of the forward's argument that holds the attention mask.
        bfloat16: the attention rounds Q, K, V and P to bfloat16 where the CPU multiplies such numbers; False: float32.

    ``kernels`` chooses by rows (tokens of the whole batch): pairs (largest number of rows, ``block`` or ``modules``),
    ascending, the last for all larger ones too; None: always ``block``.
    """

    def __init__(
        self,
        block: nn.Module,
        attention: nn.Module,
        gemms: tuple[Int8Gemm, Int8Gemm, Int8Gemm, Int8Gemm],
        norms: tuple[nn.LayerNorm, nn.LayerNorm],
        norm_first: bool,
        heads: int,
        head_width: int,
        scale: float,
        mask: str,
        bfloat16: bool = True,
    ) -> None:
        self.block, self.attention = block, attention
        self.gemms, self.norms, self.norm_first = gemms, norms, norm_first
        self.heads, self.head_width, self.scale = heads, head_width, scale
        self.mask = mask
        self.bfloat16 = bfloat16
        self.kernels: tuple[tuple[int, str], ...] | None = None
        self._prepare()

    def _prepare(self) -> None:
        self._names = tuple(inspect.signature(type(self.block).forward).parameters)[1:]
        self._width = self.gemms[0].in_features
        self._record: CBlock | None = None
        self._kept: list[Any] = []
        self._made_for: tuple[Any, ...] = ()
        self._reader = MapReader()
        inner = [module for module in self.block.modules() if module is not self.block]
        self._hooks = tuple(h for m in inner for h in (m._forward_hooks, m._forward_pre_hooks))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._record = None  # the rest when first called: the block may not be whole yet
        self._hooks = None  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return _untraced(self, args, kwargs)
        return self.run(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The fused result, or that of the block's own forward."""
        if self._hooks is None:
            self._prepare()
        x, mask, plain = self._arguments(args, kwargs)
        if plain and self._fits(x, mask) and self.kernel_for(x.shape[0] * x.shape[1]) == "block":
            return self.fused(x, mask)
        return self.own(args, kwargs)

    def kernel_for(self, rows: int) -> str:
        """``block`` or ``modules``."""
        if not self.kernels:
            return "block"
        return next((kernel for most, kernel in self.kernels if rows <= most), self.kernels[-1][1])

    def own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the class of the block computes, module by module."""
        return type(self.block).forward(self.block, *args, **kwargs)

    def fused(self, x_BLI: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, I] → [B, L, I]; ``mask`` broadcastable to [B, H, L, L].

        Raises:
            ValueError: NaN or infinity in the input, or come of it.
        """
        record = self._current_record()
        batch, length, _ = x_BLI.shape
        x_BLI = x_BLI.contiguous()
        expanded, of_mask = mask_record(mask, batch, self.heads, length, length)
        y_BLI = torch.empty(x_BLI.shape)
        finite = load().sq_block(
            addressof(record), x_BLI.data_ptr(), batch, length, addressof(of_mask), y_BLI.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        del expanded
        if not finite:
            raise ValueError(not_finite(x_BLI, f"the input of an int8 {type(self.block).__name__}"))
        return y_BLI

    def map_levels(self) -> MapLevels | None:
        """Those of a quantized attention map, None for a plain one."""
        compressor = self.attention._modules.get(ATTENTION_MAP)
        return None if compressor is None else self._reader.read(compressor)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, bool]:
        """Input, mask, and whether there is nothing else."""
        names = self._names
        x, mask = args[0] if args else kwargs.get(names[0]), None
        for name, value in (*zip(names[1:], args[1:]), *kwargs.items()):
            if value is None or value is False or name == names[0] or name in _WITHOUT_EFFECT:
                continue
            if name != self.mask:
                return x, None, False
            mask = value
        return x, mask, True

    def _fits(self, x: Any, mask: Any) -> bool:
        if type(x) is not Tensor or x.dtype is not torch.float32 or x.ndim != 3 or not x.is_cpu or not x.numel():
            return False
        batch, length, width = x.shape
        if width != self._width or any(self._hooks) or torch.is_autocast_enabled("cpu"):
            return False
        compressor = self.attention._modules.get(ATTENTION_MAP)
        if compressor is not None and (length > _MOST_KEYS or self._reader.read(compressor) is None):
            return False
        config = getattr(self.attention, "config", None)
        if getattr(config, "_attn_implementation", "sdpa") not in _PLAIN_ATTENTION:
            return False
        if mask is None:
            return True
        if type(mask) is not Tensor or mask.dtype not in (torch.bool, torch.float32) or not mask.is_cpu:
            return False
        fits = zip(mask.shape, (batch, self.heads, length, length))
        return mask.ndim == 4 and all(have in (1, want) for have, want in fits)

    def _current_record(self) -> CBlock:
        """The block as C sees it; made anew when a norm's weight has moved or a map's levels have changed."""
        affine = tuple(None if t is None else t.data_ptr() for n in self.norms for t in (n.weight, n.bias))
        of_map = self.map_levels()
        made_for = (affine, of_map, self.bfloat16)
        if self._record is None or made_for != self._made_for:
            qkv, out, up, down = (gemm.native_gemm() for gemm in self.gemms)
            levels = [c_levels(gemm.static_levels()) for gemm in self.gemms]
            norms = [norm_record(n.weight, n.bias, n.normalized_shape[0], n.eps) for n in self.norms]
            self._kept = [qkv, out, up, down]
            self._record = CBlock(
                qkv.record, out.record, up.record, down.record, *levels, *norms,
                self.heads, self.head_width, self.scale, int(self.norm_first), int(self.bfloat16),
                int(of_map is not None), CMapLevels() if of_map is None else c_map_levels(of_map),
            )  # fmt: skip
            self._made_for = made_for
        return self._record


@torch.compiler.disable
def _untraced(forward: FusedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call under ``torch.compile``, which cannot follow addresses: it breaks the graph here."""
    return forward.run(args, kwargs)
