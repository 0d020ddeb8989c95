"""Items made when they are asked for: singly, ahead of a model's batches or between them, in one block of memory."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from squeezoo.eval import ahead as ahead_module
from squeezoo.eval.ahead import Ahead
from squeezoo.eval.data import batches, collate
from squeezoo.eval.files import DataError
from squeezoo.eval.image import best_classes
from squeezoo.eval.joined import Places, stacked
from squeezoo.eval.lazy_rows import LazyRows


class _Squares(LazyRows[int]):
    def __init__(self, count: int) -> None:
        self.count = count
        self.made: list[int] = []

    def __len__(self) -> int:
        return self.count

    def make(self, index: int) -> int:
        self.made.append(index)
        return index * index


@given(st.integers(0, 6), st.one_of(st.none(), st.integers(-8, 8)), st.one_of(st.none(), st.integers(-8, 8)))
def test_lazy_rows_are_a_sequence(count: int, start: int | None, stop: int | None) -> None:
    """Against the list of the same items: slices with any step, negative places, iteration, and what lies outside."""
    lazy, whole = _Squares(count), [i * i for i in range(count)]
    for step in (None, 2, -1):
        assert lazy[start:stop:step] == whole[start:stop:step]
    assert list(lazy) == whole
    assert [lazy[-i] for i in range(1, count + 1)] == whole[::-1]
    for outside in (count, -count - 1):
        with pytest.raises(IndexError, match=f"row {outside} of {count}"):
            lazy[outside]


def test_only_what_is_asked_for_is_made() -> None:
    lazy = _Squares(1000)
    assert (lazy[3], lazy[-1], lazy[4:6]) == (9, 999 * 999, [16, 25])
    assert lazy.made == [3, 999, 4, 5]


# rows of a batch side by side


def _fill(places: Places, order: Sequence[int]) -> list[torch.Tensor]:
    rows = []
    for index in order:
        row = places.take(index)
        assert row is not None
        rows.append(row.fill_(float(index)))
    return rows


def test_rows_side_by_side_are_joined_without_a_copy() -> None:
    """The batch is the block: same values as torch.stack, and a change of a row shows in it."""
    places = Places((2, 3))
    places.reserve([7, 4, 9, 1])
    rows = _fill(places, [7, 4, 9, 1])
    for part in (slice(None), slice(1, 3), slice(3, 4)):
        joined = stacked(rows[part])
        assert torch.equal(joined, torch.stack(rows[part]))
        assert joined.data_ptr() == rows[part][0].data_ptr()
    rows[2].fill_(-1)
    assert stacked(rows)[2].eq(-1).all()
    assert collate([{"pixel_values": row} for row in rows])["pixel_values"].data_ptr() == rows[0].data_ptr()


def test_all_other_rows_are_copied() -> None:
    """Another order, a gap, two blocks, one row changed to a new tensor, rows of no block and slices of one tensor."""
    places = Places((2,))
    places.reserve(range(4))
    rows = _fill(places, range(4))
    places.reserve([5])
    other = _fill(places, [5])
    plain = torch.arange(8.0).reshape(4, 2)
    for chosen in (rows[::-1], rows[::2], rows + other, [rows[0], rows[1] * 1], [rows[0], plain[1]], list(plain)):
        joined = stacked(chosen)
        assert torch.equal(joined, torch.stack(chosen))
        assert joined.data_ptr() not in [row.data_ptr() for row in chosen]


def test_a_place_is_handed_out_once() -> None:
    places = Places((2,))
    places.reserve([3, 5])
    assert places.take(3) is not None
    assert places.take(3) is None
    assert places.take(4) is None
    places.reserve([6])  # the next batch: what is still to be written of the last one keeps its place
    assert places.take(5) is not None
    nowhere = Places(None)
    nowhere.reserve([1])
    assert nowhere.take(1) is None


# ahead of and between batches


class _Recorded(LazyRows[dict[str, Any]]):
    """Items that remember where they were made; while ``closed`` is set none may be."""

    def __init__(self, count: int) -> None:
        self.count, self.closed = count, threading.Event()
        self.made: list[int] = []
        self.early: list[int] = []
        self.places = Places((1, 1))

    def __len__(self) -> int:
        return self.count

    def make(self, index: int) -> dict[str, Any]:
        (self.early if self.closed.is_set() else self.made).append(index)
        if index == 13:
            raise DataError("13 is broken")
        place = self.places.take(index)
        row = torch.empty(1, 1) if place is None else place
        return {"pixel_values": row.fill_(float(index)), "labels": index}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 40])
def test_batches_are_whole_in_order_and_never_copied(beside: bool, batch_size: int) -> None:
    """Each item is made once; between batches none is made at all, so that the model has all cores."""
    features = _Recorded(12)
    with Ahead(features, batch_size, workers=3, beside=beside) as ahead:
        seen: list[int] = []
        for indices, rows in batches(ahead, batch_size):
            if not beside:
                features.closed.set()
            batch = collate(rows)
            assert batch["labels"].tolist() == indices
            assert batch["pixel_values"].flatten().tolist() == indices
            assert batch["pixel_values"].data_ptr() == rows[0]["pixel_values"].data_ptr()
            seen += indices
            features.closed.clear()
    assert seen == list(range(12))
    assert sorted(features.made) == seen
    assert features.early == []


@pytest.mark.parametrize("beside", [True, False])
def test_errors_come_where_the_item_is_asked_for(beside: bool) -> None:
    """In any order of the items, and with items asked for out of order or twice."""
    order = random.Random(3).sample(range(30), 30)
    with Ahead(_Recorded(30), 4, order, workers=2, beside=beside) as ahead:
        assert ahead[order[20]]["labels"] == order[20]
        for index in order:
            if index == 13:
                with pytest.raises(DataError, match="13 is broken"):
                    _ = ahead[index]
            else:
                assert ahead[index]["labels"] == index
        assert ahead[order[0]]["labels"] == order[0]


@pytest.mark.parametrize(
    ("cores", "threads", "device", "workers", "beside"),
    [(2, 2, "cpu", 2, False), (2, 4, "cpu", 2, False), (4, 1, "cpu", 3, True), (4, 4, "cuda", 4, True),
     (64, 8, "cpu", 8, True)],
)  # fmt: skip
def test_who_decodes_when(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, device: str, workers: int, beside: bool
) -> None:
    """On the CPU the model's own threads count as taken; on a GPU none do."""
    monkeypatch.setattr(ahead_module, "cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with Ahead.of(_Recorded(3), 2, device) as ahead:
        assert (ahead._pool._max_workers, ahead.beside) == (workers, beside)


def test_cores_are_those_of_the_process() -> None:
    assert 1 <= ahead_module.cores() <= (os.cpu_count() or 1)


# the classes of a row


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=7, max_size=7), min_size=1, max_size=4))
def test_of_equal_scores_the_lower_class_comes_first(scores: list[list[float]]) -> None:
    """By Python's stable sort."""
    expected = [sorted(range(7), key=lambda i, row=row: -row[i])[:5] for row in scores]
    assert best_classes(torch.tensor(scores)) == expected


def test_best_classes_of_real_numbers() -> None:
    """Without equal scores: numpy's order; fewer classes than five are all of them."""
    scores_BC = torch.randn(20, 1000, generator=torch.Generator().manual_seed(1))
    assert best_classes(scores_BC) == (-scores_BC.numpy()).argsort(1)[:, :5].tolist()
    assert best_classes(torch.tensor([[1.0, 3.0, 2.0]])) == [[1, 2, 0]]
