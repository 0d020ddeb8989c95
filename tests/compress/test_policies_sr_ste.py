"""SR-STE against `sr_ste.json` (NM-sparsity/NM-sparsity, Sparse.apply), and how its masks move."""

import pytest
import torch
from policy_cases import double, latent, layer, parametrization, vector
from squeezoo.compress.masks import Pattern, check_nm, magnitude_mask
from squeezoo.compress.objective import TrainingError
from squeezoo.compress.policies import SrStePolicy
from squeezoo.compress.policies.sr_ste import straight_through
from squeezoo.compress.stages import SrSte

VECTOR = vector("sr_ste")


def policy_on(w_OI, pattern="2:4", layout="out_in", **settings):
    model = layer(w_OI, pattern, layout)
    policy = SrStePolicy(model, SrSte(method="sr_ste", **settings), total=100)
    policy.start_(0)
    return model, policy


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize(
    ("pattern", "decay", "expected"),
    [
        ("2:4", 2e-4, "grad_2_4_lambda_0p0002"),
        ("2:4", 0.5, "grad_2_4_lambda_0p5"),
        ("2:4", 0.0, "grad_output"),
        ("1:4", 0.0, "grad_1_4_lambda_0"),
    ],
)
def test_forward_and_gradient_of_the_public_code(pattern, decay, expected, layout):
    """`forward_*` and `grad_*`; with lambda 0 the incoming gradient goes straight through."""
    model, policy = policy_on(double(VECTOR["weight"]), pattern, layout, decay=decay)
    used = model[0].weight if layout == "out_in" else model[0].weight.t()
    assert torch.equal(used, double(VECTOR[f"forward_{pattern.replace(':', '_')}"]))
    (used * double(VECTOR["grad_output"])).sum().backward()
    policy.after_backward_()
    grad = latent(model).grad if layout == "out_in" else latent(model).grad.t()
    torch.testing.assert_close(grad, double(VECTOR[expected]), rtol=1e-5, atol=1e-6)


def test_decay_counts_once_however_many_batches_a_gradient_is_made_of():
    """Gradient accumulation: two halves of a batch, then the decay; the equation has it once per optimizer step."""
    model, policy = policy_on(double(VECTOR["weight"]), decay=0.5)
    for _ in range(2):
        (model[0].weight * double(VECTOR["grad_output"]) / 2).sum().backward()
    policy.after_backward_()
    torch.testing.assert_close(latent(model).grad, double(VECTOR["grad_2_4_lambda_0p5"]), rtol=1e-5, atol=1e-6)


def test_decoupled_decay_moves_pruned_weights_alone_by_lr_times_decay():
    w, lr, decay = double(VECTOR["weight"]), 0.1, 0.5
    model, policy = policy_on(w, decay=decay, decoupled=True)
    mask = parametrization(model).mask_OI.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model[0].weight.sum().mul(0).backward()
    policy.after_backward_()
    optimizer.step()
    policy.after_step_(1, optimizer, epoch_ends=False)
    torch.testing.assert_close(latent(model).detach(), torch.where(mask, w, w * (1 - lr * decay)))


def test_a_quantizers_gradient_comes_from_kept_weights_alone():
    """q = 3 w: kept entries get 3 g (through the quantizer), pruned ones g (straight)."""
    w = double(VECTOR["weight"]).requires_grad_()
    mask = magnitude_mask(w.detach(), Pattern(2, 4))
    factor = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    g = double(VECTOR["grad_output"])
    (straight_through(w * factor, w, mask) * g).sum().backward()
    torch.testing.assert_close(w.grad, torch.where(mask, 3 * g, g))
    torch.testing.assert_close(factor.grad, (w.detach() * g * mask).sum())


def test_masks_follow_the_weights_and_pruned_weights_come_back():
    """A target far from the start, reached through the mask: W ends on it where it is kept, the mask is its own."""
    generator = torch.Generator().manual_seed(0)
    start, goal = (torch.randn(16, 32, generator=generator) for _ in range(2))
    goal = torch.where(magnitude_mask(goal, Pattern(2, 4)), goal, 0)
    model, policy = policy_on(start, decay=2e-4)
    first = parametrization(model).mask_OI.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    records = []
    for step in range(1, 101):
        optimizer.zero_grad()
        (0.5 * (model[0].weight - goal).square().sum()).backward()
        policy.after_backward_()
        optimizer.step()
        records += policy.after_step_(step, optimizer, epoch_ends=step % 50 == 0)
    policy.finish_()
    policy.release_()
    final = model[0].weight.detach()
    assert check_nm(final, Pattern(2, 4))
    assert not torch.equal(parametrization(model).mask_OI, first)
    # A group whose wrong weights hold its mask decays too slowly to leave it in 100 steps; most find their goal.
    assert (final - goal).norm() < 0.3 * (torch.where(first, start, 0) - goal).norm()
    assert [record["kind"] for record in records] == ["sr_ste", "sr_ste"]
    assert records[0]["similarity"] < 1
    assert records[1]["similarity"] >= records[0]["similarity"]
    assert records[0]["layers"] == {"0": records[0]["similarity"]}


def test_refused():
    with pytest.raises(TrainingError, match=r"sr_ste needs N:M sparsity, 0 has 50% zeros.*policy admm"):
        SrStePolicy(layer(torch.ones(4, 8), "50%"), SrSte(method="sr_ste"), 1)
    with pytest.raises(TrainingError, match="no attached GEMM has sparsity"):
        SrStePolicy(torch.nn.Sequential(torch.nn.Linear(4, 4)), SrSte(method="sr_ste"), 1)
    with pytest.raises(ValueError, match="decay"):
        SrSte(method="sr_ste", decay=-1e-4)
