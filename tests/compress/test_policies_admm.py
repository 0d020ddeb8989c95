"""ADMM against `admm_nm.json`, `admm_unstructured.json` and `mask_similarity.json` (float64 traces by hand)."""

import re

import pytest
import torch
from policy_cases import data_for, double, latent, layer, parametrization, vector
from squeezoo.compress.masks import Pattern, check_nm, magnitude_mask
from squeezoo.compress.objective import TrainingError
from squeezoo.compress.policies import AdmmPolicy
from squeezoo.compress.policies.admm import iteration_ends, next_target, schedule_note, shifted, split_target
from squeezoo.compress.policies.base import mask_similarity
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.stages import Admm

NM = vector("admm_nm")
W0, A, RHO, LR = double(NM["W0"]), double(NM["A"]), NM["rho"], NM["lr"]
STEPS, ITERATIONS = NM["steps_per_iteration"], NM["iterations"]
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def test_the_update_rule_reproduces_the_whole_trace():
    """W, Z, U, masks, similarity, residuals and penalty of 6 iterations, by the functions alone."""
    w, mask = W0.clone(), magnitude_mask(W0, Pattern(2, 4))
    target = torch.where(mask, W0, 0)
    assert torch.equal(split_target(target, mask)[1], torch.zeros_like(w))
    for expected in NM["trace"]:
        for _ in range(STEPS):
            w = w - LR * ((w - A) + RHO * (w - target))
        z_before, mask_before = split_target(target, mask)[0], mask
        v = shifted(w, target, mask)
        mask = magnitude_mask(v, Pattern(2, 4))
        target = next_target(v, mask)
        z, u = split_target(target, mask)
        for found, key in ((w, "W"), (z, "Z"), (u, "U")):
            torch.testing.assert_close(found, double(expected[key]), **CLOSE)
        assert torch.equal(mask, double(expected["mask"]).bool())
        assert mask_similarity([mask_before], [mask])[0] == pytest.approx(expected["similarity"])
        assert (w - z).norm().item() == pytest.approx(expected["primal_residual"], rel=1e-6)
        assert RHO * (z - z_before).norm().item() == pytest.approx(expected["dual_residual"], rel=1e-6)
        assert RHO / 2 * (w - z + u).square().sum().item() == pytest.approx(expected["penalty_after"], rel=1e-6)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_the_policy_reproduces_the_whole_trace_under_sgd(layout):
    """The same through an attached layer, the optimizer and the hooks; the records are the trace's own numbers."""
    model = layer(W0, "2:4", layout)
    policy = AdmmPolicy(model, Admm(method="admm", rho=RHO, steps=STEPS), STEPS * ITERATIONS, 7, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    turned = (lambda t: t.t()) if layout == "in_out" else (lambda t: t)
    records = policy.start_(0)
    assert records[0]["iteration"] == 0
    assert records[0]["dual"] == 0
    for step in range(1, STEPS * ITERATIONS + 1):
        optimizer.zero_grad()
        assert torch.equal(model[0].weight, latent(model))  # training is dense
        (0.5 * (turned(model[0].weight) - A).square().sum()).backward()
        policy.after_backward_()
        optimizer.step()
        new = policy.after_step_(step, optimizer, epoch_ends=False)
        if new:
            expected = NM["trace"][len(records) - 1]
            torch.testing.assert_close(turned(latent(model).detach()), double(expected["W"]), **CLOSE)
            if step < STEPS * ITERATIONS:
                assert torch.equal(parametrization(model).mask_OI, double(expected["mask"]).bool())
                assert parametrization(model).apply_mask is not None
            assert {key: new[0][key] for key in ("primal", "dual", "penalty", "similarity")} == pytest.approx(
                {
                    "primal": expected["primal_residual"],
                    "dual": expected["dual_residual"],
                    "penalty": expected["penalty_after"],
                    "similarity": expected["similarity"],
                },
                rel=1e-6,
            )
            assert new[0]["layers"]["0"]["primal"] == pytest.approx(expected["primal_residual"], rel=1e-6)
        records += new
    assert len(records) == ITERATIONS + 1
    policy.finish_()
    policy.release_()
    torch.testing.assert_close(turned(model[0].weight).detach(), double(NM["final_hard_prune"]), **CLOSE)


def test_decoupled_penalty_is_lr_times_rho_of_the_step():
    """W - lr * rho * (W - Z + U) after the optimizer's step, at the rate of that step."""
    model = layer(W0, "2:4")
    policy = AdmmPolicy(model, Admm(method="admm", rho=RHO, decoupled=True, steps=5), 10, 7, 10)
    policy.start_(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0)
    (0.5 * (model[0].weight - A).square().sum()).backward()
    before = latent(model).grad.clone()
    policy.after_backward_()
    assert torch.equal(latent(model).grad, before)
    optimizer.step()
    w = latent(model).detach().clone()
    policy.after_step_(1, optimizer, epoch_ends=False)
    torch.testing.assert_close(
        latent(model).detach(), w - LR * RHO * (w - torch.where(magnitude_mask(W0, Pattern(2, 4)), W0, 0))
    )


def test_unstructured_projection_keeps_half_of_each_matrix():
    """`mask_50` of `admm_unstructured.json`."""
    v = vector("admm_unstructured")
    model = layer(double(v["X"]), "50%")
    policy = AdmmPolicy(model, Admm(method="admm", steps=1), 1, 1, 10)
    policy.start_(0)
    expected = double(v["mask_50"]).bool()
    assert torch.equal(parametrization(model).mask_OI, expected)
    assert torch.equal(policy.targets[0], torch.where(expected, double(v["X"]), 0))


def test_fused_query_key_and_value_are_three_matrices():
    """ALGORITHMS A.3: each third keeps its own half, as separate layers would; N:M masks do not care."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(12, 8, generator=generator) * torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(4)[:, None]
    fused, separate = [], []
    for weights, parts, masks in (([w], 3, fused), (w.chunk(3), 1, separate)):
        for part in weights:
            model = layer(part, "50%", parts=parts)
            AdmmPolicy(model, Admm(method="admm", steps=1), 1, 1, 10).start_(0)
            masks.append(parametrization(model).mask_OI)
    assert torch.equal(fused[0], torch.cat(separate))


def test_mask_similarity_of_the_vector():
    v = vector("mask_similarity")
    previous, current = double(v["prev"]).bool(), double(v["cur"]).bool()
    assert mask_similarity([previous], [current])[0] == v["similarity"]
    # Over several matrices: the ratio of sums, not the mean of ratios.
    total, each = mask_similarity([previous, torch.ones(1, 48).bool()], [current, torch.ones(1, 48).bool()])
    assert (total, each) == ((0.5 * 16 + 48) / 64, [0.5, 1.0])


@pytest.mark.parametrize(
    ("steps", "total", "per_epoch", "samples", "ends"),
    [
        (None, 780, 78, 2490, list(range(78, 781, 78))),  # RTE: 10 epochs of 78 steps, 10 iterations
        (None, 9822, 3274, 104743, [196 * k for k in range(1, 50)] + [9822]),  # QNLI, 3 epochs: about 50 iterations
        (None, 1000, 500, 40000, [80 * k for k in range(1, 12)] + [1000]),  # at least 80 steps each
        (None, 195, 78, 2490, [78, 195]),  # the rest joins the last one, which ends at the last step
        (30, 20, 78, 2490, [20]),
    ],
)
def test_iterations_of_the_schedule(steps, total, per_epoch, samples, ends):
    """ALGORITHMS B.3: one iteration per epoch below 20,000 samples, else max(80, total // 50) steps."""
    assert iteration_ends(Admm(method="admm", steps=steps), total, per_epoch, samples) == ends


def test_evaluation_sees_hard_pruned_weights_and_training_goes_on_dense():
    model = layer(W0, "2:4")
    policy = AdmmPolicy(model, Admm(method="admm", rho=RHO, steps=STEPS), 10, 7, 10)
    policy.start_(0)
    with torch.no_grad():
        latent(model).copy_(A)  # training has moved on; the supports are those of W0
    support = parametrization(model).mask_OI.clone()
    with policy.pruned():
        assert torch.equal(model[0].weight, torch.where(magnitude_mask(A, Pattern(2, 4)), A, 0))
    assert torch.equal(model[0].weight, A)
    assert torch.equal(parametrization(model).mask_OI, support)


def test_masked_epochs_train_under_the_final_mask():
    """10 steps, 2 epochs of 5, the last one masked: pruned at step 5, and no penalty after that."""
    model = layer(W0, "2:4")
    policy = AdmmPolicy(model, Admm(method="admm", rho=RHO, steps=5, masked_epochs=1), 10, 5, 10)
    assert policy.ends == [5]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    policy.start_(0)
    for step in range(1, 11):
        optimizer.zero_grad()
        (0.5 * (model[0].weight - A).square().sum()).backward()
        before = latent(model).grad.clone()
        policy.after_backward_()
        assert torch.equal(latent(model).grad, before) == (step > 5)
        optimizer.step()
        policy.after_step_(step, optimizer, epoch_ends=step % 5 == 0)
        assert check_nm(model[0].weight, Pattern(2, 4)) == (step >= 5)
    # Under the fixed mask plain SGD goes to A on the kept weights.
    mask = parametrization(model).mask_OI
    assert (model[0].weight - A)[mask].norm() < (double(NM["trace"][0]["W"]) - A)[mask].norm()


def test_refused():
    with pytest.raises(TrainingError, match="masked_epochs 2 are 10 steps, which leaves none of the stage's 10"):
        AdmmPolicy(layer(W0, "2:4"), Admm(method="admm", masked_epochs=2), 10, 5, 10)
    with pytest.raises(ValueError, match="rho"):
        Admm(method="admm", rho=-1e-3)
    with pytest.raises(TrainingError, match="policy admm moves masks, but no attached GEMM has sparsity"):
        AdmmPolicy(torch.nn.Sequential(torch.nn.Linear(4, 4)), Admm(method="admm"), 1, 1, 1)


@pytest.mark.parametrize(
    ("settings", "total", "per_epoch", "samples", "message"),
    [
        ({}, 800, 80, 2560, ""),  # one iteration an epoch, 10 of 80 steps
        ({}, 2000, 2000, 64000, ""),  # max(80, 2000 // 50): 25 of 80
        ({}, 575, 115, 3668, r"5 iterations of 115 steps, .* write `epochs: 10` or more \(or `steps: 1150` instead"),
        ({}, 780, 78, 2490, r"10 iterations of 78 steps, .* write `steps: 80` in the policy and `epochs: 11` or more"),
        ({"steps": 40}, 800, 100, 3200, r"20 iterations of 40 steps, .* `steps: 80` in the policy and `epochs: 8` or"),
        ({"masked_epochs": 5}, 1000, 100, 3200, r"5 iterations of 100 steps, .* write `epochs: 15` or more"),
        ({"steps": 100}, 50, 25, 400, r"1 iteration of 50 steps"),
    ],
)
def test_schedules_too_short_for_admm_are_told(settings, total, per_epoch, samples, message):
    """ALGORITHMS B.3: an iteration needs at least 80 steps, and there must be at least 10."""
    note = schedule_note(Admm(method="admm", **settings), total, per_epoch, samples)
    assert re.search(message, note) if message else note == ""


def test_a_run_says_that_its_admm_is_short_before_it_trains(tmp_path):
    """Once, by the engine; a stage of another policy says nothing."""
    from squeezoo.compress.engine import compress
    from squeezoo.models.dense import Dense
    from tiny import TINY

    for recipe, expected in (("nxm-admm", 1), ("asp-2-4", 0)):
        said = []
        dense = Dense(TINY["timm_vit"](), None, "tiny", None, "timm")
        chosen = Recipe.load(recipe).override(epochs=1, batch_size=4)
        compress(dense, chosen, data_for("timm_vit"), tmp_path / recipe, say=said.append)
        found = [i for i, line in enumerate(said) if "needs at least 10 of at least 80" in line]
        assert found == [0] * expected
        assert all(said[i].startswith("note: stage 1: ADMM will have 1 iteration of 3 steps") for i in found)
