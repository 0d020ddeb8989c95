"""The measured results in the repository: complete, and the tables in results/README.md say what the files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[1] / "results"
EVALUATIONS = sorted((RESULTS / "eval").glob("*.json"))


def test_there_are_results() -> None:
    assert EVALUATIONS
    assert list(RESULTS.glob("engine-*.json"))
    assert list(RESULTS.glob("cpu-*.json"))


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_the_table_has_every_score(path: Path) -> None:
    """One row per score: file, task, split, rows, metric, value as the table prints it; a sample is called one."""
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    for score in json.loads(path.read_text(encoding="utf-8")):
        perplexity = "perplexity" in score["metric"]
        value = f"{score['value']:,.2f}" if perplexity else f"{100 * score['value']:.2f} %"
        rows = f"{score['samples']:,}" + ("" if score["complete"] else " (sample)")
        cells = (path.stem, score["task"], score["split"], rows, score["metric"], value)
        assert f"| {' | '.join(cells)} |" in text
        assert score["libraries"]["torch"]
