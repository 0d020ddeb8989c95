"""The model card: Hugging Face reads it back, tables say what the card says, and slower is called slower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from rich.console import Console
from squeezoo.eval.speed import Speed
from squeezoo.eval.task import Score
from squeezoo.zoo_cards.card import Card, ScoreRow
from squeezoo.zoo_cards.datasets import describe_task
from squeezoo.zoo_cards.render import render_card, render_comparison, render_table, render_terminal, write_card
from squeezoo.zoo_cards.tables import Grid, Measured

NewCard = Callable[..., Card]
NewScore = Callable[..., Score]
NewSpeed = Callable[..., Speed]


def test_huggingface_reads_the_metadata_back(card: Card) -> None:
    """Source: huggingface_hub's own parser of model cards."""
    parsed = ModelCard(render_card(card))  # raises on a malformed model-index
    data: Any = parsed.data
    assert (data.library_name, data.license, data.pipeline_tag) == ("squeezoo", "apache-2.0", "text-classification")
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert data.get("base_model_relation") == "quantized"
    assert data.datasets == ["nyu-mll/glue"]
    assert data.metrics == ["accuracy"]
    assert data.tags == ["squeezoo", "gpusq-gemm-int8", "2-4-sparse", "int8"]
    assert data.model_name == card.name
    (result,) = data.eval_results  # only this card's own score: neither dense nor asp-2-4
    assert (result.task_type, result.dataset_type, result.dataset_config) == (
        "text-classification",
        "nyu-mll/glue",
        "sst2",
    )
    assert (result.dataset_split, result.metric_type, result.metric_value) == ("validation", "accuracy", 0.914)
    assert parsed.text.lstrip().startswith("<!-- Generated from results.json")


def test_model_index_has_the_documented_structure(card: Card) -> None:
    """Source: the model-index specification of hub-docs (modelcard.md): required keys, and nothing null."""
    metadata = yaml.safe_load(render_card(card).split("---\n")[1])
    (index,) = metadata["model-index"]
    (result,) = index["results"]
    assert set(index) == {"name", "results"}
    assert {"type"} <= set(result["task"])
    assert {"name", "type"} <= set(result["dataset"])
    assert all({"type", "value"} <= set(metric) for metric in result["metrics"])
    assert "null" not in render_card(card).split("---\n")[1]
    parsed: Any = ModelCard(render_card(card)).data
    assert metadata["model-index"] == eval_results_to_model_index(card.name, parsed.eval_results)


def test_samples_are_marked_and_not_ranked(new_card: NewCard, new_score: NewScore) -> None:
    """Source: the rule for `--limit`: shown as a sample, without a difference, absent from model-index."""
    sample = {"samples": 100, "complete": False}
    rows = (ScoreRow("dense", new_score(0.95, **sample)), ScoreRow("compressed", new_score(0.94, **sample)))
    text = render_card(new_card(scores=rows))
    assert "| SST-2 | dev | 100 (sample) | accuracy | 95.00 % | 94.00 % | - |" in text
    assert "model-index" not in text
    assert ModelCard(text).data.get("eval_results") is None


def test_a_part_of_a_hub_split_is_not_named_as_the_hubs(new_card: NewCard, new_score: NewScore) -> None:
    """Source: `squad1-articles` scores ten articles of SQuAD's development set; the Hub's `validation` is all 48, and a
    leaderboard would rank them together. The whole development set is called `validation`."""
    found = {}
    for task in ("squad1", "squad1-articles"):
        score = new_score(0.8, task=task, metric="f1", split="dev")
        rows = tuple(ScoreRow(variant, score) for variant in ("dense", "compressed"))
        text = render_card(new_card(scores=rows, data=(describe_task(task),)))
        parsed: Any = ModelCard(text).data
        (result,) = parsed.eval_results
        found[task] = (result.dataset_type, result.dataset_split)
        assert parsed.datasets == ["rajpurkar/squad"]
    assert found == {"squad1": ("rajpurkar/squad", "validation"), "squad1-articles": ("squad1-articles", "dev")}


def test_results_stand_side_by_side(card: Card) -> None:
    """Source: the fixture's values, formatted by hand; 91.40 - 91.74 = -0.34."""
    text = render_card(card)
    assert "| data | split | rows | metric | dense | asp-2-4 | compressed | difference |" in text
    assert "| SST-2 | dev | 872 | accuracy | 91.74 % | 90.60 % | 91.40 % | -0.34 points |" in text
    assert "`glue/sst2` version 1, max_length 128" in text


def test_sizes_are_exact(card: Card) -> None:
    """Source: 2:4 int8 stores 20 of 64 bits a group of four FP16 weights, 0.3125 (GPUSQ-TLM, section 3)."""
    text = render_card(card)
    assert "| paper size (dense in FP16) | 21.2 MB (21,233,664 B) | 6.64 MB (6,635,520 B) | 0.3125 | 3.20x |" in text
    assert (
        "| files on disk (dense in float32) | 91.6 MB (91,600,000 B) | 31.9 MB (31,900,000 B) | 0.3483 | 2.87x |"
        in text
    )


def test_never_slower_is_claimed_only_when_true(new_card: NewCard, new_speed: NewSpeed) -> None:
    """Source: 120 / 52 = 2.307 (cut to 2.30); 1 / 1.003 = 0.997, which must not be shown as 1.00x."""
    fast, slow = new_speed(120.0, 52.0), new_speed(1.0, 1.003, batch=1)
    text = render_card(new_card(speeds=(fast,)))
    assert "Never slower than dense in the one condition measured here." in text
    assert "120 (118 to 125) | 52.0 (51.0 to 54.1) | 2.30x (2.19 to 2.42) |" in text
    text = render_card(new_card(speeds=(fast, slow)))
    assert "Never slower" not in text
    assert "**Slower than dense in 1 of the 2 conditions measured here.**" in text
    assert "| 0.99x, slower (" in text
    assert "Speed was not measured." in render_card(new_card(speeds=()))


def test_published_numbers_stand_apart(card: Card, new_card: NewCard) -> None:
    """Source: the fixture's own published row, and Table 1 of Yu et al. 2023 (BERT-base, SST-2: 93.5, GPUSQ-TLM_GEMM
    95.3), stand in their section only; none for a task that no paper has."""
    text = render_card(card)
    before, _, section = text.partition("## Published numbers")
    assert "| SST-2 accuracy, BERT-base | 93.5 | 95.3 | GLUE test server |" in section
    assert "| 91.74 | 91.40 | 93.5 | 95.3 |" in section  # measured dense and compressed, then published
    assert "**of another model of the same family**" in section
    assert "[16] GLUE columns of the BERT rows are test-server numbers" in section
    assert "95.3" not in before
    assert "Published" not in render_card(new_card(published=(), recipe=replace(card.recipe, name="dense"),
                                                   name="minilm-l6.sst2.dense"))  # fmt: skip


def test_loading_tells_whether_the_weights_are_there(new_card: NewCard) -> None:
    """Source: `Card.weights`."""
    assert "The weights are not distributed" in render_card(new_card(weights="reproducible"))
    text = render_card(new_card(weights="included"))
    assert "not distributed" not in text
    code = text.split("```python\n")[1].split("```")[0]
    assert 'squeezoo.load("minilm-l6.sst2.gpusq-gemm-int8")' in code
    assert len(code.splitlines()) <= 5


def test_write_card_writes_both_files(card: Card, tmp_path: Path) -> None:
    """Source: the definition: the README is the rendering of the results.json beside it."""
    path = write_card(card, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "results.json"]
    assert path.read_text(encoding="utf-8") == render_card(Card.load(tmp_path)) == render_card(card)


def test_table_of_cards(new_card: NewCard, new_speed: NewSpeed) -> None:
    """Source: the fixture's values; rows sorted by name, the losing condition mentioned."""
    other = new_card(
        name="a.sst2.gpusq-gemm-int8", scores=(), weights="included", speeds=(new_speed(4, 2), new_speed(1, 2, batch=1))
    )
    lines = render_table([new_card(), other]).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith(
        "| `a.sst2.gpusq-gemm-int8` | not measured | - | - | - | 0.3125 | 91.6 MB to 31.9 MB | 2.00x ("
    )
    assert lines[2].endswith("; slower in 1 of 2 conditions |")
    assert lines[3].startswith(
        "| `minilm-l6.sst2.gpusq-gemm-int8` (card only) | SST-2 dev, accuracy | 91.74 % | 91.40 % | -0.34 points |"
    )


def test_terminal_tables(card: Card, new_score: NewScore, new_speed: NewSpeed) -> None:
    """Source: 100 MB to 25 MB is 0.25; 10 ms to 20 ms is half the speed; 90 % to 91 % is +1 point."""
    console = Console(width=160, file=StringIO())
    slow = new_speed(10, 20)
    dense = Measured("dense", new_score(0.90), 100_000_000, slow.dense)
    console.print(render_comparison(dense, [Measured("small", new_score(0.91), 25_000_000, slow.compressed)]))
    for table in render_terminal(card):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for shown in (
        "91.00 %",
        "+1.00 points",
        "25 MB",
        "0.25",
        "20.0 ms",
        "0.50x, slower",
        "0.3125",
        "2.30x (2.19 to 2.42)",
    ):
        assert shown in text
    with pytest.raises(ValueError, match="measure both in the same way"):
        render_comparison(dense, [Measured("small", new_score(0.91, samples=10), None, None)])


def test_cells_cannot_break_a_table() -> None:
    """Source: Markdown: a bar inside a cell must be escaped, a line break is a space."""
    assert Grid(["a"], [["x|y\nz"]]).markdown().splitlines()[2] == "| x\\|y z |"
