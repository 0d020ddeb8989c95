"""The card as a record: what it refuses, and that its JSON form is complete and read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import squeezoo.eval.results as results_module
from squeezoo.compress.plan import Plan, PlannedGemm
from squeezoo.eval.task import Score
from squeezoo.zoo_cards.card import RESULTS, Card, PlanSummary, ScoreRow, Training

NewCard = Callable[..., Card]
NewScore = Callable[..., Score]


def test_json_gives_the_same_card_back(card: Card, tmp_path: Path) -> None:
    """Source: the definition of a round trip; the file is plain JSON in between."""
    path = card.save(tmp_path)
    assert path == tmp_path / RESULTS
    assert Card.load(tmp_path) == card
    assert Card.from_dict(json.loads(json.dumps(card.to_dict()))) == card


def test_a_one_shot_image_card_survives_too(new_card: NewCard, new_score: NewScore, new_speed: Callable) -> None:
    """Source: the fields that may be null (training, revision, code, sequence) and the pair (height, width)."""
    from squeezoo.zoo_cards.datasets import describe_task

    digits = {"task": "digits", "split": "test", "samples": 355, "settings": {}}
    card = new_card(
        scores=(ScoreRow("dense", new_score(0.97, **digits)), ScoreRow("compressed", new_score(0.96, **digits))),
        speeds=(new_speed(2.0, 1.0, sequence=None, image_size=(8, 8)),),
        data=(describe_task("digits"),), training=None, published=(), code=None, limits=(),
    )  # fmt: skip
    assert Card.from_dict(json.loads(json.dumps(card.to_dict()))) == card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("limits"), "missing limits"),
        (lambda d: d.update(speed=d.pop("speeds")), "unknown key 'speed'; did you mean 'speeds'"),
        (lambda d: d["base"].pop("licence"), "base: missing licence"),
        (lambda d: d["base"].update(license="mit"), "base: unknown key 'license'"),
        (lambda d: d["size"].update(parameters="many"), "size.parameters: expected int, found 'many'"),
        (lambda d: d["size"].update(nonzeros=True), "size.nonzeros: expected int, found True"),
        (lambda d: d["scores"][1]["score"].update(vlaue=1), r"scores\[1\].score: .*unknown keys \['vlaue'\]"),
        (lambda d: d["scores"][1]["score"].pop("samples"), r"scores\[1\].score: .*missing keys \['samples'\]"),
        (lambda d: d["speeds"][0]["dense"].pop("min_ms"), r"speeds\[0\]: .*min_ms"),
        (lambda d: d["training"]["stages"][0].pop("steps"), r"training.stages\[0\]: missing steps"),
        (lambda d: d["data"][0].update(image=[1, 8]), r"data\[0\].image: expected 3 values, found 2"),
        (lambda d: d.update(weights="elsewhere"), "weights: expected one of 'included', 'reproducible'"),
        (lambda d: d.update(commands="make"), "commands: expected a list, found 'make'"),
        (lambda d: d.update(format=3), "expected format 1 or 2, found 3"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(
    card: Card, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    """Source: `record_from`'s contract: nothing unknown, nothing missing, the right type, and the place named."""
    data = card.to_dict()
    change(data)
    with pytest.raises(ValueError, match=message):
        Card.from_dict(data)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    """Source: the house's rule for errors: the message says which file."""
    (tmp_path / RESULTS).write_text('{"format": 1,')
    with pytest.raises(ValueError, match=rf"{RESULTS} is not readable as JSON"):
        Card.load(tmp_path)
    (tmp_path / RESULTS).write_text('{"format": 1}')
    with pytest.raises(ValueError, match=rf"{RESULTS}: Card: missing name, base"):
        Card.load(tmp_path)


def test_a_crash_while_saving_leaves_the_old_file(card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source: an atomic replacement: a disk that fails at the last moment changes nothing and leaves nothing behind."""
    card.save(tmp_path)

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results_module.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        replace(card, date="2026-02-01").save(tmp_path)
    assert Card.load(tmp_path) == card
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS]


@pytest.mark.parametrize(
    "difference",
    [
        {"samples": 871}, {"split": "train"}, {"task_version": 2}, {"metric": "f1"}, {"complete": False},
        {"settings": {"max_length": 64}},
    ],
)  # fmt: skip
def test_no_compressed_score_without_its_dense_one(
    new_card: NewCard, new_score: NewScore, difference: dict[str, Any]
) -> None:
    """Source: two numbers may stand side by side only when everything but the model is the same."""
    rows = (ScoreRow("dense", new_score(0.9)), ScoreRow("compressed", new_score(0.9, **difference)))
    with pytest.raises(ValueError, match=r"compressed .* has no dense score under the same conditions"):
        new_card(scores=rows)


def test_contradictions_are_refused(card: Card, new_card: NewCard, new_score: NewScore) -> None:
    """Source: the fields' definitions, each contradicted once."""
    twice = (*card.scores, ScoreRow("dense", new_score(0.5)))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"scores": twice}, "stands twice"),
        ({"data": ()}, "data is empty"),
        ({"scores": (ScoreRow("dense", new_score(0.5, task="glue/rte")),)}, "no entry of `data` describes this task"),
        ({"name": "minilm-l6.sst2.asp-2-4"}, "must end in the recipe's name"),
        ({"name": "MiniLM.gpusq-gemm-int8"}, "must be <model>.<task>.<recipe>"),
        ({"commands": ()}, "commands are missing"),
        ({"date": "31.1.2026"}, "date must be YYYY-MM-DD"),
        ({"size": replace(card.size, true_bytes=1)}, "breakdown sums to 31,900,000 bytes, true_bytes is 1"),
        ({"size": replace(card.size, nonzeros=card.size.parameters + 1)}, "non-zeros"),
        ({"size": replace(card.size, paper_bytes=0)}, "size.paper_bytes must be positive"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            new_card(**changes)


def test_primary_is_the_first_complete_compressed_score(new_card: NewCard, new_score: NewScore) -> None:
    """Source: the definition; a sample in front of it does not count."""
    sample, f1 = {"samples": 100, "complete": False}, {"metric": "f1"}
    card = new_card(scores=tuple(
        ScoreRow(variant, new_score(value, **changes))
        for changes, dense, compressed in ((sample, 0.1, 0.2), (f1, 0.3, 0.4), ({}, 0.5, 0.6))
        for variant, value in (("dense", dense), ("compressed", compressed))
    ))  # fmt: skip
    assert card.primary_pair is not None
    assert [score.value for score in card.primary_pair] == [0.3, 0.4]
    assert new_card(scores=()).primary_pair is None


def test_plan_summary_counts_what_the_plan_says() -> None:
    """Source: two hand-written GEMMs, one of which no kernel takes and whose input stays in float."""

    def gemm(role: str, bits: int | None, accelerated: bool) -> PlannedGemm:
        return PlannedGemm(
            name=role, role=role, block=0, shape=(8, 16), layout="out_in", parts=1, sparsity="2:4",
            weight={"method": "lsq", "bits": 8}, input=None if bits is None else {"method": "lsq", "bits": bits},
            input_owner=None, accelerated=accelerated, reason="",
        )  # fmt: skip

    summary = PlanSummary.of(Plan("bert", "r", (gemm("q", 8, True), gemm("final", None, False))))
    assert summary == PlanSummary(2, ("q", "final"), ("2:4",), (8,), (8,), 1, None)


def test_training_adds_up_the_stages() -> None:
    """Source: records of the engine's form; 0.5 s + 10 s, 20 samples, and 4.0 steps counted as 4."""
    records: list[dict[str, Any]] = [
        {"stage": "prune", "seconds": 0.5},
        {
            "stage": "finetune", "steps": 4.0, "seconds": 10.0, "loss": 1.0, "epochs": 2.0, "learning_rate": 1e-4,
            "batch_size": 10, "samples": 20, "device": "cpu",
        },
    ]  # fmt: skip
    training = Training.of(records, seed=3, device="Test CPU")
    assert (training.seconds, training.samples, training.seed) == (10.5, 20, 3)
    assert [(s.name, s.epochs, s.steps, s.batch, s.learning_rate) for s in training.stages] == [
        ("prune", None, None, None, None),
        ("finetune", 2.0, 4, 10, 1e-4),
    ]
