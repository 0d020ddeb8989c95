"""Task, Score and the task table: what cannot be constructed, and what unknown names are told."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from squeezoo.eval import TASKS, get_task
from squeezoo.eval.task import Score
from squeezoo.models.kinds import KINDS

GOOD: dict[str, Any] = {
    "task": "glue/sst2",
    "task_version": 1,
    "split": "dev",
    "metric": "accuracy",
    "value": 0.913,
    "samples": 872,
    "complete": True,
    "higher_is_better": True,
    "libraries": {"torch": "2.13.0"},
}


def test_score_survives_json() -> None:
    """A score written as JSON and read back is the same record (definition of a round trip)."""
    score = Score(**GOOD, seed=3, settings={"max_length": 128})
    assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score


@pytest.mark.parametrize("field", list(GOOD))
def test_score_needs_every_field(field: str) -> None:
    """No field that makes a number comparable has a default (the rule of the record itself)."""
    with pytest.raises(TypeError, match=field):
        Score(**{name: value for name, value in GOOD.items() if name != field})
    with pytest.raises(ValueError, match=field):
        Score.from_dict({name: value for name, value in GOOD.items() if name != field})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("task", ""),
        ("split", None),
        ("metric", " "),
        ("task_version", 0),
        ("samples", 0),
        ("samples", 1.5),
        ("samples", True),
        ("value", float("nan")),
        ("value", float("inf")),
        ("value", "0.9"),
        ("complete", None),
        ("complete", 1),
        ("higher_is_better", "yes"),
        ("libraries", {}),
        ("libraries", {"torch": None}),
        ("seed", "7"),
    ],
)
def test_score_refuses_bad_values(field: str, value: Any) -> None:
    """Each value breaks the documented range of its field; the message names the field."""
    with pytest.raises(ValueError, match=field):
        Score(**{**GOOD, field: value})


def test_score_refuses_unknown_keys() -> None:
    """A misspelt key in a result file is named, not dropped."""
    with pytest.raises(ValueError, match="sample_count"):
        Score.from_dict({**GOOD, "sample_count": 1})


def test_libraries_are_a_copy() -> None:
    """Changing the caller's dict afterwards does not change the record."""
    libraries = {"torch": "2.13.0"}
    score = Score(**{**GOOD, "libraries": libraries})
    libraries["torch"] = "1.0"
    assert score.libraries == {"torch": "2.13.0"}


def test_table_is_keyed_by_task_name() -> None:
    """Each task stands under its own name; GLUE has nine tasks, MNLI with two development sets."""
    assert all(get_task(name).name == name for name in TASKS)
    assert [name for name in TASKS if name.startswith("glue/")] == [
        "glue/cola", "glue/sst2", "glue/mrpc", "glue/stsb", "glue/qqp", "glue/mnli", "glue/mnli-mm", "glue/qnli",
        "glue/rte", "glue/wnli",
    ]  # fmt: skip


def test_importing_the_table_imports_no_model_library() -> None:
    """The list of tasks is shown without waiting for torch."""
    heavy = ("torch", "transformers", "sklearn", "scipy", "seqeval", "datasets", "pyarrow")
    code = f"import sys, squeezoo.eval; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_every_task_says_what_it_needs() -> None:
    """Every kind has a head; where classes have names there is one for each logit; defaults cite their source."""
    for task in TASKS.values():
        assert task.reads in ("text", "images", "sound")
        assert set(task.model_kinds) <= set(KINDS)
        assert not task.label_names or len(task.label_names) == task.num_labels
        if task.finetune is not None:
            assert len(task.finetune.source) > 10
            assert task.finetune.epochs > 0 < task.finetune.learning_rate < 0.1


def test_unlabelled_split_is_refused() -> None:
    """GLUE keeps the labels of its test splits."""
    with pytest.raises(ValueError, match=r"glue/rte: the official split 'test' has no public labels.*train, dev"):
        get_task("glue/rte").size("test")


def test_settings_take_the_type_of_their_default() -> None:
    """The command line gives texts."""
    task = replace(get_task("glue/sst2"), settings={"beams": 4, "penalty": 2.0, "text": "raw"})
    assert task.resolved({"beams": "2", "penalty": 1}) == {"beams": 2, "penalty": 1.0, "text": "raw"}
    with pytest.raises(ValueError, match=r"unknown setting 'beam'.*did you mean 'beams'"):
        task.resolved({"beam": 2})
    with pytest.raises(ValueError, match="setting beams is a int, found 'many'"):
        task.resolved({"beams": "many"})
    with pytest.raises(ValueError, match="it has no settings"):
        get_task("glue/sst2").resolved({"beams": 2})


def test_unknown_task_names_the_nearest() -> None:
    """The message lists what exists and the closest spelling."""
    with pytest.raises(ValueError, match=r"glue/sst-2.*glue/mrpc.*did you mean 'glue/sst2'"):
        get_task("glue/sst-2")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "text-clasification"}, "did you mean 'text-classification'"),
        ({"splits": ()}, "splits"),
        ({"splits": ("dev", "dev"), "sizes": (1, 1)}, "splits"),
        ({"sizes": (872,)}, "sizes"),
        ({"version": 0}, "version"),
        ({"source": ""}, "source"),
        ({"num_labels": 0}, "num_labels"),
        ({"max_length": 0}, "max_length"),
        ({"label_names": ("one",)}, "label_names"),
    ],
)
def test_task_refuses_bad_fields(change: dict[str, Any], named: str) -> None:
    """Each change breaks the documented form of one field."""
    with pytest.raises(ValueError, match=named):
        replace(get_task("glue/sst2"), **change)


def test_score_functions_of_classes_are_pure_and_primary_first() -> None:
    """Called twice they give the same, and hold the primary metric; values by hand: 1 of 2 right, F1 = 2/3."""
    for task in TASKS.values():
        if task.predict is not None or task.kind == "text-regression":
            continue
        first = task.score([1, 1], [1, 0])
        assert first == task.score([1, 1], [1, 0])
        assert next(iter(first)) == task.metric
        assert first["accuracy"] == 0.5
    assert get_task("glue/mrpc").score([1, 1], [1, 0])["f1"] == pytest.approx(2 / 3)
