"""A teacher's outputs on disk: the same loss as the running teacher in any batches; resumed, never mistaken."""

from copy import deepcopy

import pytest
import torch
from squeezoo.compress import teacher_cache
from squeezoo.compress.fingerprint import fingerprint
from squeezoo.compress.heads import DistillError
from squeezoo.compress.objective import Objective
from squeezoo.compress.stages import Finetune
from squeezoo.compress.teacher_cache import Numbered, TeacherCache, cache_teacher, collate_numbered
from tiny import make, tiny_batch

SAMPLES = 8
FILLERS = {"input_ids": 1, "labels": -100}
MIXED = {"teacher": "dense"}
FIRST = {"method": "patient", "blocks": [2]}
ALL_TOKENS = {"method": "patient", "blocks": [2], "token": "all"}
CASES = [
    ("bert", MIXED), ("bert", FIRST), ("bert_token", ALL_TOKENS), ("bert_qa", MIXED), ("gpt2", ALL_TOKENS),
    ("bart", MIXED), ("wav2vec2_stable", MIXED), ("timm_vit", MIXED),
]  # fmt: skip


def samples(name: str) -> list[dict[str, torch.Tensor]]:
    """`tiny_batch` cut into samples without padding, of different lengths; waveforms with an attention mask."""
    batch = tiny_batch(name, SAMPLES)
    if name == "wav2vec2_stable":
        batch["attention_mask"] = torch.ones(SAMPLES, 200, dtype=torch.long)
        batch["attention_mask"][1::2, 140:] = 0
    found = []
    for k in range(SAMPLES):
        row = {key: value[k] for key, value in batch.items()}
        if "attention_mask" in row:
            length = int(row["attention_mask"].sum())
            same = row["attention_mask"].shape
            row = {key: value[:length] if value.shape == same else value for key, value in row.items()}
        found.append(row)
    return found


def collate(rows):
    """Pads to the longest of the batch."""
    batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if values[0].dim() != 1:
            batch[key] = torch.stack(values)
        else:
            batch[key] = torch.nn.utils.rnn.pad_sequence(values, True, FILLERS.get(key, 0))
    return batch


def stage(config):
    return Finetune(stage="finetune", epochs=1, learning_rate=1e-3, distill=config)


def models(name):
    student = make(name)
    teacher = deepcopy(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
    return student.eval(), teacher


def cached(name, config, folder, **settings):
    student, teacher = models(name)
    settings = {"batch_size": 3, "per_shard": 5} | settings
    distill = stage(config).distill
    return cache_teacher(teacher, student, distill, samples(name), collate, folder, **settings)


@pytest.mark.parametrize(("name", "config"), CASES, ids=lambda case: case if isinstance(case, str) else None)
def test_a_cached_teacher_gives_the_loss_of_the_running_one(name, config, tmp_path):
    """To 1e-6 (ALGORITHMS E.4: both must give the same loss): the cache saw batches of 3, sorted by length, the
    training has batches of 4 in another order and so other padding. The gradients are the same too."""
    student, teacher = models(name)
    running = Objective(student, stage(config), teacher, None, 0).eval()
    stored = Objective(student, stage(config), cached(name, config, tmp_path), None, 0).eval()
    rows, numbered = Numbered(samples(name)), collate_numbered(collate)
    for ids in ([6, 1, 3, 0], [5, 7, 2, 4]):
        batch = numbered([rows[k] for k in ids])
        assert batch["sample_id"].tolist() == ids
        expected, found = running(**batch)["loss"], stored(**batch)["loss"]
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        gradients = [
            torch.autograd.grad(loss, list(student.parameters()), allow_unused=True) for loss in (expected, found)
        ]
        for one, other in zip(*gradients, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_only_what_the_loss_reads_is_kept(tmp_path):
    """PKD on [CLS]: per sample the scores and one state of width 32, whatever its length."""
    cache = cached("bert", FIRST, tmp_path)
    assert [str(point) for point in cache.points] == ["block_out of block 2"]
    from safetensors.torch import load_file

    tensors = load_file(cache.folder / "outputs-00000.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "scores": (5, 3), "scores.rows": (5,), "state.0": (5, 32), "state.0.rows": (5,),
    }  # fmt: skip
    with pytest.raises(DistillError, match="does not keep attn_out of block 1: make a new one"):
        Objective(make("bert"), stage({**MIXED, "features": ["attn_out"]}), _with_all_points(cache), None, 0)


def _with_all_points(cache):
    """The cache, offering the points of a mixed stage that it never kept."""
    from squeezoo.compress.observe import available_points

    cache.available = available_points(make("bert"), stage(MIXED).distill)
    return cache


class KilledError(Exception):
    pass


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """After the kill the first shard is there; the second call computes only the others. The files are the same as
    those of a run that was never killed. A damaged shard is made again."""
    observed = []
    original = teacher_cache._observe
    monkeypatch.setattr(teacher_cache, "_observe", lambda *args: observed.append(len(args[1])) or original(*args))

    def kill(_):
        raise KilledError

    with pytest.raises(KilledError):
        cached("bert", FIRST, tmp_path / "killed", per_shard=3, say=kill)
    (folder,) = (tmp_path / "killed").iterdir()
    with pytest.raises(DistillError, match="lacks shard 1 of 3: run cache_teacher again"):
        TeacherCache(folder)
    resumed = cached("bert", FIRST, tmp_path / "killed", per_shard=3)
    assert resumed.folder == folder
    assert observed == [3, 3, 2]
    whole = cached("bert", FIRST, tmp_path / "whole", per_shard=3)
    files = [{path.name: path.read_bytes() for path in cache.folder.iterdir()} for cache in (resumed, whole)]
    assert files[0] == files[1]
    assert len(files[0]) == 4
    damaged = folder / "outputs-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:40])
    cached("bert", FIRST, tmp_path / "killed", per_shard=3)
    assert damaged.read_bytes() == files[1][damaged.name]
    assert observed[-1] == 3
    cached("bert", FIRST, tmp_path / "killed", per_shard=3)
    assert len(observed) == 7  # nothing left to do


def test_the_fingerprint_changes_with_whatever_changes_the_outputs():
    _, teacher = models("bert")
    rows = samples("bert")
    first = fingerprint(teacher, rows, collate)
    assert first == fingerprint(deepcopy(teacher), samples("bert"), collate)
    others = [
        fingerprint(teacher, rows, collate, "token"),
        fingerprint(teacher, rows[::-1], collate),
        fingerprint(teacher, rows[:-1], collate),
        fingerprint(teacher, rows, lambda rows: {**collate(rows), "extra": torch.ones(1)}),
    ]
    rows[3]["input_ids"][0] += 1
    others.append(fingerprint(teacher, rows, collate))
    teacher.config.hidden_act = "relu"
    others.append(fingerprint(teacher, rows, collate))
    with torch.no_grad():
        teacher.classifier.weight[0, 0] += 1e-6
    others.append(fingerprint(teacher, rows, collate))
    assert len({first, *others}) == 8


def test_images_and_arrays_have_their_content_in_the_fingerprint():
    """Two PIL images are equal by their pixels; their repr holds an address."""
    image = pytest.importorskip("PIL.Image")
    _, teacher = models("timm_vit")

    def of(colour):
        rows = [{"image": image.new("L", (4, 4), colour)}]
        return fingerprint(teacher, rows, lambda rows: {"pixel_values": torch.zeros(1, 1, 8, 8)})

    assert of(3) == of(3) != of(4)


def test_other_batches_than_the_cached_ones_are_refused(tmp_path):
    cache = cached("bert_token", ALL_TOKENS, tmp_path)
    objective = Objective(make("bert_token"), stage(ALL_TOKENS), cache, None, 0)
    batch = collate(samples("bert_token")[:2])
    with pytest.raises(DistillError, match="needs sample_id in the batch: train on Numbered"):
        objective(**batch)
    with pytest.raises(DistillError, match="sample 1 has 12 positions, its cached scores 8"):
        objective(**batch, sample_id=torch.tensor([1, 0]))
    with pytest.raises(DistillError, match="sample_id 8 is outside the cache, which has 8"):
        objective(**batch, sample_id=torch.tensor([0, 8]))
    with pytest.raises(DistillError, match="cache: false to augment"):
        Objective(make("bert_token"), stage(ALL_TOKENS), cache, lambda batch, generator: batch, 0)
    with pytest.raises(DistillError, match="holds no teacher cache"):
        TeacherCache(tmp_path)


def test_a_disk_that_is_too_small_is_told_before_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(DistillError, match="GB free: set cache: false, or compare less"):
        cached("bert", MIXED, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_bfloat16_is_that_of_the_training(tmp_path):
    """The cached teacher ran under the same autocast as the running one would."""
    student, teacher = models("bert")
    cache = cached("bert", MIXED, tmp_path, precision="bfloat16")
    running = Objective(student, stage(MIXED), teacher, None, 0).eval()
    stored = Objective(student, stage(MIXED), cache, None, 0).eval()
    rows = Numbered(samples("bert"))
    batch = collate_numbered(collate)([rows[k] for k in (0, 2, 4)])  # as long as in the cache
    with torch.autocast("cpu", torch.bfloat16):
        assert stored(**batch)["loss"].item() == pytest.approx(running(**batch)["loss"].item(), rel=1e-3)
