"""Attention maps of the tiny models: what a plan says of them, sharper scores, and N of M written down slowly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from squeezoo.compress.attention import sparse_attention
from squeezoo.compress.attention_doors import attach_attention_
from squeezoo.compress.attention_map import activate_attention_
from squeezoo.models import adapter_for, find_sites
from tiny import make
from torch import Tensor, nn


@dataclass(frozen=True)
class Spec:
    """The attributes of the plan's record that attaching reads."""

    name: str
    sparsity: str | None = "2:4"
    renormalize: bool = False
    q: Any = None
    k: Any = None
    p: Any = None
    v: Any = None


def specs(model: nn.Module, sparsity: str | None = "2:4", **options: Any) -> list[Spec]:
    """One record for each attention map that the model's adapter declares."""
    return [Spec(site.name, sparsity, **options) for site in find_sites(model, adapter_for(model)).attention]


def make_sharp(name: str) -> nn.Module:
    """A tiny model whose attention matters: queries and keys 12 times as large, the other matrices 4 times."""
    model = make(name)
    with torch.no_grad():
        for gemm in find_sites(model, adapter_for(model)).gemms:
            gemm.weight_OI.mul_(12 if gemm.role in ("q", "k", "qkv", "cross_q", "cross_k") else 4)
    return model


def make_sparse(name: str, sparsity: str = "2:4", **options: Any) -> nn.Module:
    """A sharp tiny model with N:M active on all of its maps."""
    model = make_sharp(name)
    attach_attention_(model, specs(model, sparsity, **options))
    activate_attention_(model)
    return model


def slow_keep(p: Tensor, n: int, m: int) -> Tensor:
    """The n largest of each m along the last axis, by a stable sort (ALGORITHMS A.4), a ragged tail included."""
    padded = torch.nn.functional.pad(p.detach(), (0, -p.shape[-1] % m), value=-1.0).unflatten(-1, (-1, m))
    order = padded.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(padded, dtype=torch.bool).scatter(-1, order[..., :n], True)
    return keep.flatten(-2)[..., : p.shape[-1]]


class Level(nn.Module):
    """A quantizer for tests, with the interface of the real ones: rounds to sixteenths, straight through."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which
        self.scale = nn.Parameter(torch.tensor(1 / 16))
        self.active = True
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(tuple(x.shape))
        if not self.active:
            return x
        return x + ((x / self.scale).round() * self.scale - x.detach())


def level(_: Any, which: str) -> nn.Module:
    return Level(which)


def numbers(values):
    return torch.tensor(values, dtype=torch.float64)


def reference(q, k, v, pattern, mask=None, scale=None, renormalize=False, first_key=0):
    """C.1 and C.2 in float64, row by row in plain Python; mask: bool, True = valid. Returns out, P, keep."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    s = q @ k.transpose(-1, -2) * scale
    valid = torch.ones_like(s, dtype=torch.bool) if mask is None else mask.expand(s.shape)
    p, keep = torch.zeros_like(s), torch.zeros_like(s, dtype=torch.bool)
    for at in [(b, h, i) for b in range(s.shape[0]) for h in range(s.shape[1]) for i in range(s.shape[2])]:
        row, ok = s[at].tolist(), valid[at].tolist()
        if not any(ok):
            continue
        top = max(x for x, good in zip(row, ok) if good)
        e = [math.exp(x - top) if good else 0.0 for x, good in zip(row, ok)]
        p[at] = numbers(e) / sum(e)
        groups = {}
        for j, good in enumerate(ok):
            if good:
                groups.setdefault((j + first_key) // pattern.m, []).append(j)
        for members in groups.values():
            for j in sorted(members, key=lambda j: (-row[j], j))[: pattern.n]:
                keep[at][j] = True
    a = p * keep
    if renormalize:
        a = a / a.sum(-1, keepdim=True).clamp_min(1e-300)
    return a @ v, p, keep


def attended(q, k, v, g=None, **options):
    """Output, probabilities and, with g, the gradients of q, k, v."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, probs = sparse_attention(q, k, v, **options)
    grads = () if g is None else torch.autograd.grad(out, (q, k, v), g)
    return out.detach(), probs.detach(), *grads
