"""A tied final projection with a matrix of its own: pruned alone, described, rebuilt and saved untied."""

import copy

import pytest
import torch
from squeezoo.compress.attach import attach_, fold_, prune_, untie_
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.models.dense import build, describe, logits
from squeezoo.models.linear import tied_to_embedding
from tiny import ALL, ROWS, tiny_batch

TIED = ("gpt2", "opt", "llama", "bart", "roberta_mlm", "distilbert_mlm")


def outputs(model, name):
    with torch.no_grad():
        return logits(model, tiny_batch(name))


@pytest.mark.parametrize("name", TIED)
def test_it_copies_the_matrix_once_and_changes_no_output(name):
    """Expected: bytes of one float32 matrix the first time, 0 the second; the embedding's own table stays."""
    original, model = ALL[name](), ALL[name]()
    head = ROWS[name].final
    module = model.get_submodule(head)
    assert tied_to_embedding(model, module)
    assert untie_(model, head) == module.weight.numel() * 4
    assert not tied_to_embedding(model, module)
    assert untie_(model, head) == 0
    assert torch.equal(outputs(model, name), outputs(original, name))
    assert model.config.tie_word_embeddings is False
    model.tie_weights()
    assert not tied_to_embedding(model, module)
    assert original.config.tie_word_embeddings is not False


@pytest.mark.parametrize("name", TIED)
def test_a_model_built_from_its_description_is_untied(name):
    """What the checkpoint does on load: build, then a complete state dict."""
    model = ALL[name]()
    head = ROWS[name].final
    untie_(model, head)
    with torch.no_grad():
        model.get_submodule(head).weight.mul_(0.5)
    rebuilt = build(describe(model))
    rebuilt.load_state_dict(copy.deepcopy(model.state_dict()))
    assert not tied_to_embedding(rebuilt, rebuilt.get_submodule(head))
    assert torch.equal(outputs(rebuilt, name), outputs(model, name))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_transformers_saves_and_loads_it_untied(name, tmp_path):
    model = ALL[name]()
    head = ROWS[name].final
    untie_(model, head)
    with torch.no_grad():
        model.get_submodule(head).weight.mul_(0.5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(loaded, name), outputs(model, name))


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_plan_s_untied_projection_is_pruned_alone(name):
    """A.3: pruning the copy leaves the token embedding dense; without the option the projection is skipped."""
    original, model = ALL[name](), ALL[name]()
    body = {
        "name": "r", "description": "d", "source": "s", "untie_final_projection": True,
        "rules": [{"roles": ["block", "final"], "sparsity": "2:4"}], "stages": [{"stage": "prune"}],
    }  # fmt: skip
    plan = make_plan(model, Recipe.parse(body))
    head = ROWS[name].final
    assert plan.untied == head
    attach_(model, plan)
    torch.testing.assert_close(outputs(model, name), outputs(original, name), atol=1e-5, rtol=0)
    prune_(model)
    assert check_nm(model.get_submodule(head).weight, Pattern(2, 4))
    table, before = model.get_input_embeddings().weight, original.get_input_embeddings().weight
    assert torch.equal(table, before)
    fold_(model)
    assert check_nm(model.get_submodule(head).weight, Pattern(2, 4))
    assert torch.equal(model.get_input_embeddings().weight, before)
    kept = make_plan(ALL[name](), Recipe.parse(body | {"untie_final_projection": False}))
    assert kept.untied is None
    assert head in dict(kept.skipped)


def test_a_refused_plan_unties_nothing():
    """All checks come before the first change."""
    model = ALL["gpt2"]()
    body = {
        "name": "r", "description": "d", "source": "s", "untie_final_projection": True,
        "rules": [{"roles": ["block", "final"], "sparsity": "2:4"}], "stages": [{"stage": "prune"}],
    }  # fmt: skip
    plan = make_plan(model, Recipe.parse(body))
    model.transformer.h[1].mlp.c_fc = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="made for shape"):
        attach_(model, plan)
    assert tied_to_embedding(model, model.lm_head)
