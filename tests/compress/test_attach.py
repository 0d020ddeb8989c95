"""Attaching a plan and folding it, on one tiny random model per adapter."""

import copy

import pytest
import torch
from squeezoo.compress.attach import attach_, compressed_weights, deactivate_, fold_, prune_, quantizers
from squeezoo.compress.calibrate import CalibrationError, calibrate_
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.plan import Plan, PlanError, make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.models.dense import logits
from tiny import TINY, tiny_batch

GPUSQ = Recipe.load("gpusq-gemm-int8")
TWO_FOUR = Pattern.parse("2:4")


@pytest.fixture(params=list(TINY))
def name(request):
    return request.param


def outputs(model, name):
    with torch.no_grad():
        return logits(model, tiny_batch(name))


def compressed(name):
    """A tiny model, pruned and quantized with gpusq-gemm-int8, without training."""
    model = TINY[name]()
    attach_(model, make_plan(model, GPUSQ))
    prune_(model)
    calibrate_(model, [tiny_batch(name)])
    return model


def test_attached_equals_the_original_until_a_stage_fills_it(name):
    """Masks all true and quantizers off are the identity: equal to 1e-5 (float32)."""
    original, model = TINY[name](), TINY[name]()
    attach_(model, make_plan(model, GPUSQ))
    torch.testing.assert_close(outputs(model, name), outputs(original, name), atol=1e-5, rtol=0)


def test_an_empty_recipe_attaches_nothing(name):
    model = TINY[name]()
    plan = make_plan(model, Recipe.load("dense"))
    attach_(model, plan)
    assert plan.gemms == ()
    assert list(compressed_weights(model)) == []


def test_pruning_gives_two_of_four_everywhere(name):
    model = compressed(name)
    weights = [module.weight for _, module, _ in compressed_weights(model)]
    assert len(weights) == len(make_plan(TINY[name](), GPUSQ).gemms)
    for weight in weights:
        assert check_nm(weight, TWO_FOUR)
        assert weight.count_nonzero() <= weight.numel() // 2


def test_gradients_are_zero_under_the_mask_and_training_keeps_the_zeros(name):
    """ASP, step 4: masked weights get no gradient and stay zero, in spite of momentum and weight decay."""
    model = compressed(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    masks = {n: p.mask_OI.clone() for n, _, p in compressed_weights(model)}
    for step in range(3):
        batch = tiny_batch(name, seed=step)
        torch.nn.functional.cross_entropy(logits(model, batch), batch["labels"]).backward()
        for n, module, _ in compressed_weights(model):
            gradient = module.parametrizations["weight"].original.grad
            assert not gradient[~masks[n]].any()
            assert gradient[masks[n]].any()
        optimizer.step()
        optimizer.zero_grad()
    for n, module, parametrization in compressed_weights(model):
        assert torch.equal(parametrization.mask_OI, masks[n])
        assert not module.weight[~masks[n]].any()


def test_scales_learn(name):
    """Every weight scale and input scale gets a gradient (LSQ)."""
    model = compressed(name)
    batch = tiny_batch(name, seed=1)
    torch.nn.functional.cross_entropy(logits(model, batch), batch["labels"]).backward()
    found = dict(quantizers(model))
    assert len(found) > 4
    assert all(q.scale.grad is not None and q.scale.grad.any() for q in found.values())


def test_folding_restores_keys_classes_shapes_and_keeps_the_weights(name):
    original, model = TINY[name](), compressed(name)
    expected = {n: module.weight.detach().clone() for n, module, _ in compressed_weights(model)}
    fold_(model)
    assert model.state_dict().keys() == original.state_dict().keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert all(model.state_dict()[k].shape == v.shape for k, v in original.state_dict().items())
    assert all(torch.equal(dict(model.named_modules())[n].weight, w) for n, w in expected.items())
    assert all(not m._forward_pre_hooks for m in model.modules())


def test_folding_a_pruned_model_changes_no_output(name):
    """Without quantizers the folded model is the attached one, bit for bit."""
    model = TINY[name]()
    attach_(model, make_plan(model, Recipe.load("magnitude-2-4")))
    prune_(model)
    before = outputs(model, name)
    fold_(model)
    assert torch.equal(outputs(model, name), before)


def test_a_deep_copy_is_independent(name):
    """The copy's input hooks use the copy's quantizers, and both give the same outputs."""
    model = compressed(name)
    twin = copy.deepcopy(model)
    before = outputs(model, name)
    assert torch.equal(outputs(twin, name), before)
    deactivate_(twin)
    assert torch.equal(outputs(model, name), before)
    assert not torch.equal(outputs(twin, name), before)
    fold_(twin)  # torch gives a deep copy the original's class; folding one must not break the other
    assert torch.equal(outputs(model, name), before)


def test_state_dict_round_trip_restores_masks_scales_and_activity(name):
    model, fresh = compressed(name), TINY[name]()
    attach_(fresh, make_plan(fresh, GPUSQ))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(fresh, name), outputs(model, name))


def test_torch_compile_runs_an_attached_model(name):
    model = compressed(name)
    compiled = torch.compile(lambda batch: logits(model, batch), backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tiny_batch(name)), outputs(model, name))


def test_q_k_and_v_share_one_input_scale():
    """They read one tensor, and LSQ has one scale per activation tensor; the runtime quantizes it once."""
    plan = make_plan(TINY["bert"](), GPUSQ)
    owners = {g.name: g.input_owner for g in plan.gemms if g.block == 0}
    prefix = "bert.encoder.layer.0.attention.self"
    assert {owners[f"{prefix}.{part}"] for part in ("query", "key", "value")} == {f"{prefix}.query"}
    assert len(set(owners.values())) == 4


def test_a_layer_whose_in_features_is_no_multiple_of_m(name):
    """A.4: the tail keeps min(N, r), the mask applies, and the plan says that no kernel takes the layer."""
    model = TINY["bert"]()
    model.classifier = torch.nn.Linear(32, 3)
    block = model.bert.encoder.layer[0]
    block.intermediate.dense = torch.nn.Linear(32, 62)
    block.output.dense = torch.nn.Linear(62, 32)
    plan = make_plan(model, GPUSQ)
    ragged = next(g for g in plan.gemms if g.shape == (32, 62))
    assert (ragged.accelerated, ragged.reason) == (False, "in_features 62 is not a multiple of 16")
    attach_(model, plan)
    prune_(model)
    weight = block.output.dense.weight
    assert check_nm(weight, TWO_FOUR)
    assert (weight[:, 60:] != 0).all()


def test_a_refused_plan_leaves_the_model_untouched():
    """All checks come before the first change."""
    model, other = TINY["bert"](), TINY["bert"]()
    other.bert.encoder.layer[1].output.dense = torch.nn.Linear(60, 32)
    keys = list(other.state_dict())
    with pytest.raises(PlanError, match=r"made for shape \(32, 64\), the model has \(32, 60\)"):
        attach_(other, make_plan(model, GPUSQ))
    assert list(other.state_dict()) == keys
    attach_(model, make_plan(model, GPUSQ))
    with pytest.raises(PlanError, match="attached already"):
        attach_(model, make_plan(TINY["bert"](), GPUSQ))


def test_plans_survive_json_and_print(name):
    import json

    plan = make_plan(TINY[name](), GPUSQ)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    text = plan.summary()
    assert "2:4 kept, int8 weights, int8 inputs" in text
    assert "no 2:4 kernel: out_features 3 is not a multiple of 8" in text


def test_recipes_that_do_not_fit_the_model_are_refused():
    model = TINY["bert"]()
    rule = {"roles": ["block"], "sparsity": "2:4", "skip_blocks": [5]}
    recipe = {"name": "r", "description": "d", "source": "s", "rules": [rule], "stages": [{"stage": "prune"}]}
    with pytest.raises(PlanError, match=r"skips block 5; this model has blocks 0 to 1"):
        make_plan(model, Recipe.parse(recipe))
    rule |= {"skip_blocks": [1]}
    plan = make_plan(model, Recipe.parse(recipe))
    assert {g.block for g in plan.gemms} == {0}
    assert plan.skipped[0][1] == "the recipe skips block 1"
    rule |= {"roles": ["cross_q"], "skip_blocks": []}
    with pytest.raises(PlanError, match="nothing to do"):
        make_plan(model, Recipe.parse(recipe))


def test_calibration_without_data_or_with_nan_is_refused(name):
    model = TINY[name]()
    attach_(model, make_plan(model, GPUSQ))
    with pytest.raises(CalibrationError, match="at least one batch"):
        calibrate_(model, [])
    batch = tiny_batch(name)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"calibration batch 0: .*NaN"):
        calibrate_(model, [batch])
    assert not any(q.active for _, q in quantizers(model))
