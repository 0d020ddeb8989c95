"""Several tasks on one model: what is scored, what is skipped and why, what is kept when the rest fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from squeezoo.eval import get_task
from squeezoo.eval.fit import Requested, requested_tasks
from squeezoo.eval.run import evaluate
from squeezoo.eval.several import Outcome, Skipped, evaluate_several
from texts import sentence_tokenizer
from tiny import TINY
from torch import nn


def _model() -> Any:
    model: Any = TINY["bert"]()
    model.classifier = nn.Linear(32, 2)
    return model.eval()


def _data(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "dev.tsv").write_text("sentence\tlabel\na b\t1\nc\t0\nd e f\t1", encoding="utf-8")
    return tmp_path


def _run(names: str, folder: Path, **how: Any) -> tuple[Outcome, list[Skipped]]:
    told: list[Skipped] = []
    outcome = evaluate_several(
        _model(), requested_tasks(names), sentence_tokenizer(), data_dir=folder, skip=told.append, progress=False, **how
    )
    return outcome, told


def test_what_a_list_of_names_asks_for() -> None:
    """Full names are explicit, also where a family names them too; ``squad`` is no full name."""
    found = {one.task.name: (one.by, one.explicit) for one in requested_tasks("wikitext2, squad,wikitext2/word")}
    assert found["squad1"] == ("squad", False)
    assert found["wikitext2/word"] == ("wikitext2/word", True)
    assert found["wikitext2/token"] == ("wikitext2", False)
    for names in ("glue/mrpc,", ",", "", " ,glue"):
        with pytest.raises(ValueError, match="an empty name in the list of tasks"):
            requested_tasks(names)


def test_a_family_is_what_fits_and_is_there(tmp_path: Path) -> None:
    """A head for two classes and the files of SST-2 alone: every other task of GLUE, squad and wikitext2 is named with
    its reason, and that is no failure."""
    outcome, told = _run("glue,squad,wikitext2", _data(tmp_path, "SST-2"))
    assert {score.task for score in outcome.scores} == {"glue/sst2"}
    assert outcome.complete
    reasons = {one.task: one.reason for one in outcome.skipped}
    assert len(reasons) == 9 + 1 + 4
    assert "3 labels" in reasons["glue/mnli"]
    assert "not found: looked in" in reasons["glue/qqp"]
    assert "kind 'question-answering'" in reasons["squad1"]
    assert told == outcome.skipped


def test_a_full_name_without_a_score_is_a_failure(tmp_path: Path) -> None:
    """Missing data or a head that does not fit; what can be scored is."""
    folder = _data(tmp_path, "SST-2")
    for name in ("glue/qqp", "wnut17"):
        outcome, _ = _run(f"{name},glue/sst2", folder)
        assert [score.task for score in outcome.scores] == ["glue/sst2"]
        assert [(one.task, one.wrong) for one in outcome.skipped] == [(name, True)]
        assert not outcome.complete


def test_broken_data_of_a_family_is_a_failure(tmp_path: Path) -> None:
    """Files that are there but damaged are no reason to be silent."""
    folder = _data(tmp_path, "SST-2", "RTE")  # RTE has other columns
    outcome, _ = _run("glue", folder)
    assert [score.task for score in outcome.scores] == ["glue/sst2"]
    assert [one.task for one in outcome.skipped if one.wrong] == ["glue/rte"]
    assert not outcome.complete


def test_nothing_scored_is_a_failure(tmp_path: Path) -> None:
    """No files at all; one task alone raises as `evaluate` does."""
    outcome, _ = _run("glue", tmp_path)
    assert (outcome.scores, outcome.complete) == ([], False)
    with pytest.raises(ValueError, match="glue/sst2, split dev, not found"):
        _run("glue/sst2", tmp_path)
    with pytest.raises(ValueError, match="no task of the family 'wikitext2' fits BertForSequenceClassification"):
        _run("wikitext2", tmp_path)


def test_settings_and_splits_go_to_the_tasks_that_have_them(tmp_path: Path) -> None:
    """A setting that no task has is refused before anything is scored, also a value of another type."""
    sst2 = get_task("glue/sst2")
    kept: list[Any] = []

    def rows(split: str, folder: Any) -> list[Any]:
        kept.append(split)
        return [{"texts": ("a",), "label": 1}, {"texts": ("b",), "label": 0}]

    one = replace(sst2, name="one", rows=rows, settings={"beams": 4})
    two = replace(sst2, name="two", rows=rows, splits=("train", "valid"))
    both = [Requested(one, "x", True), Requested(two, "y", True)]
    model, tokenizer = _model(), sentence_tokenizer()
    found = evaluate_several(model, both, tokenizer, settings={"beams": "2"}, progress=False).scores
    assert [(score.task, score.split, score.settings.get("beams")) for score in found] == [
        ("one", "dev", 2), ("two", "valid", None),
    ]  # fmt: skip
    outcome = evaluate_several(model, both, tokenizer, split="valid", progress=False)
    assert [score.task for score in outcome.scores] == ["two"]
    assert "did you mean 'dev'" in outcome.skipped[0].reason
    kept.clear()
    with pytest.raises(ValueError, match=r"unknown setting 'beam'.*did you mean 'beams'"):
        evaluate_several(model, both, tokenizer, settings={"beam": 2}, progress=False)
    with pytest.raises(ValueError, match="setting beams is a int, found 'many'"):
        evaluate_several(model, both, tokenizer, settings={"beams": "many"}, progress=False)
    with pytest.raises(ValueError, match="unknown split 'tst'"):
        evaluate_several(model, both, tokenizer, split="tst", progress=False)
    assert not kept


def test_what_was_scored_is_kept_when_the_rest_is_interrupted(tmp_path: Path) -> None:
    """Ctrl-C in the second of three: after the first, and at the end, everything so far is handed over."""
    sst2 = get_task("glue/sst2")

    def interrupted(split: str, folder: Any) -> list[Any]:
        raise KeyboardInterrupt

    folder = _data(tmp_path, "SST-2")
    tasks = [sst2, replace(sst2, name="second", rows=interrupted), replace(sst2, name="third")]
    states: list[tuple[list[str], list[tuple[str, str]]]] = []

    def after(state: Outcome) -> None:
        states.append(([s.task for s in state.scores], [(s.task, s.reason) for s in state.skipped]))

    model, tokenizer = _model(), sentence_tokenizer()
    requested = [Requested(task, task.name, True) for task in tasks]
    outcome = evaluate_several(model, requested, tokenizer, data_dir=folder, after=after, progress=False)
    assert (outcome.stopped, outcome.complete) == (True, False)
    assert states == [
        (["glue/sst2"], [("second", "not yet scored"), ("third", "not yet scored")]),
        (["glue/sst2"], [("second", "interrupted"), ("third", "interrupted")]),
    ]


@pytest.mark.parametrize(
    ("task", "asked", "meant"),
    [
        ("glue/mrpc", "validation", "dev"), ("glue/mrpc", "eval", "dev"), ("glue/mrpc", "Dev", "dev"),
        ("glue/mnli-mm", "validation_mismatched", "dev_mismatched"), ("imdb", "validation", "test"),
        ("imdb/halves", "dev", "validation"), ("glue/mrpc", "training", "train"), ("glue/mrpc", "xyz", "dev"),
        ("conll2003", "testb", "test"), ("wnut17", "val", "dev"),
    ],
)  # fmt: skip
def test_the_split_that_is_meant(task: str, asked: str, meant: str) -> None:
    """By hand: the split of the same purpose, else the one that the task reports."""
    with pytest.raises(ValueError, match=f"unknown split '{asked}': .*did you mean '{meant}'"):
        get_task(task).size(asked)


def test_devices_and_lengths_that_cannot_be(tmp_path: Path) -> None:
    """One error each, before data is read: the folder does not hold any."""
    import torch

    model, tokenizer = _model(), sentence_tokenizer()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no device 'cuda'"):
            evaluate(model, "glue/sst2", tokenizer, data_dir=tmp_path, device="cuda")
    with pytest.raises(ValueError, match="no device 'cuda:99'"):
        evaluate(model, "glue/sst2", tokenizer, data_dir=tmp_path, device="cuda:99")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        evaluate(model, "glue/sst2", tokenizer, data_dir=tmp_path, device="gpu")
    for length in (0, -7):
        with pytest.raises(ValueError, match=f"max_length must be at least 1 token, got {length}"):
            evaluate(model, "glue/sst2", tokenizer, data_dir=tmp_path, max_length=length)
