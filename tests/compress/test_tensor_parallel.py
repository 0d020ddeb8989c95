"""Masks and scales of shards equal those of the whole matrix; what would differ is refused before anything changes."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import standins
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezoo.compress.attach import attach_
from squeezoo.compress.masks import Pattern, magnitude_mask
from squeezoo.compress.plan import PlanError, make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.tensor_parallel import check_shards, check_split, shard_OI, split_of

HERE = Path(__file__).parent


LSQ = {"method": "lsq", "bits": 8}


def recipe(
    sparsity: str = "2:4",
    prune: str = "magnitude",
    percentile: float | None = None,
    roles: Any = ("block",),
    **rule: Any,
) -> Recipe:
    stages = [{"stage": "prune", "method": prune}]
    stages += [{"stage": "calibrate", "percentile": percentile}] if rule else []
    text = {"name": "test", "description": "test", "source": "test", "stages": stages}
    return Recipe.parse({**text, "rules": [{"roles": list(roles), "sparsity": sparsity, **rule}]})


@settings(max_examples=60, deadline=None)
@given(
    split=st.sampled_from(["rows", "columns"]),
    pattern=st.sampled_from([Pattern(2, 4), Pattern(1, 4), Pattern(2, 8), Pattern(1, 2)]),
    world_size=st.sampled_from([1, 2, 3, 4]),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
def test_masks_of_shards_are_shards_of_the_mask(
    split: Any, pattern: Pattern, world_size: int, rows: int, groups: int, seed: int
) -> None:
    """Any split between rows, and any split between groups of M (ALGORITHMS A.1: groups never cross a row)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (rows * world_size, groups * pattern.m * world_size), generator=generator).float()
    mask = magnitude_mask(weight, pattern)
    for rank in range(world_size):
        shard = shard_OI(weight, split, rank, world_size)
        assert torch.equal(magnitude_mask(shard, pattern), shard_OI(mask, split, rank, world_size))


def test_a_split_inside_a_group_gives_other_masks() -> None:
    """Why row-parallel shards must be multiples of M: here the second process would keep what is dropped as a whole."""
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    assert magnitude_mask(weight, Pattern(2, 4)).tolist() == [[True, True, False, False]]
    assert magnitude_mask(shard_OI(weight, "columns", 1, 2), Pattern(2, 4)).tolist() == [[True, True]]


def test_scales_per_row_follow_the_rows() -> None:
    scale = torch.arange(4.0).reshape(4, 1)
    assert shard_OI(scale, "rows", 1, 2).flatten().tolist() == [2, 3]
    assert shard_OI(scale, "columns", 1, 2).flatten().tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="rows in a multiple of 3 processes, found 4"):
        shard_OI(scale, "rows", 0, 3)


def test_which_axis_is_split() -> None:
    model = standins.GPTModel(2)
    layer = model.decoder["layers"][0]
    assert split_of(layer["mlp"]["linear_fc1"]) == "rows"
    assert split_of(layer["mlp"]["linear_fc2"]) == "columns"
    assert split_of(torch.nn.Linear(2, 2)) is None
    whole = standins.GPTModel(1).decoder["layers"][0]
    assert split_of(whole["mlp"]["linear_fc1"]) is split_of(whole["mlp"]["linear_fc2"]) is None


@pytest.mark.parametrize(
    ("given_recipe", "message"),
    [
        (recipe("8:16"), r"linear_proj \[16, 8\] is row-parallel and its shard of in_features, 8, is no multiple"),
        (recipe("50%"), r"50% zeros, a threshold over the whole matrix"),
        (recipe(weight={"method": "sawb", "bits": 8}), "sawb takes statistics of the whole matrix"),
        (recipe(weight={"method": "absmax", "bits": 8}), "absmax of its weights would differ"),
        (recipe(weight=LSQ, input={"method": "minmax"}), "minmax of its inputs would differ"),
        (recipe(prune="sparsegpt"), "SparseGPT spreads errors over all columns"),
        (recipe(percentile=99.9, weight=LSQ, input=LSQ), "a percentile of its input needs all columns"),
    ],
)
def test_what_would_differ_from_the_whole_model_is_refused(given_recipe: Recipe, message: str) -> None:
    model = standins.GPTModel(2)
    before = deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=message):
        check_shards(make_plan(model, given_recipe), model, given_recipe.stages)
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", ["gradient_accumulation_fusion", "sequence_parallel"])
def test_megatron_options_that_go_past_the_mask_or_the_scales(name: str) -> None:
    model = standins.GPTModel(2)
    setattr(model.decoder["layers"][1]["mlp"]["linear_fc1"], name, True)
    with pytest.raises(PlanError, match=rf"layers\.1\.mlp\.linear_fc1 .* has {name} on.*set it to False"):
        check_shards(make_plan(model, recipe()), model)


def test_what_is_right_passes() -> None:
    """Among it quantizers with statistics of the whole input where the input is whole, and ordinary linears."""
    model = standins.GPTModel(2)
    for rules in (
        recipe(weight=LSQ, input=LSQ),
        recipe(prune="wanda"),
        recipe(roles=["ffn_up", "qkv"], weight={"method": "absmax", "bits": 8}, input={"method": "minmax"}),
    ):
        check_shards(make_plan(model, rules), model, rules.stages)
    one = standins.GPTModel(1)
    check_shards(make_plan(one, recipe("50%")), one)  # one process holds all


def test_the_split_of_a_whole_model_is_checked_beforehand() -> None:
    plan = make_plan(standins.GPTModel(), recipe("8:16"))
    check_split(plan, 1)
    with pytest.raises(
        PlanError, match=r"linear_proj .*2 processes: its in_features, 16, must be a multiple of 2 x 16"
    ):
        check_split(plan, 2)
    with pytest.raises(PlanError, match=r"linear_qkv .* its out_features, 48, must be a multiple of 5"):
        check_split(make_plan(standins.GPTModel(), recipe(roles=["qkv"])), 5)


def test_scales_calibrated_alone_are_refused() -> None:
    from squeezoo.compress.tensor_parallel import share_scales_

    model = standins.GPTModel(2)
    attach_(model, make_plan(model, recipe(weight=LSQ)))
    layer = model.decoder["layers"][0]["mlp"]["linear_fc2"]
    layer.parametrizations.weight[0].quantizer.init_from_amax_(torch.ones(16, 1))
    with pytest.raises(PlanError, match=r"linear_fc2 is calibrated already: call share_scales_ after attach_"):
        share_scales_(model, None)


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    """Output, masks, scales and all gradients, under 2:4 and int8. The row of zeros that one process holds would give
    that process the scale 1 (ALGORITHMS D.6), so scales cannot be reduced after the fact, only ranges."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    worker = [sys.executable, "-W", "ignore", str(HERE / "tensor_parallel_worker.py")]
    jobs = [(rank, size) for size in (1, 2) for rank in range(size)]
    commands = [[*worker, str(rank), str(size), str(tmp_path)] for rank, size in jobs]
    started = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for command in commands]
    for process in started:
        error = process.communicate(timeout=240)[1]
        assert process.returncode == 0, error.decode()
    one = torch.load(tmp_path / "1-0.pt", weights_only=True)
    two = [torch.load(tmp_path / f"2-{rank}.pt", weights_only=True) for rank in range(2)]
    for found in two:
        assert torch.allclose(found["output"], one["output"], atol=1e-6)
    for name, axis in (("up", 0), ("down", 1)):
        for key in ("mask", "latent"):
            assert torch.allclose(
                torch.cat([f[name][key].float() for f in two], axis), one[name][key].float(), atol=1e-8
            )
        for key in ("input", "input_step"):
            for found in two:
                assert torch.allclose(found[name][key], one[name][key], rtol=1e-4)
    for key in ("scale", "step"):
        assert torch.allclose(torch.cat([found["up"][key] for found in two]), one["up"][key], rtol=1e-4, atol=1e-9)
        assert torch.equal(two[0]["down"][key], two[1]["down"][key])
        assert torch.allclose(two[0]["down"][key], one["down"][key], rtol=1e-4, atol=1e-9)
    assert one["down"]["step"].abs().max() > 1e-6
    assert two[0]["down"]["rate"] == two[1]["down"]["rate"]
    assert two[0]["up"]["rate"] != two[1]["up"]["rate"]  # scales of its own rows: its own rate
    assert two[1]["down"]["scale"][0] < 0.1
