"""Checkpoints of every recipe: the loaded model is the trained one, whatever it is made of; older formats load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from squeezoo.compress.attach import attach_, prune_
from squeezoo.compress.attention_doors import detach_attention_
from squeezoo.compress.attention_map import activate_attention_
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.checkpoint import load, load_manifest, save_checkpoint
from squeezoo.compress.pack import PackError, forms, pack, unpack
from squeezoo.compress.plan import Plan, make_plan
from squeezoo.compress.recipe import Recipe, recipe_names
from squeezoo.compress.rules import EmbeddingRule
from squeezoo.compress.runtime import int8_supported
from squeezoo.compress.runtime.embedding import Int8Embedding
from squeezoo.compress.stages import Storage
from squeezoo.compress.upgrade import FORMAT_VERSION, upgraded
from squeezoo.compress.verify import INT8_TOLERANCE, verify
from squeezoo.models.dense import logits
from tiny import ALL, tiny_batch
from torch import nn

ROOT = Path(__file__).parents[2]
FORMAT_1 = Path(__file__).parents[1] / "frozen" / "format_1"
EXACT = Storage(values="float32", other="float32")


def distinct_recipes() -> list[str]:
    """One built-in recipe for each thing that they do to a model; how they train does not matter here."""
    found: dict[str, str] = {}
    for name in recipe_names():
        recipe = Recipe.load(name)
        kind = recipe.model_dump_json(include={"rules", "attention", "embeddings"})
        if recipe.rules or recipe.attention:
            found.setdefault(kind, name)
    return list(found.values())


def compressed(name: str, recipe: Recipe) -> tuple[nn.Module, Plan]:
    """A tiny model with masks, calibrated quantizers and active attention maps, but without training."""
    model = ALL[name]()
    plan = make_plan(model, recipe)
    attach_(model, plan)
    prune_(model)
    if any(gemm.weight for gemm in plan.gemms) or any(site.q for site in plan.attention):
        calibrate_(model, [tiny_batch(name, seed=seed) for seed in (1, 2)])
    activate_attention_(model)
    return model.eval(), plan


def output(model: nn.Module, name: str) -> torch.Tensor:
    with torch.inference_mode():
        return logits(model, tiny_batch(name))


def saved(name: str, recipe: Recipe, folder: Path) -> tuple[nn.Module, Plan]:
    model, plan = compressed(name, recipe)
    save_checkpoint(model, plan, recipe, folder, name="n", base={"name": "tiny", "revision": None})
    return model, plan


@pytest.mark.parametrize(
    ("name", "recipe_name"),
    [*(("bert", recipe_name) for recipe_name in distinct_recipes()), ("timm_vit", "deepcomp-sparse-int8"),
     ("timm_vit", "gpusq-gemm-mha-int8"), ("gpt2", "deepcomp-int8"), ("gpt2", "dq"), ("bart", "q8bert")],
)  # fmt: skip
def test_the_loaded_model_is_the_trained_one(name: str, recipe_name: str, tmp_path: Path) -> None:
    """Expected: with float32 storage the output of the attached model in evaluation mode; the int8 backend within the
    flips of single steps that verify allows; verify itself passes."""
    recipe = Recipe.load(recipe_name).model_copy(update={"storage": EXACT})
    model, plan = saved(name, recipe, tmp_path / "c")
    expected = output(model, name)
    found = output(load(tmp_path / "c", backend="reference"), name)
    if plan.embeddings:  # a tied projection uses the table's integers too, and absmax rounds on disk only
        assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
    else:
        torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)
    proof = verify(tmp_path / "c")
    assert proof.reference_error < 1e-5
    quantized = any(gemm.input for gemm in plan.gemms)
    assert (proof.int8_error is not None) == (quantized and int8_supported()[0])


def rule(**changes: Any) -> Recipe:
    found = {"roles": ("block",), **changes}
    stages: list[dict[str, Any]] = [{"stage": "prune"}] if "sparsity" in changes else []
    stages += [{"stage": "calibrate", "batches": 1}] if "weight" in changes else []
    body = {"name": "test", "description": "-", "source": "-", "rules": [found], "stages": stages}
    return Recipe.parse(body).model_copy(update={"storage": EXACT})


KINDS = {
    "5:8 int3": rule(sparsity="5:8", weight={"bits": 3}, input={"bits": 3}),
    "1:32 int6": rule(sparsity="1:32", weight={"method": "absmax", "bits": 6}, input={"method": "minmax", "bits": 6}),
    "60% int8": rule(sparsity="60%", weight={"bits": 8}, input={"method": "pact", "bits": 8}),
    "60% int2": rule(sparsity="60%", weight={"bits": 2}),
    "60%": rule(sparsity="60%"),
    "int4": rule(weight={"method": "sawb", "bits": 4}, input={"method": "pact", "bits": 4}),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*(("bert", kind) for kind in KINDS), ("timm_vit", "60% int8"), ("gpt2", "1:32 int6")]
)
def test_every_width_and_pattern(name: str, kind: str, tmp_path: Path) -> None:
    """Expected: as above; integers of 2 to 8 bits with 2 to 8 bit inputs run on the int8 kernels too."""
    model, plan = saved(name, KINDS[kind], tmp_path / "c")
    expected = output(model, name)
    found = output(load(tmp_path / "c", backend="reference"), name)
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)
    if all(gemm.input for gemm in plan.gemms) and int8_supported()[0]:
        fast = output(load(tmp_path / "c", backend="int8"), name)
        allowed = max(INT8_TOLERANCE, 3 * load_manifest(tmp_path / "c").flip_sensitivity)
        assert (fast - expected).abs().max() <= allowed * expected.abs().max()
    found_forms = {form.form for form in forms(load_file(tmp_path / "c" / "weights.safetensors"), plan)}
    assert found_forms == {{"5:8 int3": "5:8", "1:32 int6": "1:32", "int4": "dense"}.get(kind, "bitmap")}


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_embeddings_as_integers(name: str, tmp_path: Path) -> None:
    """Expected: the table rounded to 8 bits per row, in the embedding and in a final projection that is tied to it; the
    bytes of the float table are gone; an untied table is looked up as int8."""
    recipe = rule(weight={"bits": 8}, input={"bits": 8}).model_copy(update={"embeddings": EmbeddingRule()})
    model, plan = saved(name, recipe, tmp_path / "c")
    assert plan.embeddings
    tensors = load_file(tmp_path / "c" / "weights.safetensors")
    reference = load(tmp_path / "c", backend="reference")
    for table in plan.embeddings:
        assert tensors[f"{table.name}.values"].dtype == torch.int8
        w_RD, found = model.get_submodule(table.name).weight, reference.get_submodule(table.name).weight
        step_R1 = w_RD.abs().amax(1, keepdim=True) / 127
        assert ((w_RD - found).abs() <= step_R1 * 0.5001).all()
    dense = [
        key for key, t in tensors.items() if t.numel() == model.get_submodule(plan.embeddings[0].name).weight.numel()
    ]
    assert dense == [f"{plan.embeddings[0].name}.values"]
    if name == "gpt2":
        assert reference.lm_head.weight is reference.transformer.wte.weight
    if int8_supported()[0]:
        fast = load(tmp_path / "c", backend="int8")
        kinds = {type(fast.get_submodule(table.name)) for table in plan.embeddings}
        assert Int8Embedding in kinds
        expected = output(reference, name)
        assert (output(fast, name) - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", ["gpt2", "bart"])
@pytest.mark.parametrize("untie", [False, True])
def test_tied_tensors_are_stored_once_and_untied_ones_kept(name: str, untie: bool, tmp_path: Path) -> None:
    """Expected: the trained model's output; a tied table once in the file, all of its names filled on load."""
    body = rule(sparsity="2:4").model_dump(mode="json")
    body["rules"][0]["roles"] = ["block", "final"] if untie else ["block"]
    recipe = Recipe.parse({**body, "untie_final_projection": untie})
    model, plan = saved(name, recipe, tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "weights.safetensors")
    tables = [key for key, t in tensors.items() if t.shape == (128, 32)]
    if untie:
        assert plan.untied == "lm_head"
        assert "lm_head.values" in tensors
    else:
        assert len(tables) == 1
    expected = output(model, name)
    found = output(load(tmp_path / "c", backend="reference"), name)
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


def test_attention_maps_come_back_and_dense_leaves_them_out(tmp_path: Path) -> None:
    """Expected: pattern, activity and scales of the trained model; the dense backend has no map and no rounding."""
    recipe = Recipe.load("deepcomp-sparse-int4").model_copy(update={"storage": EXACT})
    model, plan = saved("bert", recipe, tmp_path / "c")
    loaded = load(tmp_path / "c", backend="reference")
    name = f"{plan.attention[0].name}.attention_map"
    for side in "qkpv":
        ours, theirs = (getattr(m.get_submodule(name), side) for m in (loaded, model))
        assert ours.active
        assert ours.export() == theirs.export()
    dense = load(tmp_path / "c", backend="dense")
    assert not any("attention_map" in key for key, _ in dense.named_modules())
    assert not any(module._forward_pre_hooks for module in dense.modules() if module is not dense)  # a length limit


def test_maps_that_were_not_activated_are_not_saved(tmp_path: Path) -> None:
    """Expected: an error instead of a checkpoint that does not do what its plan says."""
    recipe = Recipe.load("gpusq-gemm-mha-int8")
    model, plan = compressed("bert", recipe)
    activate_attention_(model, False)
    with pytest.raises(PackError, match=r"attention\.self: the plan keeps 2:4 of its map, but that was not activated"):
        pack(model, plan, EXACT)
    activate_attention_(model)
    tensors = pack(model, plan, EXACT)
    name = f"{plan.attention[1].name}.attention_map."
    with pytest.raises(PackError, match=rf"the plan expects tensors {name}\*, the weight file has none"):
        unpack({key: t for key, t in tensors.items() if not key.startswith(name)}, plan, keep_int8=False)
    detach_attention_(model)
    with pytest.raises(PackError, match=r"attention\.self: its attention map is planned but not attached"):
        pack(model, plan, EXACT)


def test_what_has_no_integers_is_refused_when_it_is_packed() -> None:
    """Expected: an error that names the GEMM and what to write instead: full-range SAWB has no zero level."""
    model, plan = compressed("bert", rule(weight={"method": "sawb", "bits": 4, "levels": "full-range"}))
    with pytest.raises(PackError, match=r"attention\.self\.query: full-range SAWB .*`levels: zero-aligned`"):
        pack(model, plan, EXACT)


@pytest.mark.parametrize("folder", sorted(path.name for path in FORMAT_1.iterdir()))
def test_checkpoints_of_format_1_still_load(folder: str, tmp_path: Path) -> None:
    """Frozen folders that the first format's own code wrote: int8 2:4 with LSQ; int4 and int3 and float16, some blocks
    skipped. Expected: their own golden outputs, on every backend."""
    shutil.copytree(FORMAT_1 / folder, tmp_path / "c")
    assert json.loads((tmp_path / "c" / "squeezoo.json").read_text())["format_version"] == 1
    manifest = load_manifest(tmp_path / "c")
    assert manifest.format_version == FORMAT_VERSION == 2
    assert {gemm.weight["method"] for gemm in manifest.plan.gemms if gemm.weight} == {"lsq"}
    proof = verify(tmp_path / "c")
    assert proof.reference_error < 1e-5
    assert (proof.int8_error is not None) == int8_supported()[0]


def test_the_shipped_checkpoint_still_loads() -> None:
    """Expected: the digits model of the zoo proves itself (folders of format 1 lie frozen beside the tests). One input
    level that flips at its rounding border, which float16 storage can cause, moves the scores by some 1e-3."""
    proof = verify(ROOT / "zoo_cards" / "cards" / "digits-vit.digits.gpusq-gemm-int8")
    assert proof.reference_error < INT8_TOLERANCE


def test_upgrading_changes_a_copy() -> None:
    """Expected by hand: bits become LSQ records, the rest stays; the argument is not touched."""
    gemm = {"name": "g", "weight_bits": 4, "input_bits": None, "parts": 1}
    old = {"format_version": 1, "plan": {"adapter": "bert", "gemms": [gemm]}, "name": "n"}
    before = json.dumps(old)
    new = upgraded(old)
    assert new["plan"]["gemms"] == [{"name": "g", "parts": 1, "weight": {"method": "lsq", "bits": 4}, "input": None}]
    assert (new["format_version"], new["plan"]["adapter"], new["name"]) == (2, "bert", "n")
    assert json.dumps(old) == before
    assert upgraded(new) == new
