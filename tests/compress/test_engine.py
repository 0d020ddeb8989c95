"""The engine end to end on tiny models: stages, teachers, resume, and what it refuses before anything is written."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from squeezoo.compress.checkpoint import load
from squeezoo.compress.engine import RunError, compress, is_trained, train_dense
from squeezoo.compress.finetune import EpochSampler, TrainData, last_complete_checkpoint
from squeezoo.compress.masks import Pattern, check_nm
from squeezoo.compress.objective import TrainingError
from squeezoo.compress.recipe import Recipe, RecipeError
from squeezoo.models.dense import Dense, DenseError, load_dense, logits
from tiny import ALL, TIMM_ARGS, TINY, tiny_batch

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
        compress(dense_for("bert"), GPUSQ, data_for("bert", after=4), out, save_seconds=0)
    other = GPUSQ.override(epochs=1)
    with pytest.raises(RunError, match="--restart"):
        compress(dense_for("bert"), other, data_for("bert"), out)
    compress(dense_for("bert"), other, data_for("bert"), out, restart=True)
    assert (out / "squeezoo.json").is_file()


def test_a_run_that_got_nowhere_does_not_stand_in_the_way(tmp_path):
    """Killed before its first checkpoint, after a magnitude prune of moments: the corrected recipe just runs. After an
    error there is nothing left to begin with."""
    out, other = tmp_path / "out", GPUSQ.override(epochs=1)
    with pytest.raises(KeyboardInterrupt):
        compress(dense_for("timm_vit"), GPUSQ, data_for("timm_vit", after=2), out)
    assert (tmp_path / "out.work" / "stage-0.safetensors").is_file()
    compress(dense_for("timm_vit"), other, data_for("timm_vit"), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(TrainingError):
        compress(dense_for("timm_vit"), GPUSQ.override(learning_rate=1e30), data_for("timm_vit"), tmp_path / "diverged")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_after_an_error_what_was_trained_stays(tmp_path):
    """The first training stage is done when the second meets a broken sample: the work folder keeps it."""
    data = data_for("timm_vit")
    calls = [0]

    def collate(rows):
        calls[0] += 1
        if calls[0] > 12:  # 6 steps, calibration, then stage 4
            raise ValueError("a broken sample")
        return data.collate(rows)

    with pytest.raises(ValueError, match="a broken sample"):
        compress(dense_for("timm_vit"), GPUSQ, TrainData(data.features, collate), tmp_path / "out")
    assert (tmp_path / "out.work" / "stage-1.safetensors").is_file()


def test_teacher_and_student_are_compared_before_the_first_stage(tmp_path):
    """Blocks that the teacher does not have, cached outputs of augmented data, in stage 4: nothing is written."""
    from squeezoo.compress.heads import DistillError

    data = data_for("timm_vit")
    for changes, message in (({"blocks": [9]}, "9"), ({"cache": True}, "cache: false")):
        body = GPUSQ.model_dump(mode="json")
        body["stages"][3]["distill"] |= changes
        with pytest.raises(DistillError, match=rf"stage 4 .*{message}"):
            compress(dense_for("timm_vit"), Recipe.parse(body), data, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_teacher_teaches_and_is_on_record(tmp_path):
    """DistilBERT learns from BERT of its width, whose weights are on record by their hash in the stages that it taught.
    The student ends elsewhere than with itself as the teacher; a run is not resumed with another teacher."""
    from squeezoo.compress.checkpoint import load_manifest
    from squeezoo.compress.fingerprint import weights_digest

    student, teacher = Dense(ALL["distilbert"](), None, "small", None, "transformers"), dense_for("bert")
    with pytest.raises(KeyboardInterrupt):
        compress(student, GPUSQ, data_for("distilbert", after=4), tmp_path / "a", teacher=teacher, save_seconds=0)
    with pytest.raises(RunError, match="another recipe, model or data"):
        compress(student, GPUSQ, data_for("distilbert"), tmp_path / "a")
    made = compress(student, GPUSQ, data_for("distilbert"), tmp_path / "a", teacher=teacher)
    told = {"name": "bert", "revision": None, "sha256": weights_digest(teacher.model)}
    assert [stage.get("teacher") for stage in made.stages] == [None, told, None, None]  # stage 4 learns from stage 2
    assert load_manifest(tmp_path / "a").training[1]["teacher"] == told
    compress(student, GPUSQ, data_for("distilbert"), tmp_path / "b")
    a, b = (load_file(tmp_path / name / "weights.safetensors") for name in "ab")
    assert not all(torch.equal(a[key], b[key]) for key in a)


def test_a_foreign_teacher_that_cannot_teach_is_refused(tmp_path):
    from squeezoo.compress.heads import DistillError

    class Words:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: index for index, word in enumerate(self.words)}

    def refused(error, message, recipe=GPUSQ, student=None, **changes):
        student, teacher = student or dense_for("bert"), replace(dense_for("bert"), **changes)
        with pytest.raises(error, match=message):
            compress(student, recipe, data_for("bert"), tmp_path / "out", teacher=teacher)

    refused(RecipeError, "asp-2-4 learns from no dense teacher", Recipe.load("asp-2-4"))
    refused(DenseError, "not trained on this task.*classifier", new=("classifier.weight",))
    student = replace(dense_for("bert"), processor=Words("a", "b"))
    refused(
        DistillError,
        r"another tokenizer \(3 tokens, the student's 2\)",
        student=student,
        processor=Words("a", "b", "c"),
    )
    swapped = ALL["bert"]()
    swapped.config.label2id = {"LABEL_0": 1, "LABEL_1": 0, "LABEL_2": 2}
    refused(DistillError, "numbers its labels", model=swapped)
    wide = load_dense("timm/vit_tiny_patch16_224", model_args=TIMM_ARGS | {"embed_dim": 64}).model
    with pytest.raises(DistillError, match=r"stage 2 of recipe .*64.*32"):
        compress(dense_for("timm_vit"), GPUSQ, data_for("timm_vit"), tmp_path / "out", teacher=wide)
    more = load_dense("timm/vit_tiny_patch16_224", model_args=TIMM_ARGS | {"num_classes": 5}).model
    with pytest.raises(DistillError, match="the teacher scores 5 labels, the student 3"):
        compress(dense_for("timm_vit"), GPUSQ, data_for("timm_vit"), tmp_path / "out", teacher=more)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["bert", "timm_vit"])
def test_a_changed_row_anywhere_is_other_data(name, tmp_path):
    """Two rows in the middle change places, or one value changes: the run is not resumed with them."""
    data = data_for(name)
    with pytest.raises(KeyboardInterrupt):
        compress(dense_for(name), GPUSQ, data_for(name, after=4), tmp_path / "out", save_seconds=0)
    swapped = list(data.features)
    swapped[4], swapped[5] = swapped[5], swapped[4]
    key = next(key for key in data.features[0] if key != "labels")
    changed = list(data.features)
    changed[6] = {**changed[6], key: changed[6][key].clone()}
    changed[6][key].view(-1)[-1] += 1
    for features in (swapped, changed, data.features[:-1]):
        with pytest.raises(RunError, match="another recipe, model or data"):
            compress(dense_for(name), GPUSQ, TrainData(features, data.collate, data.augment), tmp_path / "out")
    compress(dense_for(name), GPUSQ, data_for(name), tmp_path / "out")


def test_a_broken_model_is_refused_with_its_weight(tmp_path):
    """Also by a recipe that reads no data, as dynamic quantization."""
    for recipe, data in (("dq", None), (GPUSQ, data_for("bert"))):
        dense = dense_for("bert")
        with torch.no_grad():
            dense.model.bert.encoder.layer[1].output.LayerNorm.weight[3] = float("nan")
        with pytest.raises(
            DenseError, match=r"layer\.1\.output\.LayerNorm\.weight of bert .*1 of 32 values.*sound model"
        ):
            compress(dense, recipe, data, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


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
