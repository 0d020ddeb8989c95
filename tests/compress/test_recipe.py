"""Recipes: the built-in ones load, and every fault is told with file, key and what is allowed."""

import copy

import pytest
import yaml
from squeezoo.compress.recipe import Recipe, RecipeError, recipe_names
from squeezoo.compress.stages import Finetune
from squeezoo.models.adapter import BLOCK_ROLES

VALID = {
    "name": "mine",
    "description": "d",
    "source": "s",
    "rules": [{"roles": ["block"], "sparsity": "2:4", "weight": {"bits": 8}, "input": {"bits": 8}}],
    "stages": [
        {"stage": "prune"},
        {"stage": "calibrate"},
        {"stage": "finetune", "epochs": 1, "learning_rate": 1e-4, "distill": {"teacher": "dense"}},
    ],
}


def changed(**edits):
    """VALID with dotted keys replaced; a list index is a number."""
    data = copy.deepcopy(VALID)
    for dotted, value in edits.items():
        *path, last = [int(p) if p.isdigit() else p for p in dotted.split("__")]
        place = data
        for part in path:
            place = place[part]
        place[last] = value
    return data


@pytest.mark.parametrize("name", recipe_names())
def test_built_in_recipes_load_and_cite_their_source(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert len(recipe.source) > 20
    assert Recipe.parse(recipe.model_dump(mode="json")) == recipe


def test_the_foundation_recipes_are_there():
    assert {"magnitude-2-4", "asp-2-4", "gpusq-gemm-int8", "dense"} <= set(recipe_names())


def test_gpusq_follows_the_paper():
    """Table 5 (alpha 1, beta 10, gamma 1), Table 6 (GLUE), and the sparse model as the teacher of stage 2."""
    recipe = Recipe.load("gpusq-gemm-int8")
    first, second = (s for s in recipe.stages if isinstance(s, Finetune))
    assert (first.distill.teacher, second.distill.teacher) == ("dense", "previous")
    for stage in (first, second):
        assert (stage.distill.hard, stage.distill.soft, stage.distill.feature) == (1, 10, 1)
        assert (stage.learning_rate, stage.batch_size, stage.weight_decay, stage.epochs) == (2.4e-5, 16, 0.01, 6)
    assert set(recipe.rules[0].roles) == {*BLOCK_ROLES, "final"}


def test_asp_has_the_budget_of_both_gpusq_stages():
    epochs = {
        name: sum(s.epochs for s in Recipe.load(name).stages if isinstance(s, Finetune))
        for name in ("asp-2-4", "gpusq-gemm-int8")
    }
    assert epochs["asp-2-4"] == epochs["gpusq-gemm-int8"]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"rules__0__sparsity": "4:2"}, r"rules\.0\.sparsity: .*2:4"),
        (
            {"rules__0__sparcity": "2:4"},
            r"rules\.0\.sparcity: unknown key\. Did you mean 'sparsity'\? Allowed here: roles,",
        ),
        ({"rules__0__sparsity": 124}, r"rules\.0\.sparsity: .*quote"),
        ({"rules__0__weight__bits": 9}, r"rules\.0\.weight\.bits: .*less than or equal to 8, found 9"),
        ({"rules__0__roles": ["queries"]}, r"unknown role 'queries'; allowed: block, q, k, v"),
        ({"rules__0__weight": None}, r"input is quantized but weight is not"),
        ({"stages__2__epoch": 3}, r"stages\.2\.epoch: unknown key\. Did you mean 'epochs'\?"),
        ({"stages__2__distill__teacher": "previous"}, r"first finetune stage has no previous one"),
        ({"stages": [{"stage": "prune"}]}, r"no stage is `calibrate`"),
        ({"stages": [{"stage": "calibrate"}]}, r"no stage is `prune`"),
        ({"stages__0__stage": "shrink"}, r"stages\.0: .*'prune', 'calibrate', 'finetune'"),
        ({"rules": []}, r"stage `prune` has nothing to do"),
        ({"rules": [*VALID["rules"], {"roles": ["q"]}]}, r"role 'q' is claimed by two rules"),
        ({"name": "Mine!"}, r"name: .*found 'Mine!'"),
    ],
)
def test_faults_name_file_key_and_what_is_allowed(tmp_path, edits, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(changed(**edits)))
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("where", "record"),
    [
        ("stages__2__learning_rate", None),
        ("stages__2__epochs", None),
        ("stages__2__weight_decay", None),
        ("stages__2__max_grad_norm", None),
        ("stages__2__distill__soft", None),
        ("stages__2__distill__temperature", None),
        ("stages__2__policy__rho", {"method": "admm"}),
        ("stages__2__policy__decay", {"method": "sr_ste"}),
        ("stages__0__damping", None),
    ],
)
@pytest.mark.parametrize("value", [".inf", ".nan", "1.0e+400"])
def test_numbers_that_are_not_finite_are_refused(where, record, value, tmp_path):
    """As YAML writes them; 1.0e+400 is more than a float holds."""
    edits = {where.rpartition("__")[0]: record} if record else {}
    data = changed(**edits, **{where: "PLACE"})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data).replace("PLACE", value))
    with pytest.raises(
        RecipeError, match=rf"{where.replace('__', '.')}: Input should be a finite number, found (inf|nan)"
    ):
        Recipe.load(tmp_path / "mine.yaml")


def test_settings_of_the_command_line_are_finite_too():
    with pytest.raises(RecipeError, match=r"learning_rate: Input should be a finite number, found inf"):
        Recipe.load("dense").override(learning_rate=float("inf"))


def test_a_missing_key_is_named(tmp_path):
    data = changed()
    del data["stages"][2]["epochs"]
    with pytest.raises(RecipeError, match=r"stages\.2: expected either epochs or steps, found neither"):
        Recipe.parse(data)


def test_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("rules: [")
    with pytest.raises(RecipeError, match="not readable as YAML"):
        Recipe.load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="expected a mapping"):
        Recipe.load(tmp_path / "list.yaml")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(RecipeError, match=r"Did you mean 'gpusq-gemm-int8'\? Known: admm-unstructured, asp-2-4"):
        Recipe.load("gpusq-int8")


def test_overrides_reach_every_training_stage_and_are_checked():
    recipe = Recipe.load("gpusq-gemm-int8").override(epochs=1, learning_rate=1e-3, seed=7)
    assert recipe.seed == 7
    assert [(s.epochs, s.learning_rate) for s in recipe.stages if isinstance(s, Finetune)] == [(1, 1e-3)] * 2
    with pytest.raises(
        RecipeError, match="cannot override 'lr'; allowed: seed, permute_channels, attention, blocks, batch_size"
    ):
        recipe.override(lr=1)
    with pytest.raises(RecipeError, match="epochs"):
        recipe.override(epochs=0)


def test_a_student_s_blocks_can_be_overridden_where_a_recipe_cuts_one():
    student = Recipe.load("pkd-6").override(blocks=3).student
    assert student is not None
    assert (student.blocks, student.weights) == (3, "pretrained")
    with pytest.raises(RecipeError, match="recipe asp-2-4 keeps all blocks; pkd-6 cuts a student of fewer"):
        Recipe.load("asp-2-4").override(blocks=3)
    with pytest.raises(RecipeError, match=r"student\.blocks: .*found 0"):
        Recipe.load("pkd-6").override(blocks=0)
