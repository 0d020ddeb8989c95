"""Embedding tables as int8 with one scale per row: only the rows that are looked up become float.

    e_TD = q_RD[ids] * s_R[ids]

Legend: R rows (vocabulary), D width, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Int8Table:
    """One embedding table as integers.

    Args:
        name: full name of the module. q_RD: int8 [rows, width]. scale_R: float32 [rows], positive and finite.

    Raises:
        ValueError: a wrong type or shape, or a scale that is not positive and finite.
    """

    name: str
    q_RD: Tensor = field(repr=False)
    scale_R: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        q_RD, scale_R = self.q_RD, self.scale_R
        if q_RD.dtype != torch.int8 or q_RD.ndim != 2:
            raise ValueError(f"{self.name}: expected int8 [rows, width], found {q_RD.dtype} {list(q_RD.shape)}")
        if scale_R.dtype != torch.float32 or scale_R.shape != q_RD.shape[:1]:
            found = f"{scale_R.dtype} {list(scale_R.shape)}"
            raise ValueError(f"{self.name}: expected scales float32 [{q_RD.shape[0]}], found {found}")
        if not bool(((scale_R > 0) & scale_R.isfinite()).all()):
            raise ValueError(f"{self.name}: expected positive, finite scales, one per row")

    def dequantized(self) -> Tensor:
        """The whole table, float32 [rows, width]."""
        return self.q_RD.float() * self.scale_R[:, None]


class Int8Embedding(nn.Module):
    """In the place of an ``nn.Embedding``, for inference: a quarter of its memory. It moves with ``model.to(device)``.

    ``weight`` gives the whole table as float32, made anew each time: for code that asks for its type or shape.
    """

    q_RD: Tensor
    scale_R: Tensor

    def __init__(self, table: Int8Table) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.q_RD.shape
        self.register_buffer("q_RD", table.q_RD)
        self.register_buffer("scale_R", table.scale_R)

    @property
    def weight(self) -> Tensor:
        return self.q_RD.float() * self.scale_R[:, None]

    def forward(self, ids: Tensor) -> Tensor:
        """Integers [...] → float32 [..., width]."""
        return F.embedding(ids, self.q_RD).float() * F.embedding(ids, self.scale_R[:, None])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        raise RuntimeError(
            f"{prefix.rstrip('.')} is an int8 runtime module, so a state dict of this model would not load anywhere "
            "else: keep the checkpoint that it was loaded from"
        )

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int8 per row"


def use_int8_embeddings_(model: nn.Module, tables: Mapping[str, Int8Table]) -> tuple[str, ...]:
    """Replace embedding tables by int8 ones in place, where that is exact and saves memory; returns their names.

    A table whose weight another module uses too (a tied final projection) must stay float for that module and is left
    alone, as are subclasses of ``nn.Embedding``, which may compute more than a lookup.

    Raises:
        ValueError: no such module, or a table of another shape; nothing has been changed then.
    """
    modules = dict(model.named_modules())
    for name, table in tables.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or weight.shape != table.q_RD.shape:
            found = "nothing" if weight is None else list(weight.shape)
            raise ValueError(f"expected an embedding table {list(table.q_RD.shape)} at {name!r}, found {found}")
    users: dict[int, int] = {}
    for module in modules.values():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    replaced = []
    for name, table in tables.items():
        module = modules[name]
        if type(module) is not nn.Embedding or users[id(module.weight)] > 1 or module.max_norm is not None:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Int8Embedding(table).eval())
        replaced.append(name)
    return tuple(replaced)
