"""Masks from weights alone: N:M and unstructured, per matrix and global, and inherited from zeros that are there."""

import pytest
import torch
from squeezoo.compress.attach import (
    MaskError,
    attach_,
    compressed_weights,
    fold_,
    inherit_masks_,
    latent_OI,
    magnitude_masks_,
    prune_,
)
from squeezoo.compress.masks import Pattern, magnitude_mask
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from tiny import ALL


def attached(name, sparsity, model=None, roles=("block",)):
    model = ALL[name]() if model is None else model
    rule = {"roles": list(roles), "sparsity": sparsity}
    body = {"name": "r", "description": "d", "source": "s", "rules": [rule], "stages": [{"stage": "prune"}]}
    attach_(model, make_plan(model, Recipe.parse(body)))
    return model


def masks(model):
    return {name: p.mask_OI.clone() for name, _, p in compressed_weights(model)}


def test_a_share_of_each_matrix():
    """B.4: round(share * size) zeros in each matrix, in each of Q, K and V of a fused one, the smallest |w| first."""
    for name in ("bert", "timm_vit", "gpt2"):
        model = attached(name, "70%")
        magnitude_masks_(model)
        for _, module, p in compressed_weights(model):
            for w_OI, mask_OI in zip(latent_OI(module, p).chunk(p.parts), p.mask_OI.chunk(p.parts), strict=True):
                assert int((~mask_OI).sum()) == round(0.7 * mask_OI.numel())
                assert w_OI[~mask_OI].abs().max() <= w_OI[mask_OI].abs().min()


def test_one_threshold_over_all_matrices():
    """B.6: exactly round(share * total) zeros, unevenly spread, no pruned weight larger than a kept one."""
    model = attached("bert", "70%", roles=("block", "pooler"))
    with torch.no_grad():
        model.bert.pooler.dense.parametrizations["weight"].original.mul_(100)
    magnitude_masks_(model, "global")
    found = list(compressed_weights(model))
    total = sum(p.mask_OI.numel() for *_, p in found)
    assert sum(int((~p.mask_OI).sum()) for *_, p in found) == round(0.7 * total)
    pruned = max(latent_OI(m, p)[~p.mask_OI].abs().max() for _, m, p in found if not p.mask_OI.all())
    kept = min(latent_OI(m, p)[p.mask_OI].abs().min() for _, m, p in found)
    assert pruned <= kept
    assert dict((n, p) for n, _, p in found)["bert.pooler.dense"].mask_OI.float().mean() > 0.9


def test_equal_weights_are_pruned_from_the_end():
    """A.4: among equals the lower index is kept; the same in every run."""
    model = attached("bert", "50%")
    with torch.no_grad():
        for _, module, p in compressed_weights(model):
            latent_OI(module, p).fill_(0.5)
    magnitude_masks_(model)
    for *_, p in compressed_weights(model):
        flat = p.mask_OI.flatten()
        assert flat[: flat.numel() // 2].all()
        assert not flat[flat.numel() // 2 :].any()


def test_patterns_ignore_the_scope():
    one, other = attached("bert", "1:4"), attached("bert", "1:4")
    prune_(one)
    magnitude_masks_(other, "global")
    for (name, mask), (_, module, p) in zip(masks(one).items(), compressed_weights(other), strict=True):
        assert torch.equal(mask, p.mask_OI), name
        assert torch.equal(mask, magnitude_mask(latent_OI(module, p), Pattern(1, 4)))


def test_a_weight_that_is_no_number_leaves_all_masks():
    for sparsity in ("2:4", "50%"):
        model = attached("bert", sparsity)
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.parametrizations["weight"].original[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"layer\.1\.output\.dense: expected weights without NaN, found 1"):
            magnitude_masks_(model)
        assert all(mask.all() for mask in masks(model).values())
    with pytest.raises(ValueError, match="scope 'layer' or 'global', found 'all'"):
        magnitude_masks_(model, "all")


@pytest.mark.parametrize(("sparsity", "scope"), [("2:4", "layer"), ("70%", "layer"), ("70%", "global")])
def test_masks_are_inherited_from_a_pruned_model(sparsity, scope):
    """A folded pruned model, attached again, gets the masks that made it (no weight of it is zero by chance)."""
    for name in ("bert", "gpt2"):
        first = attached(name, sparsity)
        magnitude_masks_(first, scope)
        expected = masks(first)
        fold_(first)
        again = attached(name, sparsity, first)
        inherit_masks_(again)
        assert all(torch.equal(mask, expected[n]) for n, mask in masks(again).items())


def test_a_dense_model_has_nothing_to_inherit():
    model = attached("bert", "2:4")
    with pytest.raises(
        MaskError, match=r"attention\.self\.query: expected 2:4 .*found 256 of 256 groups with more \(0\.00%"
    ):
        inherit_masks_(model)
    model = attached("bert", "2:4")
    prune_(model)
    fold_(model)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, :4] = 1.0
    again = attached("bert", "2:4", model)
    with pytest.raises(MaskError, match=r"layer\.1\.output\.dense: .* found 1 of 512 groups with more \(49\.9"):
        inherit_masks_(again)
    assert all(mask.all() for mask in masks(again).values())
    model = attached("bert", "60%")
    magnitude_masks_(model)
    fold_(model)
    again = attached("bert", "70%", model)
    with pytest.raises(MaskError, match=r"expected 70\.0000% zeros to inherit, found 59\.98.*has the fewest"):
        inherit_masks_(again)
    assert all(mask.all() for mask in masks(again).values())


def test_a_matrix_that_the_pruned_model_did_not_have_stays_dense():
    """Only outside the blocks: a dense matrix inside one counts, and a dense model has nothing to inherit."""
    model = attached("bert", "70%")
    magnitude_masks_(model)
    expected = masks(model)
    fold_(model)
    again = attached("bert", "70%", model, roles=("block", "pooler"))
    assert inherit_masks_(again) == ("bert.pooler.dense",)
    found = masks(again)
    assert found.pop("bert.pooler.dense").all()
    assert all(torch.equal(mask, expected[name]) for name, mask in found.items())
    fold_(again)
    with torch.no_grad():
        again.bert.encoder.layer[0].output.dense.weight.fill_(1.0)
    with pytest.raises(MaskError, match=r"found 6.*layer\.0\.output\.dense has the fewest: 0\.0000%"):
        inherit_masks_(attached("bert", "70%", again, roles=("block", "pooler")))
    with pytest.raises(MaskError, match=r"found 0\.0000%"):
        inherit_masks_(attached("bert", "70%", roles=("block", "pooler")))


def test_all_matrices_inherit_where_none_is_new():
    model = attached("bert", "70%", roles=("block", "pooler"))
    magnitude_masks_(model, "global")
    fold_(model)
    assert inherit_masks_(attached("bert", "70%", model, roles=("block", "pooler"))) == ()
