"""The measured results in the repository: complete, and the tables in results/README.md say what the files say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from squeezoo.results_tables import (
    cell_table,
    method_table,
    race_table,
    read_scores,
    score_table,
    scores_in,
    tables,
    with_table,
)

RESULTS = Path(__file__).parents[1] / "results"
EVALUATIONS = sorted((RESULTS / "eval").glob("*.json"))


def test_there_are_results() -> None:
    assert EVALUATIONS
    assert list(RESULTS.glob("engine-*.json"))
    assert list(RESULTS.glob("cpu-*.json"))


def test_the_tables_say_what_the_files_say() -> None:
    """`make tables` would change nothing."""
    for path, text in tables().items():
        assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_every_score_names_its_libraries(path: Path) -> None:
    assert all(score["libraries"]["torch"] for score in scores_in(json.loads(path.read_text(encoding="utf-8"))))


def scores_of(**f1: float) -> dict[str, list[dict[str, object]]]:
    """Files of MRPC; a name's last two letters are the seed."""
    rest = {"task": "glue/mrpc", "split": "dev", "samples": 408, "complete": True, "metric": "f1"}
    names = {key: f"minilm-l6.mrpc.{key[:-2].replace('_', '-')}.{key[-2:]}" for key in f1}
    return {names[key]: [{**rest, "value": value}] for key, value in f1.items()}


def test_methods_are_compared_with_the_dense_model_of_their_seed() -> None:
    """By hand: seeds 0 and 1 of ASP are 2 points below and 1 above their own dense models; mean 87.5, deviation 0.71.
    A seed without a dense model counts for the mean alone."""
    lines = method_table(scores_of(denses0=0.90, denses1=0.86, asp_2_4s0=0.88, asp_2_4s1=0.87))
    assert lines[2] == "| dense, 5 epochs | 90.00, 86.00 | 88.00 | 2.83 |  |  |"
    assert lines[3] == "| `asp-2-4`, 12 epochs | 88.00, 87.00 | 87.50 | 0.71 | -0.50 |  |"
    assert "| `dq`, no training | -, 80.00 | 80.00 |  | -6.00 | -1.0 on sentiment (T) |" in method_table(
        scores_of(denses1=0.86, dqs1=0.8)
    )
    alone = method_table(scores_of(denses0=0.86, dqs1=0.8))
    assert alone[3] == "| `dq`, no training | -, 80.00 | 80.00 |  |  | -1.0 on sentiment (T) |"
    with pytest.raises(ValueError, match="no label for the methods magic"):
        method_table(scores_of(denses0=0.9, magics0=0.9))


def test_a_sample_is_called_one_and_a_perplexity_has_no_percent() -> None:
    score = {"task": "t", "split": "test", "samples": 1200, "complete": False, "metric": "accuracy", "value": 0.5}
    lines = score_table({"a": [score], "b": [{**score, "metric": "perplexity", "value": 1234.5, "complete": True}]})
    assert lines[2] == "| a | t | test | 1,200 (sample) | accuracy | 50.00 % |"
    assert lines[3] == "| b | t | test | 1,200 | perplexity | 1,234.50 |"


def cell_of(model: str, size: str, batch: int = 1, skipped: str | None = None, **speedups: float) -> dict[str, object]:
    engines = {name: {"speedup": value, "spread": [value, value + 0.1]} for name, value in speedups.items()}
    return {
        "model": model, "batch": batch, "size": size, "skipped": skipped,
        "engines": engines | {"eager fp32": {"timing": {"median_ms": 100.0}, "speedup": 1.0}},
    }  # fmt: skip


def test_the_race_has_the_cells_with_peers_and_each_peer_s_better_mode() -> None:
    """By hand: 5 over OpenVINO's better 4 is 1.25. A cell without peers is in the other table alone."""
    modes = {"OpenVINO NNCF int8": 3.0, "OpenVINO NNCF int8, this shape": 4.0, "ONNX Runtime int8": 2.0}
    raced = cell_of("bert", "384", squeezoo=5.0, **modes, **{"torch dynamic int8 (x86)": 2.5})
    alone = cell_of("bert", "16", squeezoo=3.0)
    left_out = cell_of("vit", "224x224", skipped="too slow")
    lines = race_table([raced, alone, left_out])[2:]
    assert lines == ["| bert | 1 x 384 | 100.0 | **5.00x** | 4.00x | 2.00x | 2.50x | 1.25 |"]
    assert cell_table([raced, left_out, alone])[2:] == [
        "| bert | 1 x 16 | 100.0 | 3.00x | 3.00 to 3.10 | - |",
        "| bert | 1 x 384 | 100.0 | 5.00x | 5.00 to 5.10 | 2.50x |",
        "| vit | 1 x 224x224 | too slow |  |  |  |",
    ]


def test_marks_that_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match="found none of them"):
        with_table("text", "scores", [])


def test_both_forms_of_a_file_of_scores_are_read(tmp_path: Path) -> None:
    """The list that it was, and the record with device and model that it is."""
    score = {"task": "t", "split": "test", "samples": 12, "complete": True, "metric": "accuracy", "value": 0.5}
    (tmp_path / "old.json").write_text(json.dumps([score]))
    (tmp_path / "new.json").write_text(json.dumps({"model": {"name": "m"}, "skipped": [], "scores": [score]}))
    assert read_scores(tmp_path) == {"old": [score], "new": [score]}


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_no_file_of_scores_tells_a_folder_of_the_machine(path: Path) -> None:
    """Absolute paths begin a text or follow a quotation mark or a space."""
    assert not re.search(r"""["' ]/\w""", path.read_text(encoding="utf-8"))
