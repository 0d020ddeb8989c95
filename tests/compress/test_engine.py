"""The engine end to end on tiny models: stages, teachers, resume, and what it refuses before anything is written."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file
from squeezoo.compress.checkpoint import load
from squeezoo.compress.engine import RunError, compress, is_trained, train_dense
from squeezoo.compress.finetune import EpochSampler, TrainData, last_complete_checkpoint
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.objective import TrainingError
from squeezoo.compress.recipe import Recipe, RecipeError
from squeezoo.models.dense import Dense, load_dense, logits
from tiny import TINY, tiny_batch

GPUSQ = Recipe.load("gpusq-gemm-int8").override(epochs=2, learning_rate=1e-3, batch_size=4)


def data_for(name, samples=10, after=None):
    """Rows of random data; ``after`` collated batches the loader fails, as a killed process would."""
    batch = tiny_batch(name, samples)
    features = [{key: value[i] for key, value in batch.items()} for i in range(samples)]
    calls = [0]

    def collate(rows):
        calls[0] += 1
        if after is not None and calls[0] > after:
            raise KeyboardInterrupt
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    return TrainData(features, collate, lambda batch, generator: _noise(batch, generator))


def _noise(batch, generator):
    """Augmentation that would betray a resumed run which draws other random numbers."""
    if "pixel_values" not in batch:
        return batch
    return batch | {
        "pixel_values": batch["pixel_values"] + torch.randn(batch["pixel_values"].shape, generator=generator)
    }


def dense_for(name):
    model = TINY[name]()
    for module in model.modules():  # dropout makes the random state part of what must resume
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return Dense(model, None, name, None, "timm" if name.startswith("timm") else "transformers")


@pytest.fixture(scope="module", params=["bert", "timm_vit"])
def uninterrupted(request, tmp_path_factory):
    name = request.param
    folder = tmp_path_factory.mktemp("whole") / "out"
    made = compress(dense_for(name), GPUSQ, data_for(name), folder)
    return name, folder, made


def test_a_run_leaves_a_packed_two_of_four_checkpoint_and_nothing_else(uninterrupted):
    _, folder, made = uninterrupted
    assert [stage["stage"] for stage in made.stages] == ["prune", "finetune", "calibrate", "finetune"]
    assert made.stages[1]["steps"] == 6  # ceil(10 / 4) steps an epoch, two epochs
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    model = load(folder, backend="reference")
    modules = dict(model.named_modules())
    assert all(check_nm(modules[gemm.name].weight, Pattern.parse("2:4")) for gemm in made.plan.gemms)


@pytest.mark.parametrize("batches", [4, 7, 12])
def test_a_killed_run_resumes_to_the_same_bits(uninterrupted, tmp_path, batches):
    """Killed in stage 1, in calibration or in stage 2: the same command ends with the same weights."""
    name, folder, _ = uninterrupted
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(dense_for(name), GPUSQ, data_for(name, after=batches), out, save_seconds=0)
    assert not out.exists()
    compress(dense_for(name), GPUSQ, data_for(name), out, save_seconds=0)
    whole, resumed = (load_file(f / "weights.safetensors") for f in (folder, out))
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_sigkill_while_training_then_the_same_command(tmp_path):
    """A real process killed as soon as it has a checkpoint; the resumed weights equal an unkilled run's."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {os.path.dirname(os.path.dirname(os.path.abspath(__file__)))!r})
        sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})
        from test_engine import GPUSQ, data_for, dense_for
        from squeezoo.compress.engine import compress
        slow = float(sys.argv[2])
        data = data_for("timm_vit")
        collate = lambda rows, inner=data.collate: (time.sleep(slow), inner(rows))[1]
        data = type(data)(data.features, collate, data.augment)
        compress(dense_for("timm_vit"), GPUSQ, data, sys.argv[1], save_seconds=0)
        """)
    )

    def start(out, slow):
        return subprocess.Popen([sys.executable, str(script), str(out), str(slow)], stderr=subprocess.PIPE)

    killed = start(tmp_path / "killed", 1.5)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("killed.work/stage-1/checkpoint-*/trainer_state.json")):
        assert killed.poll() is None, killed.stderr.read().decode()
        assert time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed").exists()
    for name in ("killed", "whole"):
        process = start(tmp_path / name, 0)
        assert process.wait() == 0, process.stderr.read().decode()
    a, b = (load_file(tmp_path / name / "weights.safetensors") for name in ("killed", "whole"))
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_the_teacher_and_the_dense_model_never_change():
    dense = dense_for("bert")
    before = copy.deepcopy(dense.model.state_dict())
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        compress(dense, GPUSQ, data_for("bert"), f"{folder}/out")
    assert all(torch.equal(value, before[key]) for key, value in dense.model.state_dict().items())
    assert not any(module.training for module in dense.model.modules())


def test_distillation_pulls_the_student_to_its_teacher(tmp_path):
    """Soft and feature loss alone bring the student nearer to the dense model than one-shot pruning leaves it."""
    dense, data = dense_for("timm_vit"), data_for("timm_vit", 32)
    data = TrainData(data.features, data.collate)
    body = Recipe.load("gpusq-gemm-int8").model_dump(mode="json")
    body |= {"rules": [{"roles": ["block"], "sparsity": "2:4"}], "stages": body["stages"][:2]}
    body["stages"][1] |= {"epochs": 10, "learning_rate": 2e-3, "batch_size": 8}
    body["stages"][1]["distill"] |= {"hard": 0}
    compress(dense, Recipe.parse(body), data, tmp_path / "taught")
    compress(dense, Recipe.load("magnitude-2-4"), None, tmp_path / "pruned")
    batch = data.collate(data.features)
    with torch.no_grad():
        target = logits(dense.model, batch)
        taught, pruned = ((logits(load(tmp_path / n), batch) - target).square().mean() for n in ("taught", "pruned"))
    assert taught < 0.5 * pruned


def test_the_dense_baseline_goes_through_the_same_stages(tmp_path):
    dense = dense_for("timm_vit")
    recipe, data = Recipe.load("dense").override(epochs=1, batch_size=4), data_for("timm_vit")
    made = train_dense(dense, recipe, data, tmp_path / "d")
    assert made.stages[0]["steps"] == 3
    # what it was made from is known: other data, another recipe or another folder is not taken for it
    assert is_trained(dense, recipe, data, tmp_path / "d")
    assert not is_trained(dense, recipe, data_for("timm_vit", samples=9), tmp_path / "d")
    assert not is_trained(dense, recipe.override(epochs=2), data, tmp_path / "d")
    assert not is_trained(dense, recipe, data, tmp_path)
    loaded = load_dense(str(tmp_path / "d"))
    batch = tiny_batch("timm_vit")
    assert not torch.equal(logits(loaded.model, batch), logits(dense.model, batch))
    with pytest.raises(RecipeError, match="has rules"):
        train_dense(dense, GPUSQ, data_for("timm_vit"), tmp_path / "e")


def test_refused_before_anything_is_written(tmp_path):
    dense, out = dense_for("bert"), tmp_path / "out"
    with pytest.raises(RecipeError, match="needs data"):
        compress(dense, GPUSQ, None, out)
    with pytest.raises(RecipeError, match="training data is empty"):
        compress(dense, GPUSQ, TrainData([], lambda rows: {}), out)
    with pytest.raises(RecipeError, match="no recipe is named"):
        compress(dense, "gpusq", None, out)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_of_something_else_is_not_resumed(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(dense_for("bert"), GPUSQ, data_for("bert", after=4), out)
    other = GPUSQ.override(epochs=1)
    with pytest.raises(RunError, match="--restart"):
        compress(dense_for("bert"), other, data_for("bert"), out)
    compress(dense_for("bert"), other, data_for("bert"), out, restart=True)
    assert (out / "squeezoo.json").is_file()


def test_a_diverging_loss_stops_with_its_step(tmp_path):
    with pytest.raises(TrainingError, match=r"loss is nan at step \d+ .*lower the learning rate"):
        compress(dense_for("bert"), GPUSQ.override(learning_rate=1e30), data_for("bert"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_cut_off_while_saving_is_passed_over(tmp_path):
    """The Trainer writes trainer_state.json last; a folder without it, or with a cut file, is no checkpoint."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        compress(dense_for("timm_vit"), GPUSQ, data_for("timm_vit", after=5), out, save_seconds=0)
    stage = tmp_path / "out.work" / "stage-1"
    complete = last_complete_checkpoint(stage)
    assert complete is not None
    step = int(complete.name.split("-")[1])
    cut = stage / f"checkpoint-{step + 1}"
    cut.mkdir()
    (cut / "model.safetensors").write_bytes((complete / "model.safetensors").read_bytes()[:1000])
    assert last_complete_checkpoint(stage) == complete
    assert not cut.exists()


def test_batch_order_depends_on_seed_and_epoch_alone():
    """Every sample once, like lengths together, another order each epoch, the same order for the same epoch."""
    lengths = [1 + i % 7 for i in range(103)]
    sampler = EpochSampler(lengths, 8, seed=3)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again
    assert first != second
    assert sorted(first) == sorted(second) == list(range(103))
    spans = [
        max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in (first[k : k + 8] for k in range(0, 96, 8))
    ]
    assert max(spans) <= 2


def test_scales_and_weights_move_by_the_same_fraction():
    """Under Adam a parameter moves by its rate: rate(s) / s == rate(w) / rms(w), and no weight decay on scales."""
    from squeezoo.compress.attach import attach_, compressed_weights, latent_OI, prune_, quantizers
    from squeezoo.compress.calibrate import calibrate_
    from squeezoo.compress.finetune import give_scales_their_rate_
    from squeezoo.compress.plan import make_plan

    model = TINY["bert"]()
    attach_(model, make_plan(model, GPUSQ))
    prune_(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    give_scales_their_rate_(optimizer, model)
    assert len(optimizer.param_groups) == 1  # nothing is calibrated yet, so nothing is trained
    calibrate_(model, [tiny_batch("bert")])
    give_scales_their_rate_(optimizer, model)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    for _, quantizer in quantizers(model):
        assert group_of[id(quantizer.scale)]["weight_decay"] == 0
    for _, module, parametrization in compressed_weights(model):
        rms = latent_OI(module, parametrization).square().mean().sqrt().item()
        scale = parametrization.quantizer.scale
        assert group_of[id(scale)]["lr"] / scale.mean().item() == pytest.approx(1e-3 / rms, rel=1e-4)
