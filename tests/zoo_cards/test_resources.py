"""What a card says beside scores and latency: complete in JSON, strict when read, and unknown is never 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from card_costs import STORAGE, energy, resources, search
from squeezoo import pipeline
from squeezoo.compress.plan import Plan, PlannedAttention
from squeezoo.eval.environment import environment
from squeezoo.eval.trials import SweepReport, Trial
from squeezoo.zoo_cards.card import Card, PlanSummary
from squeezoo.zoo_cards.render import render_card
from squeezoo.zoo_cards.resources import EnergyRow, Machine, Modelled
from squeezoo.zoo_cards.search import Search

NewCard = Callable[..., Card]


@pytest.fixture
def full(new_card: NewCard) -> Card:
    return new_card(storage=STORAGE, search=search(), resources=resources())


def section(card: Card, title: str) -> str:
    return render_card(card).partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_json_gives_the_same_card_back(full: Card, tmp_path: Path) -> None:
    """Source: the definition of a round trip; the sums of energy are written for other readers: 2,000 J x 1.59."""
    full.save(tmp_path)
    assert Card.load(tmp_path) == full
    data = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    known, unknown = (row["energy"] for row in data["resources"]["energy"])
    assert known["kwh"] == pytest.approx(2000 * 1.59 / 3.6e6)
    assert (unknown["kwh"], unknown["co2_grams"], unknown["joules"]["cpu"]) == (None, None, None)


def test_results_of_format_1_still_render(card: Card) -> None:
    """Source: format 1 is format 2 without storage, search and resources; what it lacks is not measured."""
    old = {key: value for key, value in card.to_dict().items() if key not in ("storage", "search", "resources")}
    read = Card.from_dict({**old, "format": 1})
    assert read == card
    assert "Loading time: not measured." in section(read, "Loading and memory")
    assert section(read, "Energy and CO2").strip() == "Energy and CO2: not measured."
    assert "validation score and expected validation performance are not measured" in section(read, "Seeds and trials")
    with pytest.raises(ValueError, match="unknown key 'search' in format 1; it came with format 2"):
        Card.from_dict({**old, "format": 1, "search": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("resources"), "missing resources"),
        (lambda d: d["resources"].update(loadings=d["resources"].pop("loading")), "did you mean 'loading'"),
        (lambda d: d["resources"]["memory"][0]["memory"].pop("run_peak"), r"resources.memory\[0\].memory: .*run_peak"),
        (lambda d: d["resources"]["energy"][0]["energy"]["joules"].update(cpu=-1), r"energy\[0\].*at least 0"),
        (lambda d: d["resources"]["energy"][0].update(rows=0), "at least 1 row"),
        (lambda d: d["resources"]["modelled"][0].update(scope="all"), r"modelled\[0\].scope: expected one of 'gemms'"),
        (lambda d: d["resources"]["modelled"][0].update(dense_us=0), "times must be positive"),
        (lambda d: d["resources"]["machine"].update(cuda=[]), "resources.machine.cuda: expected an object"),
        (lambda d: d["search"].update(values=[]), "finite validation values"),
        (lambda d: d["search"].update(space={}), "search space is empty"),
        (lambda d: d["search"].update(planned=2), "3 complete and 1 failed trials of 2 planned"),
        (lambda d: d["search"].update(task="glue/rte"), "the search chose by glue/rte, which `data` does not describe"),
        (
            lambda d: d["storage"][0].update(bytes=1),
            "storage sums to 1 bytes of matrices, the breakdown says 6,635,520",
        ),
        (lambda d: d["storage"][0].update(weights=0), "needs positive counts"),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(full: Card, change: Callable[[Any], Any], message: str) -> None:
    """Source: the records' contracts, each broken once."""
    data = full.to_dict()
    change(data)
    with pytest.raises(ValueError, match=message):
        Card.from_dict(data)


def test_storage_says_form_and_bits(full: Card) -> None:
    """Source: 8 x 6,635,520 / 10,616,832 = 5 bits a weight, as ALGORITHMS F has for int8 2:4."""
    text = section(full, "Size")
    assert "| 2:4 int8 | - | 36 | 10,616,832 | 6.64 MB | 5 | 50 kB |" in text
    assert "| table int8 | embeddings.word_embeddings | 1 | 11,720,448 | 11.7 MB | 8 | 122 kB |" in text


def test_decoding_has_prefill_and_token(full: Card, new_card: NewCard) -> None:
    """Source: 80 / 40, 10 / 8, and 4 rows in 10 and in 8 ms are 400 and 500 tokens a second."""
    text = section(full, "Speed")
    assert "2.00x (1.90 to 2.10)" in text
    assert "| 1.25x (1.20 to 1.30) | 400 to 500 |" in text
    writer = replace(full.data[0], pipeline="causal-lm")
    assert "Decoding speed: not measured." in section(new_card(data=(writer,)), "Speed")
    assert "Decoding" not in section(new_card(), "Speed")


def test_loading_and_memory(full: Card) -> None:
    """Source: the records' numbers, in seconds and decimal megabytes."""
    text = section(full, "Loading and memory")
    assert "| compressed | 1.5 s | 0.8 s | 0.72 to 0.88 s | 2.5 s |" in text
    assert "read from the disk" in text
    assert "| compressed | batch 8, sequence 128 | 48 MB | 200 MB | 300 MB | 310 MB | 420 MB |" in text
    assert "GPU" not in text


def test_energy_is_shown_with_its_constants_and_unknown_is_not_zero(full: Card) -> None:
    """Source: E.6: 2,000 J in 100 s are 20 W and 2.5 J for each of 800 rows; x 1.59 / 3.6e6 = 8.83e-4 kWh; x 430 g."""
    text = section(full, "Energy and CO2")
    assert "| dense | inference, batch 8 | 800 | 100 s | cpu 20 | 2.5 | 0.000883 | 0.38 |" in text
    unknown = next(line for line in text.splitlines() if line.startswith("| compressed"))
    assert unknown.count("not measured") == 4
    assert "PUE 1.59, 0.43 kg CO2 per kWh" in text
    assert "cpu: no RAPL zones" in text
    nothing = replace(full.resources, energy=(EnergyRow("dense", "training", None, energy(None)),))
    text = section(replace(full, resources=nothing), "Energy and CO2")
    assert text.strip().startswith("Energy and CO2: not measured (cpu: no RAPL zones")
    assert not any(character.isdigit() for character in text.replace("CO2", ""))


def test_estimated_power_is_said_to_be_so(full: Card) -> None:
    """Source: `Energy.estimated`."""
    row = EnergyRow("dense", "training", None, energy(3600.0, estimated=("cpu",)))
    card = replace(full, resources=replace(full.resources, energy=(row,)))
    assert "cpu 36 (estimated)" in section(card, "Energy and CO2")


def test_the_roofline_is_called_a_model(full: Card, new_card: NewCard) -> None:
    """Source: 200 us over 100 us; every column of times says what it is."""
    text = section(full, "Other hardware (model)")
    assert text.strip().startswith("**Model, not measured**")
    assert "| model: dense, us | model: compressed, us | model: ratio |" in text
    assert "| H100-SXM | batch 8 | GEMMs only | placeholder | 200 | 100 | 2.00x |" in text
    assert "Other hardware" not in render_card(new_card())


def test_trials_stand_with_their_space_and_the_reported_score(full: Card) -> None:
    """Source: E.5 by hand for 0.90, 0.91, 0.92: E_1 the mean, E_2 = (.90 + 3 x .91 + 5 x .92) / 9."""
    text = section(full, "Seeds and trials")
    assert "Seed: 0. Grid search (model and recipe are not in its record), 4 trials from seed 0" in text
    assert "3 complete, 1 failed; mean training time of a trial 10 min" in text
    assert "| learning_rate | 1e-05, 3e-05 | 3e-05 |" in text
    assert "| rho | 0.0004 to 0.01, log | 0.001 |" in text
    assert "best 92.00 %; reported on dev (872 rows): 91.40 %." in text
    assert "| expected accuracy | 91.00 % | 91.44 % | 91.67 % |" in text
    assert "| expected accuracy |" not in section(replace(full, search=None), "Seeds and trials")


def test_a_search_is_read_from_the_sweeps_own_report(tmp_path: Path) -> None:
    """Source: a `SweepReport` of three trials, one failed; perplexity, so the lowest is the best."""
    trials = (
        Trial(0, {"lr": 1e-5}, "complete", 20.0, 10.0), Trial(1, {"lr": 3e-5}, "failed", None, None, error="no"),
        Trial(2, {"lr": 5e-5}, "complete", 18.0, None),
    )  # fmt: skip
    report = SweepReport(
        "somewhere/gpt2", "r", "wikitext2/token", "valid", "perplexity", False, "its own split",
        {"lr": [1e-5, 3e-5, 5e-5]}, "grid", 0, trials, (), {"torch": "2"}, "Test CPU",
    )  # fmt: skip
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(report.to_dict()), encoding="utf-8")
    found = Search.load(tmp_path)
    assert (found.planned, found.failed, found.values, found.best) == (3, 1, (20.0, 18.0), {"lr": 5e-5})
    assert (found.best_value, found.mean_seconds) == (18.0, 10.0)
    assert found.expected == report.expected
    assert (found.model, found.recipe) == ("gpt2", "r")
    path.write_text('{"trials": []}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"sweep.json: no trial of 0 is complete"):
        Search.load(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"sweep.json is no report of a sweep"):
        Search.load(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"sweep.json: "):
        Search.load(path)


def test_a_search_of_another_recipe_or_model_is_refused(full: Card, new_card: NewCard) -> None:
    """Sources: the sweep's report says what it trained; records from before that say nothing, and the card says so."""
    mine = search(model="bert-base.sst2.dense", recipe="gpusq-gemm-int8")
    wanted = {"model": "runs/bert-base.sst2.dense", "recipe": "gpusq-gemm-int8", "task": "glue/sst2"}
    mine.check_chose(**wanted)
    search().check_chose(**wanted)  # an older record
    for key, other in (("model", "runs/other"), ("recipe", "asp-2-4"), ("task", "glue/rte")):
        with pytest.raises(
            ValueError, match=f"the sweep is of another run: {key} .*, expected {other.removeprefix('runs/')}"
        ):
            mine.check_chose(**{**wanted, key: other})
    with pytest.raises(ValueError, match="the search is of recipe asp-2-4, this card of gpusq-gemm-int8"):
        new_card(search=search(recipe="asp-2-4"))
    said = section(new_card(search=mine), "Seeds and trials")
    assert "Grid search of gpusq-gemm-int8 from bert-base.sst2.dense, 4 trials from seed 0" in said


@pytest.mark.parametrize(("model", "recipe"), [("runs/other", "gpusq-gemm-int8"), ("runs/sst2.dense", "asp-2-4")])
def test_a_card_is_not_measured_with_another_runs_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, recipe: str
) -> None:
    """Before the first model is loaded, hours before the card is written; the matching sweep goes on to loading."""
    made = SimpleNamespace(base={"name": "sst2.dense"}, recipe=SimpleNamespace(name="gpusq-gemm-int8"))
    monkeypatch.setattr(pipeline, "load_manifest", lambda folder: made)

    def load_dense(*_: object, **__: object) -> None:
        raise LookupError("the dense model is loaded")

    monkeypatch.setattr(pipeline, "load_dense", load_dense)

    def measure(model: str, recipe: str) -> None:
        trials = (Trial(0, {"lr": 1e-5}, "complete", 0.9, 10.0),)
        report = SweepReport(
            model, recipe, "glue/sst2", "train", "accuracy", True, "held out", {"lr": [1e-5]}, "grid", 0, trials, (),
            {"torch": "2"}, "Test CPU",
        )  # fmt: skip
        (tmp_path / "sweep.json").write_text(json.dumps(report.to_dict()), encoding="utf-8")
        pipeline.measure_card(tmp_path, tmp_path, "glue/sst2", commands=["squeezoo ..."], sweep=tmp_path)

    with pytest.raises(ValueError, match="the sweep is of another run"):
        measure(model, recipe)
    with pytest.raises(LookupError, match="the dense model is loaded"):
        measure("runs/sst2.dense", "gpusq-gemm-int8")


def test_a_search_without_model_and_recipe_is_still_read(full: Card) -> None:
    """results.json as it was written before these two fields came."""
    data = full.to_dict()
    assert {data["search"].pop("model"), data["search"].pop("recipe")} == {None}
    assert Card.from_dict(data) == full
    with pytest.raises(ValueError, match=r"search: .*missing space"):
        Card.from_dict({**data, "search": {key: value for key, value in data["search"].items() if key != "space"}})


def test_this_machine_is_described(new_card: NewCard) -> None:
    """Source: `eval.environment` of the machine that the test runs on."""
    machine = Machine.of(environment())
    card = new_card(resources=replace(resources(), machine=machine))
    assert Card.from_dict(card.to_dict()).resources.machine == machine
    assert f"Machine: {machine.cpu} (" in section(card, "Versions")


def test_attention_maps_of_the_plan_are_named() -> None:
    """Source: a plan with a 1:4 map."""
    site = PlannedAttention("a", 0, "self", "1:4", False, None, None, None, None)
    assert PlanSummary.of(Plan("bert", "r", (), attention=(site, site))).attention == "1:4"


def test_a_prediction_becomes_a_record_that_says_model() -> None:
    """Source: H.2 by hand for one fp16 GEMM of 1,024 cubed on an ideal H100: 2 x 1024^3 / 989.4e12 s = 2.17 us."""
    from squeezoo.eval.hardware import IDEAL, get_hardware
    from squeezoo.eval.roofline import predict_model

    gemm = {"name": "g", "role": "q", "shape": (1024, 1024), "sparsity": None, "weight": None, "input": None,
            "accelerated": False}  # fmt: skip
    found = Modelled.of(predict_model([gemm], 1024, get_hardware("H100-SXM"), efficiency=IDEAL), "1,024 tokens")
    assert found.dense_us == pytest.approx(2 * 1024**3 / 989.4e12 * 1e6)
    assert (found.speedup, found.scope, found.efficiency, found.tokens) == (1.0, "gemms", "placeholder", 1024)
