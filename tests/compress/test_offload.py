"""Weights that wait in a file during one-shot pruning: the same result, memory of one group, and what stays."""

import errno

import pytest
import torch
from squeezoo.compress import offload
from squeezoo.compress.attach import attach_, compressed_weights, latent
from squeezoo.compress.offload import Offload
from squeezoo.compress.oneshot import prune_oneshot_
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from tiny import ALL, tiny_batch

RULES = {"name": "t", "description": "t", "source": "none", "stages": [{"stage": "prune"}]}


def attached(name, roles=("block",)):
    model = ALL[name]()
    recipe = Recipe.model_validate({**RULES, "rules": [{"roles": list(roles), "sparsity": "2:4"}]})
    attach_(model, make_plan(model, recipe))
    return model


def gemms(model):
    return {name: (module, weight) for name, module, weight in compressed_weights(model)}


def in_memory(model):
    """Names of the GEMMs whose weights are not stand-ins."""
    return {name for name, module, _ in compressed_weights(model) if latent(module).untyped_storage().nbytes() > 4}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "timm_vit"])
def test_the_result_is_the_same_to_the_bit(name, method, recompute, tmp_path):
    data = [tiny_batch(name, seed=seed) for seed in range(2)]
    models = [attached(name, ("block", "final")) for _ in range(2)]
    reports = [
        prune_oneshot_(model, method, data, tokens_at_a_time=24, recompute=recompute, offload=folder)
        for model, folder in zip(models, (None, tmp_path), strict=True)
    ]
    assert reports[0] == reports[1]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(tensor.equal(states[1][key]) for key, tensor in states[0].items())
    assert not list(tmp_path.iterdir())


def test_one_group_is_in_memory_at_a_time(tmp_path):
    """Llama: Q, K and V read one tensor, then O, gate and up, down. At a report the group is the one just pruned."""
    model, seen = attached("llama"), []
    prune_oneshot_(
        model, "sparsegpt", [tiny_batch("llama")], offload=tmp_path, progress=lambda *_: seen.append(in_memory(model))
    )
    assert [sorted(name.rpartition(".")[2] for name in group) for group in seen[:4]] == [
        ["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip
    assert in_memory(model) == set(gemms(model))


def test_a_weight_comes_back_when_it_is_read_and_changes_are_kept(tmp_path):
    model = attached("bert")
    before = {name: latent(module).clone() for name, (module, _) in gemms(model).items()}
    name, (module, _) = next(iter(gemms(model).items()))
    parameter = latent(module)
    with Offload(model, gemms(model), tmp_path) as waiting:
        assert in_memory(model) == set()
        assert parameter.isnan().all()  # a stand-in of the same shape
        assert module.weight.equal(before[name])
        assert in_memory(model) == {name}
        with torch.no_grad():
            parameter.mul_(2)
        waiting.write([name])
        waiting.keep_only(())
        assert in_memory(model) == set()
    for other, (module, _) in gemms(model).items():
        assert latent(module).equal(before[other] * (2 if other == name else 1))
    assert latent(gemms(model)[name][0]) is parameter  # what an optimizer holds
    assert not any(weight._forward_pre_hooks for _, weight in gemms(model).values())


def test_what_is_shared_stays(tmp_path):
    """A projection whose parameter another module has too, and one that is a part of a larger tensor."""
    model = attached("bert")
    (one, (first, _)), (two, (second, _)) = list(gemms(model).items())[:2]
    model.tied = torch.nn.Module()
    model.tied.weight = latent(first)
    latent(second).data = torch.cat([latent(second), latent(second)]).detach()[: len(latent(second))]
    with Offload(model, gemms(model), tmp_path):
        assert in_memory(model) == {one, two}


def test_a_full_disk_leaves_every_weight_in_memory(tmp_path, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file, self.writes = file, 0

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.writes += 1
            if self.writes > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

    make = offload.tempfile.TemporaryFile
    monkeypatch.setattr(offload.tempfile, "TemporaryFile", lambda **where: Full(make(**where)))
    model = attached("llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(OSError, match="No space left"):
        prune_oneshot_(model, "sparsegpt", [tiny_batch("llama")], offload=tmp_path)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(FileNotFoundError):
        prune_oneshot_(model, "sparsegpt", [tiny_batch("llama")], offload=tmp_path / "nowhere")


def test_an_error_in_the_middle_brings_all_back(tmp_path):
    model, data = attached("vit"), tiny_batch("vit")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    data["pixel_values"][1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="batch 0, row 1"):
        prune_oneshot_(model, "sparsegpt", [data], offload=tmp_path)
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())
