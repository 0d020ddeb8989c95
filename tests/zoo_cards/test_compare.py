"""Variants side by side: only what was measured in the same way shares a column, samples are not ranked."""

from __future__ import annotations

import base64
import html.parser
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from card_costs import STORAGE, energy, resources, search
from squeezoo.eval.task import Score
from squeezoo.zoo_cards.card import Card, ScoreRow
from squeezoo.zoo_cards.compare import CompareError, compare
from squeezoo.zoo_cards.compare_grids import grids
from squeezoo.zoo_cards.compare_render import to_html, to_markdown, to_text, write_comparison
from squeezoo.zoo_cards.datasets import describe_task
from squeezoo.zoo_cards.hub import ZooError
from squeezoo.zoo_cards.plots import EXPECTED, LATENCY, SIZE
from squeezoo.zoo_cards.plots_compare import comparison_plots
from squeezoo.zoo_cards.resources import EnergyRow

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path, new_card: Callable[..., Card], new_score: Callable[..., Score]) -> Save:
    """``save(recipe, value, dense=0.9, **changes)``: the folder of a card of this recipe; changes of the scores, or of
    the card (``card=...``)."""

    def make(recipe: str, value: float, dense: float = 0.9, folder: str = "", card: Any = None, **score: Any) -> Path:
        rows = (ScoreRow("dense", new_score(dense, **score)), ScoreRow("compressed", new_score(value, **score)))
        base = new_card()
        made = new_card(
            name=f"minilm-l6.sst2.{recipe}", recipe=replace(base.recipe, name=recipe),
            **{"scores": rows, "data": (describe_task(rows[0].score.task),), **(card or {})},
        )  # fmt: skip
        made.save(tmp_path / (folder or recipe))
        return tmp_path / (folder or recipe)

    return make


def test_variants_are_ranked_against_their_dense_model(save: Save, new_speed: Callable) -> None:
    """Source: by hand: 91 % is one point above 90 %; 31.9 of 91.6 MB; 120 / 52 is 2.307, cut to 2.30."""
    fast = {"speeds": (new_speed(120.0, 52.0), new_speed(14.0, 7.0, batch=1))}
    found = compare([save("asp-2-4", 0.89), save("q8bert", 0.91, card=fast)])
    assert [(row.name, row.rank) for row in found.rows] == [("dense", None), ("q8bert", 1), ("asp-2-4", 2)]
    text = to_markdown(found)
    assert "| variant | rank | glue/sst2 dev: accuracy (872 rows) | difference |" in text
    assert "| dense | - | 90.00 % | - |" in text
    assert "| q8bert | 1 | 91.00 % | +1.00 points |" in text
    assert "| asp-2-4 | 2 | 89.00 % | -1.00 points |" in text
    assert "| q8bert | 2:4 int8 | 31.9 MB | 2.87x | 6.64 MB | 0.3125 | 22,713,986 | 17,405,570 (76.6%) |" in text
    assert "| q8bert | 52.0 ms, 2.30x (2.19 to 2.42) | 7.00 ms, 2.00x (1.90 to 2.10) |" in text
    assert "Speed, against float32, Test CPU (2 threads)" in text


def test_lower_is_better_ranks_the_other_way_and_equals_share_a_rank(save: Save) -> None:
    """Source: perplexity 12 beats 13; two of 12 are both first, the next is third."""
    ppl = {"task": "wikitext2/token", "metric": "perplexity", "higher_is_better": False, "dense": 11.0}
    folders = [save("a", 13.0, **ppl), save("b", 12.0, **ppl), save("c", 12.0, **ppl)]
    found = compare(folders)
    assert [(row.name, row.rank) for row in found.variants] == [("b", 1), ("c", 1), ("a", 3)]
    assert "lower is better" in to_markdown(found)


def test_samples_are_shown_and_never_ranked(save: Save) -> None:
    """Source: the rule for `--limit`: two samples of the same rows may stand in one column, without a rank."""
    sample = {"samples": 100, "complete": False}
    found = compare([save("a", 0.99, **sample), save("b", 0.5, **sample)])
    assert [row.rank for row in found.variants] == [None, None]
    text = to_markdown(found)
    assert "accuracy (100 rows, sample)" in text
    assert "| a | - | 99.00 % (sample) | +9.00 points |" in text
    assert "not ranked" in text
    assert "Ranks go by" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 100, "complete": False}, "samples 872 and 100, complete True and False"),
        ({"split": "train"}, "split dev and train"),
        ({"task_version": 2}, "task_version 1 and 2"),
        ({"settings": {"max_length": 64}}, "max_length 128 and 64"),
        ({"task": "glue/mrpc"}, "no score is common to all of them"),
    ],
)
def test_other_conditions_are_refused_unless_marked(save: Save, changes: dict[str, Any], message: str) -> None:
    """Source: `card.conditions`: what must be equal before two scores may stand side by side."""
    folders = [save("a", 0.89), save("b", 0.95, **changes)]
    with pytest.raises(CompareError, match=message):
        compare(folders)
    found = compare(folders, mixed=True)
    grid = grids(found)["Scores"]
    assert len(grid.header) == 2 + 2 * 2  # a column of its own for each condition
    for row in grid.rows:
        if row[0] in ("a", "b"):
            assert list(row[2:]).count("-") == 2  # and nobody stands in the other's column
    assert [row.rank for row in found.variants] == [None, None]
    assert "**Marked: columns were measured in different ways**" in to_markdown(found)
    assert "<strong>Marked: columns were measured in different ways</strong>" in to_html(found)
    assert "Marked: columns" in to_text(found)


def test_other_models_are_refused_unless_marked(save: Save, new_card: Callable[..., Card]) -> None:
    """Source: the question that a comparison answers: variants of one model."""
    other = {"base": replace(new_card().base, hub_id="google-bert/bert-base-uncased")}
    folders = [save("a", 0.89), save("b", 0.88, card=other)]
    with pytest.raises(CompareError, match=r"variants of one model are compared, found .* and google-bert"):
        compare(folders)
    assert "**Marked: different base models**" in to_markdown(compare(folders, mixed=True))


def test_each_variant_is_held_against_its_own_dense_model(save: Save) -> None:
    """Source: dense models of 90 % and 92 %: 91 % is one point above the one and one below the other."""
    found = compare([save("a", 0.91), save("b", 0.91, dense=0.92)])
    assert [row.name for row in found.rows] == ["dense of a", "dense of b", "a", "b"]
    text = to_markdown(found)
    assert "| a | 1 | 91.00 % | +1.00 points |" in text
    assert "| b | 1 | 91.00 % | -1.00 points |" in text
    assert "different dense models" in text


def test_rows_of_one_recipe_are_told_apart(save: Save) -> None:
    """Source: two seeds of one recipe, told apart by their folders; the same folder twice is an error."""
    one, two = save("a", 0.91, folder="seed-0"), save("a", 0.90, folder="seed-1")
    assert [row.name for row in compare([one, two]).variants] == ["seed-0", "seed-1"]
    with pytest.raises(CompareError, match="the same card stands twice"):
        compare([one, one])


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    """Source: the house's rule for errors."""
    with pytest.raises(CompareError, match=r"has no results.json: measure it first with `squeezoo card"):
        compare([tmp_path])
    with pytest.raises(ZooError, match="the zoo has no model"):
        compare(["no-such-model"])
    with pytest.raises(CompareError, match="at least one folder"):
        compare([])


def test_published_cards_are_compared_by_name() -> None:
    """Source: the committed zoo: a card without weights is enough."""
    found = compare(["minilm-l6.sst2.gpusq-gemm-int8"])
    assert [row.name for row in found.rows] == ["dense", "gpusq-gemm-int8"]
    with pytest.raises(CompareError, match="no score is common"):
        compare(["minilm-l6.sst2.gpusq-gemm-int8", "minilm-l6.mrpc.gpusq-gemm-int8"])


def test_costs_and_energy(save: Save) -> None:
    """Source: the records' numbers; what one card lacks is "not measured" beside the other, never 0."""
    rows = (*resources().energy, EnergyRow("compressed", "training, all stages", None, energy(3.6e6)))
    full = {"resources": replace(resources(), energy=rows), "search": search(), "storage": STORAGE}
    text = to_markdown(compare([save("b", 0.90), save("a", 0.91, card=full)]))
    assert "| dense | 3 s | 1.5 s | 91 MB | 500 MB (batch 8) | 400 (batch 4, 128 + 32) | - | - |" in text
    assert "| a | 1.5 s | 0.8 s | 48 MB | 420 MB (batch 8) | 500 (batch 4, 128 + 32) | 3.3 h | best of 3" in text
    assert "| b | not measured | not measured | not measured | not measured | not measured | 3.3 h | not mea" in text
    assert "| a | training, all stages | - | 100 s | cpu 3.6e+04 | not measured | 1.59 | 684 | PUE 1.59, 0.43" in text
    assert "| a | inference, batch 8 | 800 | 100 s | not measured | not measured | not measured | not meas" in text
    assert "| dense | inference, batch 8 | 800 | 100 s | cpu 20 | 2.5 | 0.000883 | 0.38 |" in text
    text = to_markdown(compare([save("c", 0.91), save("b", 0.90)]))
    assert "## Energy" not in text
    assert "Not measured for any of them: first load, warm load" in text


class Tags(html.parser.HTMLParser):
    """Every opened tag is closed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_escaped_and_needs_nothing_else(save: Save, new_card: Callable[..., Card]) -> None:
    """Source: Python's HTML parser; a model named like a script is text, and pictures are data in the page."""
    evil = {"base": replace(new_card().base, name="<script>alert('&')</script>", hub_id=None)}
    found = compare([save("a", 0.91, card=evil), save("b", 0.90, card=evil)])
    plots = comparison_plots(found)
    assert set(plots) == {LATENCY, SIZE}
    page = to_html(found, plots)
    parser = Tags()
    parser.feed(page)
    assert parser.open == []
    assert "<script" not in page
    assert "Variants of <script>alert('&')</script>" in parser.text
    assert len(parser.sources) == 2
    for source in parser.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) in plots.values()
    assert not re.search(r"https?:|@import|url\(", page)


def test_documents_are_written_with_their_plots(save: Save, tmp_path: Path) -> None:
    """Source: the files on disk: Markdown refers to pictures that lie there, HTML to none, text is plain."""
    found = compare([save("a", 0.91, card={"search": search()}), save("b", 0.90)])
    files = write_comparison(found, tmp_path / "out" / "table.md", "markdown", plots=True)
    text = files[-1].read_text(encoding="utf-8")
    assert {path.name for path in files[:-1]} == {LATENCY, SIZE, EXPECTED}
    for place in re.findall(r"\]\((.+?)\)", text):
        assert (tmp_path / "out" / place).read_bytes().startswith(b"\x89PNG")
    (page,) = write_comparison(found, tmp_path / "page.html", "html", plots=True)
    assert page.read_text(encoding="utf-8").count("data:image/png") == 3
    (plain,) = write_comparison(found, tmp_path / "table.txt", "text")
    assert "\x1b" not in plain.read_text(encoding="utf-8")
    assert comparison_plots(found) == comparison_plots(found)


def test_json_holds_the_numbers(save: Save) -> None:
    """Source: the fixture's scores."""
    data = json.loads(json.dumps(compare([save("a", 0.91), save("b", 0.90)]).to_dict()))
    assert [(row["name"], row["rank"], row["scores"][0]["value"]) for row in data["rows"]] == [
        ("dense", None, 0.9), ("a", 1, 0.91), ("b", 2, 0.9),
    ]  # fmt: skip
    assert [(c["task"], c["metric"], c["samples"], c["complete"]) for c in data["columns"]] == [
        ("glue/sst2", "accuracy", 872, True)
    ]
    assert [row["values"] for row in data["rows"]] == [[0.9], [0.91], [0.9]]
    assert [row["differences"] for row in data["rows"]] == [[None], [pytest.approx(0.01)], [0.0]]
    assert [row["bytes"] for row in data["rows"]] == [91_600_000, 31_900_000, 31_900_000]


def test_json_tells_a_missing_value_from_zero(save: Save) -> None:
    """Source: the rule that unknown is null: two variants on different samples, marked."""
    a, b = save("a", 0.91), save("b", 0.90, samples=100, complete=False)
    data = compare([a, b], mixed=True).to_dict()
    rows = {row["name"]: row for row in data["rows"]}
    assert rows["a"]["values"] == [0.91, None]
    assert rows["b"]["values"] == [None, 0.90]
    assert rows["b"]["differences"] == [None, pytest.approx(0.0)]
    assert [column["complete"] for column in data["columns"]] == [True, False]
    assert data["mixed"] is True
