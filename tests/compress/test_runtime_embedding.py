"""Embedding tables as int8: exact rows, and nothing replaced that another module still needs."""

from __future__ import annotations

import copy

import pytest
import torch
from squeezoo.compress.runtime.embedding import Int8Embedding, Int8Table, use_int8_embeddings_
from torch import Tensor, nn


def table(name: str = "words", rows: int = 11, width: int = 6) -> Int8Table:
    generator = torch.Generator().manual_seed(0)
    q_RD = torch.randint(-127, 128, (rows, width), generator=generator).to(torch.int8)
    return Int8Table(name, q_RD, torch.rand(rows, generator=generator) + 0.1)


class Words(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=0)
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


def test_rows_are_looked_up_and_dequantized() -> None:
    """Expected: the rows of q * scale, bit for bit, for ids of any shape; a quarter of the bytes and the scales."""
    found = table()
    module = Int8Embedding(found)
    for ids in (torch.tensor([[1, 10], [0, 1]]), torch.tensor(3), torch.empty(2, 0, dtype=torch.long)):
        assert torch.equal(module(ids), found.dequantized()[ids])
    assert torch.equal(module.weight, found.dequantized())
    assert module.weight.dtype == torch.float32
    held = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    assert held == 11 * 6 + 11 * 4
    assert torch.equal(copy.deepcopy(module)(torch.tensor([2])), module(torch.tensor([2])))
    with pytest.raises(RuntimeError, match="would not load anywhere"):
        module.state_dict()


def test_a_table_is_replaced_and_a_tied_one_is_not() -> None:
    """Expected: the same output as with the dequantized table; the tied final projection keeps its float matrix."""
    found = table()
    ids = torch.tensor([[1, 2, 10]])
    for tied in (False, True):
        model = Words(tied).eval()
        with torch.no_grad():
            model.words.weight.copy_(found.dequantized())
            expected = model(ids)
            replaced = use_int8_embeddings_(model, {"words": found})
            assert replaced == (() if tied else ("words",))
            assert torch.equal(model(ids), expected)


def test_subclasses_and_tables_that_renormalize_are_left_alone() -> None:
    """A subclass may add an offset to the ids (OPT's positions) or scale the rows (BART)."""

    class Shifted(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids + 2)

    for module in (Shifted(11, 6), nn.Embedding(11, 6, max_norm=1.0)):
        model = nn.ModuleDict({"words": module})
        assert use_int8_embeddings_(model, {"words": table()}) == ()
        assert model["words"] is module


def test_wrong_tables_are_refused() -> None:
    """Expected: an error that says what was expected and found, and an unchanged model."""
    model = Words()
    for wrong in ({"words": table(rows=10)}, {"nope": table()}, {"words": table(), "head": table(rows=3)}):
        with pytest.raises(ValueError, match="expected an embedding table"):
            use_int8_embeddings_(model, wrong)
        assert type(model.words) is nn.Embedding
    good = table()
    for q_RD, scale_R, message in (
        (good.q_RD.float(), good.scale_R, r"words: expected int8 \[rows, width\], found torch.float32 \[11, 6\]"),
        (good.q_RD, good.scale_R[:4], r"words: expected scales float32 \[11\], found torch.float32 \[4\]"),
        (good.q_RD, -good.scale_R, "words: expected positive, finite scales"),
        (good.q_RD, good.scale_R / 0, "words: expected positive, finite scales"),
    ):
        with pytest.raises(ValueError, match=message):
            Int8Table("words", q_RD, scale_R)
