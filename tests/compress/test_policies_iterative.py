"""IMP against `imp_global.json` (torch.nn.utils.prune.global_unstructured as VITA-Group/BERT-Tickets calls it)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import double, latent, layers, parametrization, vector
from squeezoo.compress.objective import TrainingError
from squeezoo.compress.policies import IterativePolicy
from squeezoo.compress.policies.iterative import amount, prune_smallest
from squeezoo.compress.stages import Iterative

VECTOR = vector("imp_global")
WEIGHTS = [double(VECTOR["w1"]), double(VECTOR["w2"])]
DRIFTS = [double(VECTOR["drift1"]), double(VECTOR["drift2"])]


def trained(event):
    """The weights that an event ranks. The vector's masks are those of w0 + (k - 1) * drift before event k >= 1 (its
    text says k * drift, which fits none of the events 1 to 6)."""
    return [w + max(0, event - 1) * d for w, d in zip(WEIGHTS, DRIFTS)]


def expected_masks(event):
    return [double(VECTOR["steps"][event][f"mask{i}"]).bool() for i in (1, 2)]


def test_seven_events_of_the_public_code():
    """Masks of each event, and zeros 12, 24, ... of 120. The weights before an event are those of `trained`."""
    masks = [torch.ones_like(w, dtype=torch.bool) for w in WEIGHTS]
    for event, expected in enumerate(VECTOR["steps"]):
        masks = prune_smallest(trained(event), masks, amount(0.1, event))
        assert all(torch.equal(m, e) for m, e in zip(masks, expected_masks(event)))
        assert sum(int((~m).sum()) for m in masks) == expected["zeros"]


@pytest.mark.parametrize("start_from", ["trained", "rewound"])
def test_the_policy_prunes_rewinds_and_starts_the_optimizer_anew(monkeypatch, start_from):
    """The vector's drifts as training: masks of all 7 events, weights back at w0, Adam's state gone, at each event."""
    model = layers(WEIGHTS, "70%")
    head = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    monkeypatch.setattr("squeezoo.compress.policies.iterative.backbone_parameters", lambda student: model.parameters())
    settings = Iterative(method="iterative", interval=3, start_from=start_from)
    policy = IterativePolicy(model, settings)
    assert (policy.total, policy.period) == (21, 3)
    optimizer = torch.optim.AdamW([*model.parameters(), head], lr=1e-3)
    records = policy.start_(0)
    assert records[0]["zeros"] == 12  # pruned before any training
    for step in range(1, policy.total + 1):
        (sum(m.weight.sum() for m in model) + head).backward()
        optimizer.step()
        with torch.no_grad():  # the training of the vector
            for index, w in enumerate(trained(len(records))):
                latent(model, index).copy_(w)
            head.add_(1)
        new = policy.after_step_(step, optimizer, epoch_ends=False)
        assert bool(new) == (step % 3 == 0 and step < 21)
        if new:
            masks = [parametrization(model, i).mask_OI for i in (0, 1)]
            assert all(torch.equal(m, e) for m, e in zip(masks, expected_masks(len(records))))
            assert all(torch.equal(latent(model, i), w) for i, w in enumerate(WEIGHTS))
            assert not optimizer.state
        records += new
    assert [record["zeros"] for record in records] == [12, 24, 36, 48, 60, 72, 84]
    assert [record["pruned"] for record in records] == [12] * 7
    assert records[-1]["sparsity"] == pytest.approx(0.7)
    assert head.item() > 20  # the head is not rewound
    policy.finish_()
    expected = WEIGHTS if start_from == "rewound" else trained(7)
    assert all(torch.equal(latent(model, i), w) for i, w in enumerate(expected))
    assert all(torch.equal(m.weight, w * mask) for m, w, mask in zip(model, expected, expected_masks(6)))


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.sampled_from([0.05, 0.1, 0.2, 0.25]),
    st.integers(0, 2**31),
)
def test_pruned_weights_stay_pruned_and_counts_follow_the_rule(sizes, step, seed):
    """k = round(amount * survivors) at each event, also with many equal weights; no mask grows."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.ones(1, n, dtype=torch.bool) for n in sizes]
    survivors = sum(sizes)
    for event in range(3):
        weights = [torch.randint(-3, 4, (1, n), generator=generator).float() for n in sizes]
        before = masks
        masks = prune_smallest(weights, masks, amount(step, event))
        survivors -= round(amount(step, event) * survivors)
        assert sum(int(m.sum()) for m in masks) == survivors
        assert not any(bool((m & ~b).any()) for m, b in zip(masks, before))
        gone = torch.cat([w.abs()[b & ~m] for w, m, b in zip(weights, masks, before)])
        left = torch.cat([w.abs()[m] for w, m in zip(weights, masks)])
        assert not len(gone) or not len(left) or gone.max() <= left.min()


def test_number_of_events():
    assert [Iterative(method="iterative").events(zeros) for zeros in (0.1, 0.3, 0.7, 0.9)] == [1, 3, 7, 9]
    assert Iterative(method="iterative", step=0.05).events(0.35) == 7
    with pytest.raises(ValueError, match=r"0\.75 is no multiple of that: write sparsity 70% or 80%"):
        Iterative(method="iterative").events(0.75)
    with pytest.raises(ValueError, match="write sparsity 10%"):
        Iterative(method="iterative").events(0.03)


def test_refused():
    with pytest.raises(TrainingError, match="one share of zeros, such as '70%'; found 2:4"):
        IterativePolicy(layers(WEIGHTS[:1], "2:4"), Iterative(method="iterative"))
    with pytest.raises(ValueError, match="finite weights"):
        prune_smallest([torch.tensor([[float("nan"), 1.0]])], [torch.ones(1, 2, dtype=torch.bool)], 0.5)
