"""Checkpoints: what is stored comes back, damage is named, a failed save loses nothing."""

import atexit
import dataclasses
import json
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from squeezoo.compress import atomic, backends, checkpoint
from squeezoo.compress.attach import attach_, fold_, prune_
from squeezoo.compress.backends import CheckpointError
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.checkpoint import check_files, load, load_manifest, save_checkpoint
from squeezoo.compress.pack import PackError, pack, unpack
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.runtime import int8_supported
from squeezoo.compress.stages import Storage
from squeezoo.compress.verify import INT8_TOLERANCE, verify
from squeezoo.models.dense import logits
from tiny import TINY, tiny_batch

BASE = {"name": "tiny", "revision": None}
needs_int8 = pytest.mark.skipif(not int8_supported()[0], reason=f"no int8 backend: {int8_supported()[1]}")


def attached(name, recipe_name="gpusq-gemm-int8", **storage):
    recipe = Recipe.load(recipe_name)
    if storage:
        recipe = recipe.model_copy(update={"storage": Storage(**storage)})
    model = TINY[name]()
    plan = make_plan(model, recipe)
    attach_(model, plan)
    prune_(model)
    if recipe.rules[0].weight is not None:
        calibrate_(model, [tiny_batch(name)])
    return model, plan, recipe


@cache
def _made(name):
    """One checkpoint per architecture; the tests copy it, for making one takes a second."""
    model, plan, recipe = attached(name)
    folder = Path(tempfile.mkdtemp()) / name
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    return save_checkpoint(model, plan, recipe, folder, name=f"tiny-{name}.none.gpusq-gemm-int8", base=BASE)


def saved(folder, name="bert"):
    shutil.copytree(_made(name), folder)
    return folder


@pytest.mark.parametrize("name", list(TINY))
def test_the_reference_backend_is_the_trained_model(name, tmp_path):
    """With float32 storage nothing is rounded: outputs equal the attached model's up to the order of float sums."""
    model, plan, recipe = attached(name, other="float32")
    save_checkpoint(model, plan, recipe, tmp_path / "c", name="n", base=BASE)
    with torch.no_grad():
        expected = logits(model, tiny_batch(name))
        found = logits(load(tmp_path / "c", backend="reference"), tiny_batch(name))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@needs_int8
@pytest.mark.parametrize("name", list(TINY))
def test_the_int8_backend_agrees_with_the_reference(name, tmp_path):
    """Tolerance: one quantizer step moved in a few of many summands, see INT8_TOLERANCE."""
    saved(tmp_path / "c", name)
    with torch.no_grad():
        reference = logits(load(tmp_path / "c", backend="reference"), tiny_batch(name))
        integer = logits(load(tmp_path / "c", backend="int8"), tiny_batch(name))
    assert (integer - reference).abs().max() <= INT8_TOLERANCE * reference.abs().max()


@pytest.mark.parametrize("recipe_name", ["magnitude-2-4", "gpusq-gemm-int8"])
@pytest.mark.parametrize("name", list(TINY))
def test_packing_is_exact(name, recipe_name):
    """unpack(pack(model)) is the folded model, value by value (float32 storage)."""
    model, plan, recipe = attached(name, recipe_name, values="float32", other="float32")
    state = unpack(pack(model, plan, recipe.storage), plan, keep_int8=False).state
    fold_(model)
    expected = model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-6, atol=0)


def test_four_bits_take_half_the_bytes_of_eight(tmp_path):
    sizes = {}
    for bits in (4, 8):
        body = Recipe.load("gpusq-gemm-int8").model_dump(mode="json")
        body["rules"][0]["weight"]["bits"] = body["rules"][0]["input"]["bits"] = bits
        model, recipe = TINY["bert"](), Recipe.parse(body)
        plan = make_plan(model, recipe)
        attach_(model, plan)
        prune_(model)
        calibrate_(model, [tiny_batch("bert")])
        tensors = pack(model, plan, recipe.storage)
        sizes[bits] = sum(t.numel() for n, t in tensors.items() if n.endswith(".values"))
        state = unpack(tensors, plan, keep_int8=False).state
        name = plan.gemms[0].name
        torch.testing.assert_close(state[f"{name}.weight"], dict(model.named_modules())[name].weight.detach())
    assert 2 * sizes[4] == sizes[8]


def test_golden_input_holds_no_data_set(tmp_path):
    """It is made from the model's own description: the same for every training set, and padded rows are in it."""
    folder = saved(tmp_path / "c")
    golden = load_file(folder / "golden.safetensors")
    assert golden["input.attention_mask"].sum() < golden["input.attention_mask"].numel()
    from squeezoo.models.example import example_batch

    assert torch.equal(golden["input.input_ids"], example_batch(TINY["bert"](), padded=True)["input_ids"])


@pytest.mark.parametrize("name", list(TINY))
def test_verify_proves_every_file_and_the_golden_output(name, tmp_path):
    found = verify(saved(tmp_path / "c", name))
    assert found.files == 3
    assert found.reference_error < 1e-5
    assert (found.int8_error is not None) == int8_supported()[0]


def test_a_wrong_output_is_found_even_when_every_hash_fits(tmp_path):
    """A checkpoint whose scales were exchanged together with their hash still fails its golden output."""
    from safetensors.torch import save_file

    folder = saved(tmp_path / "c")
    tensors = load_file(folder / "weights.safetensors")
    tensors["bert.encoder.layer.0.output.dense.scale"] *= 100
    save_file(tensors, folder / "weights.safetensors")
    manifest = json.loads((folder / "squeezoo.json").read_text())
    manifest["files"]["weights.safetensors"]["sha256"] = atomic.sha256(folder / "weights.safetensors")
    (folder / "squeezoo.json").write_text(json.dumps(manifest))
    check_files(folder, load_manifest(folder))
    with pytest.raises(CheckpointError, match=r"reference backend is .* off the golden output"):
        verify(folder)


@pytest.mark.parametrize("file", ["weights.safetensors", "golden.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damage_names_the_file_and_both_hashes(file, damage, tmp_path):
    folder = saved(tmp_path / "c")
    path = folder / file
    content = bytearray(path.read_bytes())
    expected = load_manifest(folder).files[file]["sha256"]
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        content[-5] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=file) as caught:
        load(folder)
    if damage == "missing":
        assert "is missing" in str(caught.value)
    else:
        assert expected in str(caught.value)
        assert atomic.sha256(path) in str(caught.value)


def test_folders_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        load(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"it holds no squeezoo\.json"):
        load(tmp_path)
    folder = saved(tmp_path / "c")
    text = (folder / "squeezoo.json").read_text()
    (folder / "squeezoo.json").write_text(text.replace('"format_version": 2', '"format_version": 99'))
    with pytest.raises(CheckpointError, match="format version 99, this Squeezoo reads 1 to 2"):
        load(folder)
    (folder / "squeezoo.json").write_text(text[:300])
    with pytest.raises(CheckpointError, match="is damaged"):
        load(folder)


def test_tensors_that_contradict_the_plan(tmp_path):
    model, plan, recipe = attached("bert")
    tensors = pack(model, plan, recipe.storage)
    name = plan.gemms[0].name
    without = {k: v for k, v in tensors.items() if k != f"{name}.index"}
    with pytest.raises(PackError, match=rf"expects the tensor {name}\.index"):
        unpack(without, plan, keep_int8=False)
    with pytest.raises(PackError, match=name):
        unpack(tensors | {f"{name}.values": tensors[f"{name}.values"][:, :-1]}, plan, keep_int8=False)


def test_uncalibrated_quantizers_are_not_saved(tmp_path):
    model = TINY["bert"]()
    recipe = Recipe.load("gpusq-gemm-int8")
    plan = make_plan(model, recipe)
    attach_(model, plan)
    with pytest.raises(PackError, match="never calibrated"):
        save_checkpoint(model, plan, recipe, tmp_path / "c", name="n", base=BASE)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_or_impossible_backend(tmp_path):
    folder = saved(tmp_path / "c")
    with pytest.raises(CheckpointError, match="unknown backend 'fast'; allowed: auto, int8, cuda, reference, dense"):
        load(folder, backend="fast")
    with pytest.raises(CheckpointError, match="runs on the CPU, not on cuda"):
        load(folder, backend="int8", device="cuda")
    model, plan, recipe = attached("bert", "magnitude-2-4")
    save_checkpoint(model, plan, recipe, tmp_path / "m", name="n", base=BASE)
    with pytest.raises(CheckpointError, match="no GEMM with quantized inputs"):
        load(tmp_path / "m", backend="int8")
    assert load(tmp_path / "m") is not None


@pytest.mark.parametrize("file", ["weights.safetensors", "golden.safetensors", "squeezoo.json"])
def test_disk_full_while_saving_keeps_the_old_checkpoint(file, tmp_path, monkeypatch):
    """The disk fills up while one of the files is written: the old checkpoint stays whole, no rubbish stays."""
    folder = saved(tmp_path / "c")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if file == "squeezoo.json":
        monkeypatch.setattr(checkpoint.Manifest, "to_dict", full)
    else:
        real = checkpoint.save_file
        monkeypatch.setattr(checkpoint, "save_file", lambda t, path: full() if path.name == file else real(t, path))
    model, plan, recipe = attached("vit")
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(model, plan, recipe, folder, name="other", base=BASE)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    verify(folder)


def test_a_kill_between_the_two_renames_is_mended_on_load(tmp_path):
    """The old folder has been moved away, the new one has not arrived: the next load brings the old one back."""
    folder = saved(tmp_path / "c")
    folder.rename(tmp_path / ".c.old")
    assert load_manifest(folder).name == "tiny-bert.none.gpusq-gemm-int8"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_saving_again_replaces_the_whole_folder(tmp_path):
    folder = saved(tmp_path / "c")
    (folder / "stale.txt").write_text("from before")
    model, plan, recipe = attached("vit")
    save_checkpoint(model, plan, recipe, folder, name="n", base=BASE)
    assert not (folder / "stale.txt").exists()
    assert load_manifest(folder).plan.adapter == "vit"
    shutil.rmtree(folder)


def test_a_cpu_without_int8_falls_back_and_says_so_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a CPU without VNNI: the reference, one warning per process that says why; asked for by name, an error; no
    warning about a recipe that quantizes nothing."""
    monkeypatch.setattr(backends, "int8_supported", lambda: (False, "the CPU is too old"))
    backends._say_slower.cache_clear()
    manifest = load_manifest(saved(tmp_path / "c"))
    plan = manifest.plan
    with pytest.warns(RuntimeWarning, match=r"the CPU is too old.*float32 reference.*backend='dense'"):
        assert backends.resolve_backend("auto", "cpu", plan, "r") == "reference"
    floats = dataclasses.replace(plan, gemms=tuple(dataclasses.replace(gemm, input=None) for gemm in plan.gemms))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve_backend("auto", "cpu", plan, "r") == "reference"
        assert backends.resolve_backend("auto", "cpu", floats, "r") == "reference"
    with pytest.raises(CheckpointError, match="backend int8 cannot run: the CPU is too old"):
        backends.resolve_backend("int8", "cpu", plan, "r")
