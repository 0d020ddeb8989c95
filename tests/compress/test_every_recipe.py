"""Every built-in recipe through the engine, and every architecture through those that differ in what they attach."""

import copy

import pytest
import torch
from recipe_cases import data_for, short
from squeezoo.compress.checkpoint import load, load_manifest
from squeezoo.compress.engine import compress
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.recipe import Recipe, RecipeError, recipe_names
from squeezoo.compress.rules import Unstructured, parse_sparsity
from squeezoo.models.dense import Dense, library_of, logits
from tiny import ALL, tiny_batch
from torch import nn

# Recipes of one stage list each; how masks and quantizers are made differs, the model does not matter to it.
ON_EVERY_KIND = ("gpusq-gemm-mha-int8", "deepcomp-sparse-int4", "sparsegpt-2-4", "nxm-admm", "dq")
KINDS = ("gpt2", "bart", "timm_vit", "wav2vec2")
INHERITS = ("imp-70-task", "imp-dq")


def dense_for(name: str) -> Dense:
    model = ALL[name]()
    return Dense(model, None, name, None, library_of(model))


def pruned_by_70(model: nn.Module) -> None:
    """What imp-70 leaves behind: 70 % zeros in each of the pruned matrices."""
    from squeezoo.compress.plan import make_plan

    modules = dict(model.named_modules())
    for gemm in make_plan(model, Recipe.load("imp-70-task")).gemms:
        weight = modules[gemm.name].weight
        assert isinstance(weight, torch.Tensor)
        zeros = weight.detach().abs().flatten().argsort()[: round(0.7 * weight.numel())]
        weight.data.view(-1)[zeros] = 0


def run(name: str, recipe: Recipe, out, *, inherit: bool = False):
    dense = dense_for(name)
    if inherit:
        pruned_by_70(dense.model)
    before = copy.deepcopy(dense.model.state_dict())
    pretrained = dense_for(name) if recipe.student else None
    made = compress(dense, recipe, data_for(name) if recipe.needs_data else None, out, pretrained=pretrained)
    assert all(torch.equal(before[key], value) for key, value in dense.model.state_dict().items())
    return made


def check_sparsity(model: nn.Module, folder) -> None:
    modules = dict(model.named_modules())
    for gemm in load_manifest(folder).plan.gemms:
        if gemm.sparsity is None:
            continue
        weight = modules[gemm.name].weight
        assert isinstance(weight, torch.Tensor)
        w_OI = weight if gemm.layout == "out_in" else weight.t()
        pattern = parse_sparsity(gemm.sparsity)
        if isinstance(pattern, Pattern):
            assert check_nm(w_OI, pattern), gemm.name
        else:
            assert isinstance(pattern, Unstructured)


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if Recipe.load(name).rules or "pkd" in name])
def test_every_recipe_compresses_bert_and_loads(recipe, tmp_path):
    """Its checkpoint gives what it was saved with (golden output is checked by load), and its zeros are there."""
    name = "bert_token" if recipe == "pkd-6-token" else "bert"
    made = run(name, short(recipe), tmp_path / "out", inherit=recipe in INHERITS)
    model = load(made.folder, backend="reference")
    check_sparsity(model, made.folder)
    with torch.inference_mode():
        assert logits(model, tiny_batch(name)).isfinite().all()
    assert [record["stage"] for record in made.stages] == [stage.stage for stage in short(recipe).stages]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ON_EVERY_KIND)
def test_every_kind_of_model_takes_the_recipes(recipe, kind, tmp_path):
    made = run(kind, short(recipe), tmp_path / "out")
    check_sparsity(load(made.folder, backend="reference"), made.folder)


def test_imp_hits_its_share_to_the_weight(tmp_path):
    """70 % of all weights in the six linears and the pooler, one global threshold."""
    made = run("bert", short("imp-70"), tmp_path / "out")
    modules = dict(load(made.folder, backend="reference").named_modules())
    weights = [modules[gemm.name].weight for gemm in made.plan.gemms]
    total = sum(w.numel() for w in weights)
    assert sum(int((w == 0).sum()) for w in weights) == round(0.7 * total)


def test_sparse_int4_inherits_the_mask_of_sparse_int8(tmp_path):
    """Deep Compression: the mask is made once, from the dense weights."""
    assert _outside_the_first_mask(run("bert", short("deepcomp-sparse-int4"), tmp_path / "out")) == 0


def test_sparse_int4_makes_its_mask_anew_where_the_recipe_says_so(tmp_path):
    """`reextract_mask`: a large rate moves the sparse INT8 weights enough for other masks."""
    data = short("deepcomp-sparse-int4").model_dump(mode="json")
    data["stages"][2]["learning_rate"] = 3e-2
    assert _outside_the_first_mask(run("bert", Recipe.parse(data), tmp_path / "inherited")) == 0
    data["stages"][3]["reextract_mask"] = True
    made = run("bert", Recipe.parse(data), tmp_path / "anew")
    assert _outside_the_first_mask(made) > 0
    check_sparsity(load(made.folder, backend="reference"), made.folder)
    del data["stages"][0]
    data["rules"][0]["sparsity"] = None
    with pytest.raises(RecipeError, match="`reextract_mask` makes masks anew, and no stage made any"):
        Recipe.parse(data)


def _outside_the_first_mask(made) -> int:
    """Weights of a compressed BERT that the magnitude mask of the dense one would have left out."""
    from squeezoo.compress.masks import magnitude_mask

    dense = dict(ALL["bert"]().named_modules())
    final = dict(load(made.folder, backend="reference").named_modules())
    masks = {gemm.name: magnitude_mask(dense[gemm.name].weight, gemm.pattern) for gemm in made.plan.gemms}
    return sum(int(final[name].weight[~mask_OI].count_nonzero()) for name, mask_OI in masks.items())


def test_a_student_of_fewer_blocks_needs_its_ancestor(tmp_path):
    with pytest.raises(RecipeError, match="pass `pretrained`"):
        compress(dense_for("bert"), short("pkd-6"), data_for("bert"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_training_needs_data(tmp_path):
    with pytest.raises(RecipeError, match="needs data"):
        compress(dense_for("bert"), short("nxm-admm"), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_sparsegpt_with_joint_quantization_stays_on_its_levels(tmp_path):
    """Rounded while pruning: the stored integers times the scale are the weights that SparseGPT left."""
    data = short("sparsegpt-2-4").model_dump(mode="json")
    data["rules"][0] |= {"weight": {"method": "lsq", "bits": 4}}
    data["stages"][0] |= {"quantize": True}
    data["stages"].append({"stage": "calibrate"})
    made = run("bert", Recipe.parse(data), tmp_path / "out")
    check_sparsity(load(made.folder, backend="reference"), made.folder)
    assert {gemm.weight_bits for gemm in made.plan.gemms} == {4}
