"""Folders for other libraries: what their own loaders read back, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from squeezoo.compress.attach import attach_, prune_
from squeezoo.compress.backends import CheckpointError
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.checkpoint import load, load_manifest, save_checkpoint
from squeezoo.compress.compressed_tensors import pack_to_int32, quantization_config
from squeezoo.compress.export import ExportError, export
from squeezoo.compress.matrix import read_matrix
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.models.dense import load_dense, logits
from tiny import ALL, tiny_batch
from torch import Tensor, nn

BASE = {"name": "tiny", "revision": None}


def recipe(roles: tuple[str, ...] = ("block",), bits: int | None = 8, inputs: int | None = 8, **rule: Any) -> Recipe:
    found: dict[str, Any] = {"roles": roles, "sparsity": "2:4", **rule}
    if bits:
        found["weight"] = {"bits": bits}
    if inputs:
        found["input"] = {"bits": inputs}
    stages = [{"stage": "prune"}, *([{"stage": "calibrate", "batches": 1}] if bits else [])]
    return Recipe.parse({"name": "test", "description": "-", "source": "-", "rules": [found], "stages": stages})


def saved(name: str, made: Recipe, folder: Path) -> Path:
    model = ALL[name]()
    plan = make_plan(model, made)
    attach_(model, plan)
    prune_(model)
    if any(gemm.weight for gemm in plan.gemms):
        calibrate_(model, [tiny_batch(name)])
    return save_checkpoint(model, plan, made, folder, name=f"tiny-{name}.none.test", base=BASE)


def matrices(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Integers and scales of every GEMM of a checkpoint."""
    tensors, found = load_file(folder / "weights.safetensors"), {}
    for gemm in load_manifest(folder).plan.gemms:
        q_OI, scale_O = read_matrix(gemm, tensors)
        assert scale_O is not None
        found[gemm.name] = (q_OI, scale_O)
    return found


@pytest.mark.parametrize("name", ["bert", "vit", "timm_vit", "gpt2"])
def test_dense_gives_the_checkpoint_without_rounded_inputs(name: str, tmp_path: Path) -> None:
    """Expected: the output of the backend `dense`, from the library's own loader; the zeros are 2:4."""
    folder = saved(name, recipe(), tmp_path / "c")
    found = export(folder, "dense", tmp_path / "d")
    assert found.notes == ("inputs of GEMMs are not rounded",)
    model = load_dense(str(tmp_path / "d"), kind="auto").model
    with torch.inference_mode():
        outputs = [logits(m, tiny_batch(name)) for m in (model, load(folder, backend="dense"))]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)
    assert not (tmp_path / "d" / "squeezoo.json").exists()


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_int_quantized_holds_the_integers_under_the_names_of_checkpoints(name: str, tmp_path: Path) -> None:
    """Expected: every tensor of the dense export, in which each quantized weight is int8 with a scale [O, 1] and an
    input scale [1] beside it; q * scale is the dense weight. For ViT the names are those of its old checkpoints."""
    folder = saved(name, recipe(), tmp_path / "c")
    export(folder, "dense", tmp_path / "d")
    (note,) = export(folder, "compressed-tensors", tmp_path / "ct").notes
    assert note.startswith("inputs are cut off at level -128")
    dense, found = load_file(tmp_path / "d/model.safetensors"), load_file(tmp_path / "ct/model.safetensors")
    if name == "vit":
        assert "vit.encoder.layer.0.attention.attention.query.weight" in found
    quantized = {key.removesuffix("_scale") for key in found if key.endswith(".weight_scale")}
    assert len(quantized) == 12
    extra = {f"{key}_scale" for key in quantized} | {f"{key[:-6]}input_scale" for key in quantized}
    assert found.keys() == dense.keys() | extra
    for key, weight in dense.items():
        if key in quantized:
            assert found[key].dtype == torch.int8
            assert found[f"{key[:-6]}input_scale"].shape == (1,)
            torch.testing.assert_close(found[key].float() * found[f"{key}_scale"], weight, rtol=1e-6, atol=0)
        else:
            torch.testing.assert_close(found[key].float(), weight, rtol=0, atol=0)


def test_the_configuration_says_what_readers_need(tmp_path: Path) -> None:
    """Expected: the facts of the format: status compressed, no sparsity_config, every other linear ignored; the
    sparsity stands under our own key."""
    folder = saved("bert", recipe(), tmp_path / "c")
    export(folder, "compressed-tensors", tmp_path / "ct")
    config = json.loads((tmp_path / "ct/config.json").read_text())
    found = config["quantization_config"]
    symmetric = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    assert found == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["bert.pooler.dense", "classifier"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**symmetric, "strategy": "channel"},
                "input_activations": {**symmetric, "strategy": "tensor"},
                "output_activations": None,
                "format": "int-quantized",
            }
        },
        "kv_cache_scheme": None,
        "version": "0.20.0",
    }
    assert "sparsity_config" not in json.dumps(config)
    assert config["dtype"] == "float32"
    assert config["squeezoo"]["sparsity"]["bert.encoder.layer.0.output.dense"] == "2:4"


def test_pack_quantized_holds_four_bits_in_int32(tmp_path: Path) -> None:
    """Expected: eight values in each int32, low nibble first, plus 8; inputs are left float and that is said."""
    folder = saved("bert", recipe(bits=4, inputs=4), tmp_path / "c")
    notes = export(folder, "compressed-tensors", tmp_path / "ct").notes
    assert notes == ("inputs of 12 GEMMs are not rounded: no reader has kernels for their widths",)
    found = load_file(tmp_path / "ct/model.safetensors")
    group = json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert (group["format"], group["input_activations"], group["weights"]["num_bits"]) == ("pack-quantized", None, 4)
    for name, (q_OI, scale_O) in matrices(folder).items():
        packed = found[f"{name}.weight_packed"]
        assert packed.dtype == torch.int32
        assert packed.shape == (q_OI.shape[0], q_OI.shape[1] // 8)
        values = torch.stack([(packed.long() >> 4 * k & 15) - 8 for k in range(8)], dim=-1).flatten(1)
        assert torch.equal(values, q_OI.long())
        assert torch.equal(found[f"{name}.weight_scale"], scale_O[:, None])
        assert found[f"{name}.weight_shape"].tolist() == list(q_OI.shape)
        assert f"{name}.weight" not in found


@pytest.mark.parametrize("bits", range(2, 9))
def test_int32_words_are_one_stream_of_bits(bits: int) -> None:
    """Expected: each row as one big integer, sum of (q + 2^(bits-1)) << i * bits, cut into words, low word first."""
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    q_OI = torch.randint(-half, half, (3, 37), generator=generator).to(torch.int8)
    for row, packed in zip(q_OI.tolist(), pack_to_int32(q_OI, bits).tolist()):
        stream = sum((q + half) << i * bits for i, q in enumerate(row))
        words = [(stream >> 32 * k & 0xFFFFFFFF) for k in range(-(-37 * bits // 32))]
        assert [word & 0xFFFFFFFF for word in packed] == words


def test_different_schemes_become_groups_with_their_modules_named() -> None:
    """Expected by hand: one group per distinct scheme; several groups cannot all target "Linear"."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})
    model.config = None  # type: ignore[assignment]
    eight = {"targets": None, "weights": {"num_bits": 8}, "format": "int-quantized"}
    four = {"targets": None, "weights": {"num_bits": 4}, "format": "pack-quantized"}
    found = quantization_config(model, {"a": eight, "b": four, "c": dict(eight)})
    assert found["format"] == "mixed-precision"
    assert found["ignore"] == []
    assert [group["targets"] for group in found["config_groups"].values()] == [["a", "c"], ["b"]]


@pytest.mark.parametrize(
    ("name", "made", "message"),
    [
        ("timm_vit", recipe(), "a format of transformers, this is a timm model: export with --to dense"),
        ("gpt2", recipe(), r"transformer\.h\.0\.attn\.c_attn is a Conv1D; compressed-tensors holds nn.Linear only"),
        ("bert", recipe(bits=None, inputs=None), "recipe test quantizes no weight"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(
    name: str, made: Recipe, message: str, tmp_path: Path
) -> None:
    folder = saved(name, made, tmp_path / "c")
    with pytest.raises(ExportError, match=message):
        export(folder, "compressed-tensors", tmp_path / "ct")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_unknown_forms_and_other_folders_are_refused(tmp_path: Path) -> None:
    folder = saved("bert", recipe(), tmp_path / "c")
    with pytest.raises(ExportError, match="unknown form 'gguf'; allowed: dense, compressed-tensors, onnx"):
        export(folder, "gguf", tmp_path / "o")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        export(tmp_path / "none", "dense", tmp_path / "o")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ExportError, match="is no model folder"):
        export(folder, "compressed-tensors", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors not installed")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_transformers_reads_it_with_the_compressed_tensors_library(name: str, bits: int, tmp_path: Path) -> None:
    """Expected: nothing missing or left over, and the weights of the dense export."""
    import transformers as hf

    folder = saved(name, recipe(bits=bits, inputs=bits), tmp_path / "c")
    export(folder, "dense", tmp_path / "d")
    export(folder, "compressed-tensors", tmp_path / "ct")
    auto = hf.AutoModelForImageClassification if name == "vit" else hf.AutoModelForSequenceClassification
    config = hf.CompressedTensorsConfig(dequantize=True)
    model, info = auto.from_pretrained(tmp_path / "ct", quantization_config=config, output_loading_info=True)
    assert not info["missing_keys"]
    # Dequantized at load, the library has no use for the input scales; loaded as it is, nothing is left over (below).
    assert all(key.endswith(".input_scale") for key in info["unexpected_keys"])
    expected = auto.from_pretrained(tmp_path / "d").state_dict()
    state = model.state_dict()
    for key, weight in expected.items():
        torch.testing.assert_close(state[key].float(), weight, rtol=1e-6, atol=0)
    rounded, info = auto.from_pretrained(tmp_path / "ct", output_loading_info=True)
    assert not any(info.values())
    rounded.eval()
    batch = tiny_batch(name)
    with torch.inference_mode():
        found = logits(rounded, batch)
        reference = logits(load(folder, backend="reference" if bits == 8 else "dense"), batch)
    assert (found - reference).abs().max() <= 0.05 * reference.abs().max()
