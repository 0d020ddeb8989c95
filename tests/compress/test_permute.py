"""Channel permutation: against brute force, and on every tiny architecture: outputs stay, kept magnitude rises."""

import copy
import itertools

import pytest
import torch
from squeezoo.compress.attach import attach_
from squeezoo.compress.checkpoint import load
from squeezoo.compress.engine import compress
from squeezoo.compress.masks import Pattern, check_nm, magnitude_mask
from squeezoo.compress.permutation_search import find_permutation
from squeezoo.compress.permute import PermutationError, patterns_of, permute_
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe, RecipeError
from squeezoo.models import adapter_for, find_sites
from squeezoo.models.dense import logits
from tiny import ALL, tiny_batch

TWO_FOUR = Pattern(2, 4)


def kept(w_OI, pattern=TWO_FOUR):
    return float((w_OI.detach().abs() * magnitude_mask(w_OI, pattern)).double().sum())


def weight(*shape, seed=0):
    """Columns of very different size side by side: something to gain."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape[-1], generator=generator) ** 3


def by_brute_force(w_OI, pattern):
    """The greedy search of ALGORITHMS B.2 as it is written: every swap is valued by making it."""
    order = list(range(w_OI.shape[1]))
    while True:
        best, best_swap = kept(w_OI[:, order], pattern) * (1 + 1e-6), None
        for p, q in itertools.combinations(range(len(order)), 2):
            if p // pattern.m != q // pattern.m:
                tried = order.copy()
                tried[p], tried[q] = tried[q], tried[p]
                if kept(w_OI[:, tried], pattern) > best:
                    best, best_swap = kept(w_OI[:, tried], pattern), tried
        if best_swap is None:
            return order
        order = best_swap


@pytest.mark.parametrize(("pattern", "columns"), [("2:4", 16), ("1:4", 16), ("1:2", 10), ("3:8", 24), ("2:4", 14)])
def test_the_search_ends_where_the_plain_greedy_one_ends(pattern, columns):
    """What is kept, not the order: of swaps that gain the same either may be first. 14 columns: a ragged tail."""
    pattern, w_OI = Pattern.parse(pattern), weight(7, columns)
    expected = kept(w_OI[:, by_brute_force(w_OI, pattern)], pattern)
    assert kept(w_OI[:, find_permutation(w_OI, pattern)], pattern) == pytest.approx(expected, rel=1e-6)
    assert expected > 1.01 * kept(w_OI, pattern)


def test_it_is_a_permutation_that_keeps_more():
    w_OI = weight(64, 96)
    order = find_permutation(w_OI, TWO_FOUR)
    assert sorted(order.tolist()) == list(range(96))
    assert kept(w_OI[:, order]) > 1.02 * kept(w_OI)


def test_an_optimal_order_is_found_where_one_can_be_seen():
    """Eight large columns and eight small ones, the large ones crowded in the first two groups: 2 in each is best."""
    w_OI = torch.cat([torch.full((3, 8), 5.0), torch.full((3, 8), 0.1)], dim=1)
    order = find_permutation(w_OI, TWO_FOUR)
    assert kept(w_OI) == pytest.approx(3 * (4 * 5 + 4 * 0.1))
    assert kept(w_OI[:, order]) == pytest.approx(3 * 8 * 5)


def test_columns_stay_inside_their_segment():
    order = find_permutation(weight(5, 48), TWO_FOUR, width=16)
    assert [sorted(order[s : s + 16].tolist()) for s in (0, 16, 32)] == [list(range(s, s + 16)) for s in (0, 16, 32)]
    assert order.tolist() != list(range(48))


def test_swaps_are_limited():
    assert find_permutation(weight(5, 16), TWO_FOUR, max_swaps=0).tolist() == list(range(16))
    moved = find_permutation(weight(5, 16), TWO_FOUR, max_swaps=1) != torch.arange(16)
    assert int(moved.sum()) == 2


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"multiple of M = 4, found 6"):
        find_permutation(weight(2, 12), TWO_FOUR, width=6)
    with pytest.raises(ValueError, match="NaN, found 8 of 8"):
        find_permutation(torch.full((2, 4), torch.nan), TWO_FOUR)


# One of each declaration: FFN, gated FFN, heads, grouped heads, fused QKV, Conv1D, cross attention, masks, speech.
NAMES = [n for n in ("bert", "gpt2", "opt", "llama", "qwen2", "bart", "timm_vit", "vit", "wav2vec2") if n in ALL]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_stay_and_every_permuted_gemm_keeps_at_least_as_much(name):
    """Float rounding alone: 1e-5 of outputs of order 1."""
    model, batch = ALL[name](), tiny_batch(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # larger and uneven weights: attention and FFN matter, and there is much to gain
                parameter.mul_(8 * torch.rand(parameter.shape[-1]) ** 2)
        before = logits(model, batch)
    sites = find_sites(model, adapter_for(model))
    old = {gemm.name: gemm.weight_OI.clone() for gemm in sites.gemms}
    report = permute_(sites, patterns_of(sites, TWO_FOUR))
    declared = sum(len(block.permutable) for block in sites.blocks)
    assert len(report) == declared > 0
    with torch.no_grad():
        torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-4)
    by_name = {gemm.name: gemm for gemm in sites.gemms}
    for record in report:
        assert record.kept_after > record.kept_before
        w_OI = by_name[record.name].weight_OI
        assert record.kept_after == pytest.approx(kept(w_OI) / float(w_OI.abs().double().sum()))
        assert w_OI.flatten().sort().values.equal(old[record.name].flatten().sort().values)


def test_only_named_gemms_are_touched():
    model = ALL["bert"]()
    sites = find_sites(model, adapter_for(model))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "bert.encoder.layer.1.output.dense"
    assert [record.name for record in permute_(sites, {name: TWO_FOUR})] == [name]
    changed = {key for key, tensor in model.state_dict().items() if not tensor.equal(state[key])}
    up = "bert.encoder.layer.1.intermediate.dense"
    assert changed == {f"{name}.weight", f"{up}.weight", f"{up}.bias"}


def test_heads_narrower_than_a_group_are_left_out():
    """Tiny BERT: heads of 16; groups of 32 would cross them."""
    model = ALL["bert"]()
    sites = find_sites(model, adapter_for(model))
    names = [record.name for record in permute_(sites, patterns_of(sites, Pattern(16, 32)))]
    assert names == [f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)]


def test_an_attached_model_is_refused():
    model = ALL["bert"]()
    attach_(model, make_plan(model, Recipe.load("gpusq-gemm-int8")))
    sites = find_sites(model, adapter_for(model))
    with pytest.raises(PermutationError, match="is attached"):
        permute_(sites, patterns_of(sites, TWO_FOUR))


@pytest.mark.parametrize("name", ["bert", "llama", "timm_vit"])
def test_a_recipe_with_permuted_channels_keeps_more_and_says_how_much(name, tmp_path):
    """Through the engine and the checkpoint: the pruned model holds more of the dense magnitude than without."""
    dense = ALL[name]()
    before = copy.deepcopy(dense.state_dict())
    lines: list[str] = []
    recipe = Recipe.load("magnitude-2-4")
    compress(dense, recipe, None, tmp_path / "plain")
    made = compress(dense, recipe.override(permute_channels=True), None, tmp_path / "permuted", say=lines.append)
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    records = made.stages[0]["permuted"]
    assert {r["name"] for r in records} <= {gemm.name for gemm in made.plan.gemms}
    assert all(r["kept_after"] >= r["kept_before"] for r in records)
    assert any(r["kept_after"] > r["kept_before"] for r in records)
    assert any(f"permuted the channels of {len(records)} GEMMs" in line for line in lines)
    magnitudes = []
    for folder in ("plain", "permuted"):
        model = load(tmp_path / folder, backend="dense")
        sites = find_sites(model, adapter_for(model))
        magnitudes.append(sum(float(gemm.weight_OI.abs().sum()) for gemm in sites.gemms))
        assert all(check_nm(gemm.weight_OI, TWO_FOUR) for gemm in sites.gemms)
    assert magnitudes[1] > magnitudes[0]


def test_a_recipe_that_permutation_cannot_help_is_refused():
    rule = {"roles": ["block"], "sparsity": "50%"}
    body = {"name": "r", "description": "d", "source": "s", "rules": [rule], "stages": [{"stage": "prune"}]}
    with pytest.raises(RecipeError, match="no rule asks for it"):
        Recipe.parse(body | {"permute_channels": True})
    rule["sparsity"] = "2:4"
    body["stages"][0]["method"] = "inherit"
    with pytest.raises(RecipeError, match="cannot be inherited"):
        Recipe.parse(body | {"permute_channels": True})
