"""What a plan leaves alone and why: projections tied to the embedding, embeddings of models that have no tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from squeezoo.compress.checkpoint import load
from squeezoo.compress.engine import compress
from squeezoo.compress.plan import PlanError, make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.train_data import TrainData
from squeezoo.models import adapter_for, find_sites
from squeezoo.models.dense import Dense, library_of, logits
from tiny import ALL, ROWS, tiny_batch

TIED = [name for name, row in ROWS.items() if row.tied]
NO_TABLES = ("vit", "deit", "dinov2", "timm_vit", "timm_deit", "wav2vec2", "wav2vec2_classification", "hubert")
INT8 = {"weight": {"method": "q8bert"}, "input": {"method": "q8bert"}}


def recipe(rule: dict[str, Any], **more: Any) -> Recipe:
    stages = [{"stage": "prune"}] if "sparsity" in rule else []
    stages += [{"stage": "calibrate", "batches": 1}] if "weight" in rule else []
    rules = [{"roles": ["block", "final"], **rule}]
    return Recipe.parse({"name": "r", "description": "d", "source": "s", "rules": rules, "stages": stages, **more})


def dense_for(name: str) -> Dense:
    model = ALL[name]()
    return Dense(model, None, name, None, library_of(model))


def data_for(name: str) -> TrainData:
    batch = tiny_batch(name, 8)
    features = [{key: value[i] for key, value in batch.items()} for i in range(8)]
    return TrainData(features, lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]})


@pytest.mark.parametrize(
    ("rule", "more", "why"),
    [
        ({"sparsity": "2:4"}, {}, "to prune it would prune the embedding too"),
        (INT8, {}, "to quantize it would quantize the embedding too"),
        ({"sparsity": "2:4", **INT8}, {}, "to prune and quantize it would prune and quantize the embedding too"),
        (INT8, {"embeddings": {}}, "its inputs are not quantized"),
    ],
)
def test_a_tied_projection_is_left_for_what_the_recipe_does(rule: Any, more: Any, why: str) -> None:
    plan = make_plan(ALL["gpt2"](), recipe(rule, **more))
    assert dict(plan.skipped)["lm_head"].startswith("left as it is, being tied to the input embedding")
    assert f"note: lm_head: {dict(plan.skipped)['lm_head']}" in plan.summary()
    assert why in plan.summary()
    assert "`untie_final_projection: true`" in plan.summary()


@pytest.mark.parametrize("built_in", ["imp-70-task", "imp-dq"])
def test_a_matrix_that_the_pruned_model_did_not_have_is_planned_dense(built_in: str) -> None:
    """Known from its weights: a pooler without a zero. With one zero it counts, and inside a block always."""
    model = ALL["bert"]()
    plan = make_plan(model, Recipe.load(built_in))
    found = {gemm.name: gemm.sparsity for gemm in plan.gemms}
    assert found.pop("bert.pooler.dense", None) is None
    assert found.pop("classifier", None) is None
    assert set(found.values()) == {"70%"}
    assert "note: bert.pooler.dense: stays without zeros: it has none to inherit" in plan.summary()
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] = 0
    plan = make_plan(model, Recipe.load(built_in))
    assert {gemm.sparsity for gemm in plan.gemms if gemm.name == "bert.pooler.dense"} == {"70%"}
    assert plan.skipped == ()


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("built_in", ["dq", "imp-dq", "q8bert"])
def test_recipes_of_every_linear_quantize_a_copy(built_in: str, name: str) -> None:
    """A.3: DQ and Q8BERT quantize all Linear layers. The summary says what that costs: vocabulary 128 x width 32."""
    plan = make_plan(ALL[name](), Recipe.load(built_in))
    head = ROWS[name].final
    assert plan.untied == head
    (planned,) = [gemm for gemm in plan.gemms if gemm.name == head]
    assert planned.weight is not None
    assert planned.input is not None
    assert head not in dict(plan.skipped)
    assert f"{head} gets a matrix of its own, no longer the embedding: 4,096 weights more" in plan.summary()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert_mlm", "bart"])
def test_dynamic_quantization_of_a_tied_head_leaves_the_embedding(name: str, tmp_path: Path) -> None:
    """Expected by hand from D.8: s = max|w| / 127.5, q = clamp(round(w / s), -128, 127); tables as float16."""
    dense = dense_for(name)
    w_OI = dense.model.get_submodule(ROWS[name].final).weight.detach().clone()
    assert isinstance(w_OI, torch.Tensor)
    model = load(compress(dense, "dq", None, tmp_path / "out").folder, backend="reference")
    scale = w_OI.abs().max() / 127.5
    expected = (w_OI / scale).round().clamp(-128, 127) * scale
    found = model.get_submodule(ROWS[name].final).weight
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=float(scale) / 100)
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    assert torch.equal(table, w_OI.half().float())
    with torch.inference_mode():
        assert logits(model, tiny_batch(name)).isfinite().all()


@pytest.mark.parametrize("name", NO_TABLES)
def test_q8bert_where_there_are_no_tables(name: str) -> None:
    """All of the model's linears that a role names; the tables are told, not refused."""
    model = ALL[name]()
    plan = make_plan(model, Recipe.load("q8bert"))
    sites = find_sites(model, adapter_for(model))
    assert len(plan.gemms) == len(sites.gemms) + len(sites.pooler) + (sites.final is not None)
    assert plan.embeddings == ()
    assert "note: embeddings: this model has no embedding table" in plan.summary()


@pytest.mark.parametrize("name", ["timm_vit", "wav2vec2"])
def test_q8bert_trains_images_and_speech(name: str, tmp_path: Path) -> None:
    short = Recipe.load("q8bert").override(epochs=1, batch_size=4)
    made = compress(dense_for(name), short, data_for(name), tmp_path / "out")
    model = load(made.folder, backend="reference")
    with torch.inference_mode():
        assert logits(model, tiny_batch(name)).isfinite().all()


def test_a_recipe_of_embeddings_alone_needs_a_table() -> None:
    alone = Recipe.parse({"name": "r", "description": "d", "source": "s", "embeddings": {}})
    with pytest.raises(PlanError, match=r"asks for int8 embeddings and nothing else.*no embedding table: add `rules`"):
        make_plan(ALL["vit"](), alone)
    assert len(make_plan(ALL["bert"](), alone).embeddings) == 3
