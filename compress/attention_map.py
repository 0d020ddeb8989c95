"""The module that compresses one attention map, a submodule of the attention module that computes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attention import AttentionQuantizers, keep_probabilities, sparse_attention
from .masks import Pattern

ATTENTION_MAP = "attention_map"


class AttentionMapCompressor(nn.Module):
    """N:M selection of one attention map, and the quantizers of Q, K, P and V.

    The selection is off until ``active`` is set; the quantizers are called whenever they are there and decide for
    themselves (they are the identity until calibrated). ``active`` is saved in the state dict, as ``active_flag``.

    Args:
        pattern: N kept of M consecutive keys, None for quantizers alone. renormalize: see ``sparse_attention``.
        q, k, p, v: quantizer modules or None; that of P must map 0 to exactly 0.
        previous: what the door changed in the attention module, to be put back.
    """

    active_flag: Tensor

    def __init__(
        self,
        pattern: Pattern | None,
        renormalize: bool = False,
        *,
        q: nn.Module | None = None,
        k: nn.Module | None = None,
        p: nn.Module | None = None,
        v: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pattern = pattern
        self.renormalize = renormalize
        self.q, self.k, self.p, self.v = q, k, p, v
        self.previous: dict[str, Any] = {}
        self.kernel: nn.Module | None = None  # a fused one for inference (runtime/nm_attention.py); it may decline
        # The flag twice: as a buffer to be saved, and as a plain bool, for reading a buffer on a GPU waits for it.
        self.register_buffer("active_flag", torch.zeros((), dtype=torch.bool))
        self._active = False

    @property
    def active(self) -> bool:
        """Whether the map is pruned. Without a pattern it stays False."""
        return self._active and self.pattern is not None

    @active.setter
    def active(self, value: bool) -> None:
        self._active = bool(value)
        self.active_flag.fill_(self._active)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do: no active pattern, no quantizer."""
        return not self.active and all(module is None for module in (self.q, self.k, self.p, self.v))

    def forward(
        self,
        q_BHQD: Tensor,
        k_BGKD: Tensor,
        v_BGKE: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
        dropout_p: float = 0.0,
        first_key: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, H, Q, E] and the probabilities that multiplied V, as ``sparse_attention`` has them; None of them
        where a kernel ran."""
        if self.kernel is not None and self.active and not self.training:
            q, k, v = (x if f is None else f(x) for x, f in ((q_BHQD, self.q), (k_BGKD, self.k), (v_BGKE, self.v)))
            if (fused := self.kernel(q, k, v, mask, scale, first_key)) is not None:
                return fused, None
        out, probs = sparse_attention(
            q_BHQD,
            k_BGKD,
            v_BGKE,
            pattern=self.pattern if self.active else None,
            mask=mask,
            scale=scale,
            dropout_p=dropout_p,
            training=self.training,
            renormalize=self.renormalize,
            quantizers=AttentionQuantizers(self.q, self.k, self.p, self.v),
            first_key=first_key,
        )
        assert probs is not None
        return out, probs

    def keep(self, p: Tensor) -> Tensor:
        """The kept part of a softmax's output, for doors that show only probabilities; all of it while not active."""
        return keep_probabilities(p, self.pattern, self.renormalize) if self.active and self.pattern else p

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "active_flag" in state_dict and not self.active_flag.is_meta:
            self._active = bool(self.active_flag)

    def extra_repr(self) -> str:
        return f"pattern={self.pattern}, renormalize={self.renormalize}, active={self.active}"


def attention_maps(model: nn.Module) -> Iterator[tuple[str, nn.Module, AttentionMapCompressor]]:
    """Name, attention module and compressor of every attached map, in model order."""
    for name, module in model.named_modules():
        compressor = module._modules.get(ATTENTION_MAP)
        if isinstance(compressor, AttentionMapCompressor):
            yield name, module, compressor


def activate_attention_(model: nn.Module, active: bool = True) -> None:
    """Switch the N:M selection of every attached map on or off; quantizers are left alone."""
    for _, _, compressor in attention_maps(model):
        compressor.active = active
