"""megatron-core itself on gloo processes: tensor parallel 1 and 2 compress and train alike.

Runs in the environment that `make test-extras` builds; elsewhere it is skipped. `megatron_worker.py` is one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "megatron.core", reason="megatron-core is not installed: make test-extras builds an environment that has it"
)
HERE = Path(__file__).parent
WORKER = HERE / "megatron_worker.py"


def run(folder: Path, world_size: int, *options: str) -> list[dict[str, Any]]:
    """What each of ``world_size`` processes found."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    commands = [[sys.executable, "-W", "ignore", str(WORKER), str(r), str(world_size), str(folder), *options]
                for r in range(world_size)]  # fmt: skip
    started = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for command in commands]
    for process in started:
        error = process.communicate(timeout=300)[1]
        assert process.returncode == 0, error.decode()
    return [torch.load(folder / f"{world_size}-{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tensor-parallel")
    return folder, run(folder, 1)[0]


@pytest.fixture(scope="module")
def shards(whole: tuple[Path, dict[str, Any]]) -> list[dict[str, Any]]:
    return run(whole[0], 2)


def gemms(found: dict[str, Any]) -> list[str]:
    return [name for name, value in found.items() if isinstance(value, dict) and "mask" in value]


def joined(shards: list[dict[str, Any]], name: str, key: str) -> torch.Tensor:
    """The whole matrix, from its shards; or the one tensor that all processes hold."""
    values = [found[name][key] for found in shards]
    split = shards[0][name]["split"]
    if values[0].dim() < 2 or (split == "columns" and values[0].shape[1] == 1):
        assert torch.equal(values[0], values[1])
        return values[0]
    return torch.cat(values, 0 if split == "rows" else 1)


def test_the_loss_does_not_depend_on_the_number_of_processes(whole: Any, shards: Any) -> None:
    """Under 2:4 masks and int8, before and after one training step."""
    for found in shards:
        assert found["before"] == pytest.approx(float(whole[1]["before"]), abs=1e-5)
        assert found["after"] == pytest.approx(float(whole[1]["after"]), abs=1e-5)
    assert whole[1]["after"] < whole[1]["before"] - 1e-3


def test_masks_and_weights_of_the_shards_are_shards_of_the_whole(whole: Any, shards: Any) -> None:
    names = gemms(whole[1])
    assert len(names) == 2 * 4 + 1  # four of each block, and the output layer
    for name in names:
        assert torch.equal(joined(shards, name, "mask"), whole[1][name]["mask"]), name
        assert torch.allclose(joined(shards, name, "weight"), whole[1][name]["weight"], atol=1e-7), name
        assert whole[1][name]["mask"].float().mean() == 0.5


def test_scales_and_their_gradients_are_those_of_the_whole(whole: Any, shards: Any) -> None:
    """Row-parallel: one scale for all processes. Its gradient is that of the whole matrix, LSQ's factor included."""
    assert shards[0]["shared"] == 2 * 2 * 2  # weight and input of attn_out and ffn_down of two blocks
    for name in gemms(whole[1]):
        for key in ("scale", "input_scale"):
            assert torch.allclose(joined(shards, name, key), whole[1][name][key], rtol=1e-5), (name, key)
        for key in ("step", "input_step"):
            expected = whole[1][name][key]
            error = (joined(shards, name, key) - expected).abs().max() / expected.abs().max()
            assert error < 1e-3, (name, key, error)


def test_processes_that_do_not_share_scales_drift_apart(whole: Any, shards: Any) -> None:
    """What `share_scales_` is for."""
    alone = run_alone(whole[0])
    name = "decoder.layers.0.mlp.linear_fc2"
    assert not torch.equal(alone[0][name]["scale"], alone[1][name]["scale"])
    expected = whole[1][name]["step"]
    assert (alone[0][name]["step"] - expected).abs().max() > 0.5 * expected.abs().max()


def run_alone(folder: Path) -> list[dict[str, Any]]:
    (folder / "meet-2").unlink(missing_ok=True)
    return run(folder, 2, "alone")


CHECKS = """
import sys; sys.path.insert(0, {here!r})
from pathlib import Path
import pytest, torch
from megatron_worker import RECIPE, batches, loss_of, start, tiny_gpt
from squeezoo.compress.attach import attach_, compressed_weights, fold_, prune_
from squeezoo.compress.attention import keep_probabilities
from squeezoo.compress.attention_doors import attach_attention_
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.plan import PlanError, make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.tensor_parallel import check_shards, check_split
from squeezoo.models import adapter_for, find_sites
from types import SimpleNamespace
torch.set_num_threads(1)
start(0, 1, Path({folder!r}))
model, batch = tiny_gpt(), batches(1)[0]
sites = find_sites(model, adapter_for(model))
assert len(sites.gemms) == 8 and sites.final.name == "output_layer", sites
dense = loss_of(model, batch)
"""


def check(tmp_path: Path, code: str) -> None:
    """Run ``code`` in a process of its own: Megatron's process groups are global."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    text = CHECKS.format(here=str(HERE), folder=str(tmp_path)) + code
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", text], env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_prune_train_and_fold(tmp_path: Path) -> None:
    check(tmp_path, """
recipe = Recipe.load("magnitude-2-4")
keys = model.state_dict().keys()
attach_(model, make_plan(model, recipe))
assert torch.allclose(loss_of(model, batch), dense, atol=1e-6)
prune_(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss_of(model, batch).backward()
optimizer.step()
trained = loss_of(model, batch)
assert all(check_nm(module.weight, Pattern(2, 4)) for _, module, _ in compressed_weights(model))
fold_(model)
assert model.state_dict().keys() == keys
assert torch.allclose(loss_of(model, batch), trained, atol=1e-6)
assert all(check_nm(gemm.module.weight, Pattern(2, 4)) for gemm in sites.gemms)
""")  # fmt: skip


def test_a_group_that_a_split_would_cut_is_refused(tmp_path: Path) -> None:
    """16:32 fits the whole model; on two processes linear_proj would hold 16 of 32 columns."""
    check(tmp_path, """
recipe = Recipe.parse(RECIPE | {"rules": [{"roles": ["block"], "sparsity": "16:32"}], "stages": RECIPE["stages"][:1]})
plan = make_plan(model, recipe)
check_shards(plan, model, recipe.stages)
check_split(plan, 1)
with pytest.raises(PlanError, match="linear_proj cannot be split over 2 processes: its in_features, 32, must be"):
    check_split(plan, 2)
model.decoder.layers[0].mlp.linear_fc1.gradient_accumulation_fusion = True
with pytest.raises(PlanError, match="gradient_accumulation_fusion"):
    check_shards(plan, model)
""")  # fmt: skip


def test_the_door_to_the_attention_map(tmp_path: Path) -> None:
    """Megatron's own context layer with 2:4 probabilities equals the product computed here from its Q, K and V."""
    check(tmp_path, """
name = "decoder.layers.0.self_attention.core_attention"
none = dict(sparsity="2:4", renormalize=False, q=None, k=None, p=None, v=None)
(compressor,) = attach_attention_(model, [SimpleNamespace(name=name, **none)]).values()
assert torch.allclose(loss_of(model, batch), dense, atol=1e-6)
compressor.active = True
seen = []
core = model.get_submodule(name)
core.register_forward_hook(lambda m, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True)
sparse = loss_of(model, batch)
assert abs(float(sparse - dense)) > 1e-5, (sparse, dense)
args, kwargs, out = seen[0]
q, k, v = (x.permute(1, 2, 0, 3) for x in args[:3])            # [s, b, n, h] -> [b, n, s, h]
k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))          # two query groups, four heads
later = torch.ones(q.shape[2], q.shape[2]).triu(1).bool()
p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(later, float("-inf")).softmax(-1)
expected = (keep_probabilities(p, Pattern(2, 4)) @ v).permute(2, 0, 1, 3).flatten(2)
assert torch.allclose(out, expected, atol=1e-6), (out - expected).abs().max()
""")  # fmt: skip
