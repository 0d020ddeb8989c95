"""What a card's costs are measured with: energy by a known sensor, rows of GEMMs that follow from the shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import squeezoo.eval.energy as energy_module
import squeezoo.measure as measure
import torch
from card_costs import energy, loading, memory
from squeezoo.compress.attach import attach_, prune_
from squeezoo.compress.checkpoint import load, save_checkpoint
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.timings import Point
from squeezoo.zoo_cards.inference import gemm_rows, inference_energy, modelled, training_energy
from tiny import ALL, TINY, TOKENS, tiny_batch


class Meter:
    """Gives 10 joules at every reading."""

    term, name = "cpu", "a sensor of the test"

    def start(self) -> None:
        self.joules = 0.0

    def read(self) -> float:
        self.joules += 10.0
        return self.joules


def test_energy_of_inference_is_what_the_sensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Source: the sensor: 10 J read once at the end, 1.59 x 10 / 3.6e6 kWh; rows are whole batches of 4."""
    monkeypatch.setattr(energy_module, "_machine_sensors", lambda device: ([Meter()], {"dram": "none", "gpu": "none"}))
    found = inference_energy("dense", TINY["bert"](), tiny_batch("bert", 4), "batch 4", seconds=0.05)
    assert found.energy.joules == {"cpu": 10.0, "dram": None, "gpu": None}
    assert found.energy.kwh == pytest.approx(1.59 * 10 / 3.6e6)
    assert found.rows is not None
    assert found.rows > 4
    assert found.rows % 4 == 0
    assert found.energy.seconds >= 0.05


def test_without_a_sensor_there_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Source: E.6: missing sensors give null, never 0; and nothing is run for long to learn nothing."""
    monkeypatch.setattr(energy_module, "_machine_sensors", lambda device: ([], {"cpu": "no RAPL"}))
    found = inference_energy("dense", TINY["bert"](), tiny_batch("bert", 4), "batch 4", seconds=60.0)
    assert found.energy.kwh is None
    assert found.energy.sensors["cpu"] == "no RAPL"
    assert found.rows == 4


def test_rows_of_gemms_follow_from_the_shapes() -> None:
    """Source: 4 texts of `TOKENS` tokens; BERT's classifier reads one position of each; the tiny ViT 16 patches + 1."""
    plan = make_plan(TINY["bert"](), Recipe.load("magnitude-2-4"))
    rows = gemm_rows(TINY["bert"](), [gemm.name for gemm in plan.gemms], tiny_batch("bert", 4))
    assert {gemm.role: rows[gemm.name] for gemm in plan.gemms} == {
        **dict.fromkeys(("q", "k", "v", "attn_out", "ffn_up", "ffn_down"), 4 * TOKENS),
        **({"final": 4} if any(gemm.role == "final" for gemm in plan.gemms) else {}),
    }
    plan = make_plan(TINY["timm_vit"](), Recipe.load("magnitude-2-4"))
    rows = gemm_rows(TINY["timm_vit"](), [gemm.name for gemm in plan.gemms], tiny_batch("timm_vit", 4))
    assert {rows[gemm.name] for gemm in plan.gemms if gemm.block is not None} == {4 * 17}


def test_the_prediction_uses_these_rows() -> None:
    """Source: the largest GEMM of the plan reads 4 x `TOKENS` rows; three kinds of hardware, none of them run."""
    model = TINY["bert"]()
    found = modelled(model, make_plan(model, Recipe.load("gpusq-gemm-int8")), tiny_batch("bert", 4), "batch 4")
    assert [one.hardware for one in found] == ["A100-SXM-80GB", "H100-SXM", "H200-SXM"]
    assert {one.tokens for one in found} == {4 * TOKENS}
    assert all(one.scope == "gemms" and one.efficiency == "placeholder" for one in found)


def test_training_energy_is_read_from_the_folder(tmp_path: Path) -> None:
    """Source: `pipeline.recording_energy`: an `Energy` and whether the run had been stopped before."""
    assert training_energy("dense", tmp_path) is None
    path = tmp_path / "energy.json"
    path.write_text(json.dumps({**energy(100.0).to_dict(), "resumed": False}), encoding="utf-8")
    found = training_energy("dense", tmp_path)
    assert found is not None
    assert (found.work, found.energy) == ("training, all stages", energy(100.0))
    path.write_text(json.dumps({**energy(100.0).to_dict(), "resumed": True}), encoding="utf-8")
    found = training_energy("dense", tmp_path)
    assert found is not None
    assert found.work == "training, since it was resumed"
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"energy.json is no record of energy"):
        training_energy("dense", tmp_path)


def test_all_of_it_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source: a tiny GPT-2, pruned: generation is timed, rows of the plan's GEMMs are counted on it. Loading in fresh
    processes has its own test (tests/eval/test_eval_loading.py) and is stood in for here."""
    model, dense, recipe = ALL["gpt2"](), ALL["gpt2"](), Recipe.load("magnitude-2-4")
    plan = make_plan(model, recipe)
    attach_(model, plan)
    prune_(model)
    folder = save_checkpoint(model, plan, recipe, tmp_path / "c", name="n", base={"name": "tiny", "revision": None})
    monkeypatch.setattr(energy_module, "_machine_sensors", lambda device: ([], {}))
    parts = [loading("d", 1.0, 500.0), memory("d", 10, 20), loading("c", 1.0, 500.0), memory("c", 5, 10)]
    monkeypatch.setattr(measure, "measure_loadings", lambda *arguments: parts)
    points = [Point(1, 8), Point(2, 8)]
    found = measure.extra_measurements(
        folder, tmp_path, dense, load(folder), points, decode=2, repeats=20, progress=False
    )
    assert [(d.batch, d.prompt, d.new_tokens) for d in found.decode] == [(1, 8, 2), (2, 8, 2)]
    assert [(row.variant, row.loading) for row in found.loading] == [("dense", parts[0]), ("compressed", parts[2])]
    assert [(row.variant, row.memory) for row in found.memory] == [("dense", parts[1]), ("compressed", parts[3])]
    assert [(row.variant, row.rows, row.energy.kwh) for row in found.energy] == [
        ("dense", 2, None), ("compressed", 2, None),
    ]  # fmt: skip
    assert {one.tokens for one in found.modelled} == {16}
    assert found.machine is not None
    assert found.machine.threads == torch.get_num_threads()
