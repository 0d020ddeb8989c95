"""Plots: the front is the front, the bytes repeat, the files are whole, and a card shows those that lie beside it."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from card_costs import search
from hypothesis import given
from hypothesis import strategies as st
from squeezoo.zoo_cards import plots as module
from squeezoo.zoo_cards.card import Card, ScoreRow
from squeezoo.zoo_cards.hub import build_index
from squeezoo.zoo_cards.plots import (
    EXPECTED,
    LATENCY,
    PLOTS,
    SIZE,
    Curve,
    Point,
    draw_expected,
    draw_scores,
    pareto_front,
    plot_names,
    write_plot,
)
from squeezoo.zoo_cards.plots_card import card_plots, write_plots
from squeezoo.zoo_cards.publish import publish
from squeezoo.zoo_cards.render import render_card, write_card

PNG = b"\x89PNG\r\n\x1a\n"
POINTS = [Point("dense", 10.0, 90.0, (9.0, 11.0), dense=True), Point("a", 5.0, 89.0, (4.0, 5.5)), Point("b", 4.0, 80.0)]
LABELS = {"x_label": "ms", "y_label": "F1, %", "title": "t"}


def size_of(png: bytes) -> tuple[int, ...]:
    """(width, height) as the PNG's own header says (PNG specification, IHDR)."""
    assert png.startswith(PNG)
    return struct.unpack(">II", png[16:24])


def chunks(png: bytes) -> set[bytes]:
    found, at = set(), len(PNG)
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        found.add(kind)
        at += 12 + length
    return found


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans()), max_size=12), st.booleans()
)  # fmt: skip
def test_the_front_holds_what_nothing_beats(rows: list[tuple[int, int, bool]], higher: bool) -> None:
    """Source: the definition, over all pairs: no complete point is at least as good in both and better in one."""
    points = [Point(str(i), x, y, complete=complete) for i, (x, y, complete) in enumerate(rows)]
    sign = 1 if higher else -1

    def beaten(p: Point) -> bool:
        return any(q.complete and q.x <= p.x and sign * q.y >= sign * p.y and (q.x, q.y) != (p.x, p.y) for q in points)

    front = pareto_front(points, higher)
    assert {(p.x, p.y) for p in front} == {(p.x, p.y) for p in points if p.complete and not beaten(p)}
    assert len({(p.x, p.y) for p in front}) == len(front)
    assert [p.x for p in front] == sorted(p.x for p in front)


def test_a_sample_is_in_no_front() -> None:
    """Source: the rule for `--limit`: shown, never ranked."""
    sample = Point("s", 1.0, 99.0, complete=False)
    assert [p.name for p in pareto_front([*POINTS, sample])] == ["b", "a", "dense"]


def test_the_same_points_give_the_same_bytes_whatever_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Source: byte equality; PNG chunks: no text, so neither date nor version of the software."""
    import matplotlib

    first = draw_scores(POINTS, **LABELS)
    with matplotlib.rc_context({"font.size": 30, "figure.facecolor": "red", "savefig.dpi": 20}):
        assert draw_scores(POINTS, **LABELS) == first
        assert matplotlib.rcParams["font.size"] == 30  # the user's settings are as they were
    assert not {b"tEXt", b"iTXt", b"zTXt", b"tIME"} & chunks(first)
    assert size_of(first)[0] == 960
    assert draw_scores(POINTS[:2], **LABELS) != first


def test_expected_performance_is_drawn() -> None:
    """Source: a picture of one curve has the axis of time that one of two has not, so they differ."""
    curves = [Curve("a", [0.8, 0.85], [0.02, 0.01], 10.0), Curve("b", [0.7, 0.8], [0.02, 0.01])]
    one, two = (draw_expected(part, y_label="F1", title="t") for part in (curves[:1], curves))
    assert size_of(one)[0] == size_of(two)[0] == 960
    assert one != two
    assert one != draw_expected([Curve("a", [0.8, 0.85], [0.02, 0.01])], y_label="F1", title="t")


def test_nothing_to_draw_is_an_error() -> None:
    """Source: the contract."""
    with pytest.raises(ValueError, match="at least one point"):
        draw_scores([], **LABELS)
    with pytest.raises(ValueError, match="at least one search"):
        draw_expected([], y_label="F1", title="t")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Source: the house's rule for optional libraries."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'squeezoo\[eval\]'"):
        draw_scores(POINTS, **LABELS)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source: an atomic replacement, as of results.json."""
    path = write_plot(b"old", tmp_path / "plots" / "p.png")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_plot(b"new", path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["p.png"]


def test_a_card_gets_the_plots_that_it_has_numbers_for(
    new_card: Callable[..., Card], new_score: Callable, tmp_path: Path
) -> None:
    """Source: the records: scores and sizes are always there, speeds and a search are not."""
    assert set(card_plots(new_card())) == {LATENCY, SIZE}
    assert set(card_plots(new_card(speeds=(), search=search()))) == {SIZE, EXPECTED}
    assert card_plots(new_card(scores=())) == {}
    card = new_card(search=search())
    assert {path.name for path in write_plots(card, tmp_path)} == set(PLOTS)
    assert plot_names(tmp_path) == list(PLOTS)
    write_plots(new_card(speeds=()), tmp_path)  # what has no numbers any more goes
    assert plot_names(tmp_path) == [SIZE]
    rows = (ScoreRow("dense", new_score(0.9, complete=False)), ScoreRow("compressed", new_score(0.8, complete=False)))
    assert card_plots(new_card(scores=rows))[SIZE] != card_plots(new_card())[SIZE]


def test_the_card_shows_its_plots_and_they_are_published(new_card: Callable[..., Card], tmp_path: Path) -> None:
    """Source: the Markdown of pictures; the published folder holds the same bytes, and the index their SHA-256."""
    card = new_card(weights="reproducible")
    assert "## Plots" not in render_card(card)
    write_plots(card, tmp_path / "run")
    path = write_card(card, tmp_path / "run")
    text = path.read_text(encoding="utf-8")
    assert f"![{PLOTS[LATENCY]}](plots/{LATENCY})" in text
    target = publish(tmp_path / "run", tmp_path / "zoo")
    assert (target / "plots" / SIZE).read_bytes() == (tmp_path / "run" / "plots" / SIZE).read_bytes()
    assert (target / "README.md").read_text(encoding="utf-8") == text
    (entry,) = build_index(tmp_path / "zoo" / "cards")
    assert {f"plots/{LATENCY}", f"plots/{SIZE}"} <= set(entry["files"])
