"""ONNX folders: what ONNX Runtime computes from them, which kernels it takes, and what is refused."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from squeezoo.compress.attach import attach_, prune_
from squeezoo.compress.attention_map import activate_attention_
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.checkpoint import load, save_checkpoint
from squeezoo.compress.export import Exported, ExportError, export
from squeezoo.compress.onnx_export import _other_shape
from squeezoo.compress.onnx_trace import axis_names, mark_, with_token_types
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.verify import INT8_TOLERANCE
from squeezoo.models.dense import load_dense, logits
from tiny import ALL, LABELS, tiny_batch
from torch import Tensor, nn
from writing import character_tokenizer

BASE = {"name": "tiny", "revision": None}
GPUSQ = Recipe.load("gpusq-gemm-int8")
INTEGER_KERNELS = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger")


def saved(name: str, recipe: Recipe, folder: Path, processor: Any = None) -> Path:
    """A tiny model with masks, calibrated quantizers and active attention maps, but without training."""
    model = ALL[name]()
    plan = make_plan(model, recipe)
    attach_(model, plan)
    prune_(model)
    if any(gemm.weight or gemm.input for gemm in plan.gemms) or any(site.q for site in plan.attention):
        calibrate_(model, [tiny_batch(name)])
    activate_attention_(model)
    return save_checkpoint(model, plan, recipe, folder, name=f"tiny-{name}", base=BASE, processor=processor)


def exported(name: str, recipe: Recipe, folder: Path, **options: Any) -> Exported:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    return export(saved(name, recipe, folder / "c", **options), "onnx", folder / "o")


def session(folder: Path, optimized: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def run(folder: Path, batch: dict[str, Tensor]) -> list[Tensor]:
    opened = session(folder)
    given = {i.name: batch[i.name].numpy() for i in opened.get_inputs()}
    return [torch.from_numpy(found) for found in opened.run(None, given)]


def kernels(folder: Path) -> Counter[str]:
    """Operators of the graph as ONNX Runtime executes it."""
    import onnx

    session(folder, folder.parent / "optimized.onnx")
    return Counter(node.op_type for node in onnx.load(folder.parent / "optimized.onnx").graph.node)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "name",
    [
        "bert", "bert_qa", "roberta", "roberta_token", "distilbert", "distilbert_qa", "vit",
        "timm_vit", "dinov2", "gpt2", "llama", "bart", "bart_classification", "wav2vec2_stable",
    ],
)  # fmt: skip
def test_onnx_runtime_gives_the_reference_with_integer_kernels(name: str, tmp_path: Path) -> None:
    """Expected: the scores of the backend `reference`, on batches of another size and length than the traced one, and
    one integer kernel for every GEMM of the plan."""
    found = exported(name, GPUSQ, tmp_path)
    assert "outputs differ from the reference by" in found.notes[-1]
    reference = load(tmp_path / "c", backend="reference")
    for rows in (1, 5):
        batch = with_token_types(reference, None, tiny_batch(name, n=rows, seed=rows))
        if name == "bart":
            batch["decoder_input_ids"] = batch["input_ids"][:, :7]
            del batch["labels"]
        if name == "wav2vec2_stable":
            batch["attention_mask"] = torch.ones(batch["input_values"].shape, dtype=torch.long)
        with torch.inference_mode():
            expected = logits(reference, batch)
        outputs = run(tmp_path / "o", batch)
        scores = outputs[0] if len(outputs) == 1 else torch.stack(outputs, dim=-1)
        assert distance(scores, expected) <= INT8_TOLERANCE
    count = kernels(tmp_path / "o")
    assert sum(count[kind] for kind in INTEGER_KERNELS) == len(make_plan(ALL[name](), GPUSQ).gemms)
    assert not count["DequantizeLinear"]


def test_inputs_outputs_and_files_are_those_of_the_model(tmp_path: Path) -> None:
    """Expected: the names of the model's forward, free batch and length, the config and tokenizer of the dense export,
    and the checkpoint's name in the file."""
    exported("bert_qa", GPUSQ, tmp_path, processor=character_tokenizer(False))
    found = session(tmp_path / "o")
    # This tokenizer gives no token types, so the model is traced without.
    assert {i.name: i.shape for i in found.get_inputs()} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
    }
    assert {o.name: o.shape for o in found.get_outputs()} == {
        "start_logits": ["batch", "sequence"],
        "end_logits": ["batch", "sequence"],
    }
    assert found.get_modelmeta().custom_metadata_map == {
        "squeezoo.name": "tiny-bert_qa",
        "squeezoo.recipe": "gpusq-gemm-int8",
        "squeezoo.sparsity": "2:4",
    }
    export(tmp_path / "c", "dense", tmp_path / "d")
    files = {path.name for path in (tmp_path / "d").iterdir()} - {"model.safetensors"}
    assert {path.name for path in (tmp_path / "o").iterdir()} == files | {"model.onnx"}
    dense = load_dense(str(tmp_path / "d"), kind="auto").model
    assert with_token_types(dense, None, tiny_batch("bert_qa")).keys() >= {"token_type_ids"}


def test_the_file_holds_the_checkpoints_integers(tmp_path: Path) -> None:
    """Expected: int8 [in, out] with a scale per channel, whose product is the dense weight, 2:4 along the inputs."""
    exported("bert", GPUSQ, tmp_path)
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(tmp_path / "o/model.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    dense = load(tmp_path / "c", backend="dense")
    gemms = make_plan(ALL["bert"](), GPUSQ).gemms
    for gemm in gemms:
        q_IO = tensors[f"{gemm.name}.weight_quantized"]
        assert q_IO.dtype == np.int8
        weight_OI = dense.get_submodule(gemm.name).weight
        assert isinstance(weight_OI, Tensor)
        found_OI = torch.from_numpy((q_IO * tensors[f"{gemm.name}.weight_scale"]).T.copy())
        torch.testing.assert_close(found_OI, weight_OI.detach(), rtol=1e-6, atol=0)
        assert int((q_IO.T.reshape(gemm.shape[0], -1, 4) != 0).sum(-1).max()) <= 2
    # Q, K and V of a block read one tensor, which is rounded once.
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == len({gemm.input_owner for gemm in gemms})


@pytest.mark.parametrize("name", ["bert", "timm_vit"])
def test_four_bits_lie_as_int4_and_run_as_int8(name: str, tmp_path: Path) -> None:
    """Expected: the reference with 4-bit weights and inputs; half a byte per weight in the file (ONNX 1.17, INT4);
    the N:M attention of the recipe is left out and that is said."""
    found = exported(name, Recipe.load("deepcomp-sparse-int4"), tmp_path)
    assert "attention maps are dense and not quantized: no other library knows N:M maps" in found.notes
    assert "weights of 2 to 4 bits lie in the file as int4, which onnxruntime reads from 1.23 on" in found.notes
    import onnx

    model = onnx.load(tmp_path / "o/model.onnx")
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 21}
    packed = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    gemms = [g for g in make_plan(ALL[name](), Recipe.load("deepcomp-sparse-int4")).gemms if g.weight_bits == 4]
    assert gemms
    assert {t.name: len(t.raw_data) for t in packed} == {
        f"{g.name}.weight_int4": -(-g.shape[0] * g.shape[1] // 2) for g in gemms
    }
    assert sum(kernels(tmp_path / "o")[kind] for kind in INTEGER_KERNELS) >= len(gemms)


@pytest.mark.parametrize(
    ("recipe", "kernel"),
    [("dq", "DynamicQuantizeMatMul"), ("q8bert", "MatMulIntegerToFloat"), ("asp-2-4", None)],
)
def test_dynamic_inputs_int8_tables_and_float_weights(recipe: str, kernel: str | None, tmp_path: Path) -> None:
    """Expected: the reference; dynamic ranges by ONNX's own operator, tables of q8bert as int8 (Gather of integers),
    nothing rounded without quantizers."""
    found = exported("bert", Recipe.load(recipe), tmp_path)
    assert ("the recipe quantizes no weight: all weights are float, zeros included" in found.notes) == (
        recipe == "asp-2-4"
    )
    reference = load(tmp_path / "c", backend="reference")
    batch = with_token_types(reference, None, tiny_batch("bert", n=3))
    with torch.inference_mode():
        expected = logits(reference, batch)
    assert distance(run(tmp_path / "o", batch)[0], expected) <= INT8_TOLERANCE
    count = kernels(tmp_path / "o")
    integers = sum(count[kind] for kind in INTEGER_KERNELS)
    quantized = [gemm for gemm in make_plan(ALL["bert"](), Recipe.load(recipe)).gemms if gemm.weight]
    assert integers == len(quantized)
    assert bool(quantized) == (kernel is not None)
    assert kernel is None or count[kernel]
    import onnx

    graph = onnx.load(tmp_path / "o/model.onnx").graph
    tables = [t for t in graph.initializer if list(t.dims) == [128, 32] and "embeddings" in t.name]
    assert [t.data_type for t in tables] == [onnx.TensorProto.INT8 if recipe == "q8bert" else onnx.TensorProto.FLOAT]


def test_symmetric_dynamic_inputs_and_float_inputs(tmp_path: Path) -> None:
    """Expected: the reference. The range of the first is max|x| / 127 of each call, all zeros included."""
    weight = {"method": "q8bert", "bits": 8}
    for made in ({"method": "q8bert", "bits": 8, "dynamic": True}, None):
        rule = {"roles": ["block"], "weight": weight, **({"input": made} if made else {})}
        stages = [{"stage": "calibrate", "batches": 1}]
        recipe = Recipe.parse(
            {"name": "test", "description": "-", "source": "-", "rules": [rule], "stages": stages}, where="test"
        )
        folder = tmp_path / ("dynamic" if made else "float")
        exported("vit", recipe, folder)
        reference, batch = load(folder / "c", backend="reference"), tiny_batch("vit", n=3)
        for pixels in (batch["pixel_values"], torch.zeros(1, 1, 8, 8)):
            with torch.inference_mode():
                expected = logits(reference, {"pixel_values": pixels})
            assert distance(run(folder / "o", {"pixel_values": pixels})[0], expected) <= INT8_TOLERANCE


def test_levels_end_where_the_checkpoints_do(tmp_path: Path) -> None:
    """Expected by hand: -127..127 steps of the scale, so an input far below the range is cut off at -127, not -128."""
    exported("timm_vit", GPUSQ, tmp_path)
    reference = load(tmp_path / "c", backend="reference")
    for factor in (-50.0, 50.0):
        pixels = factor * tiny_batch("timm_vit", n=2)["pixel_values"].abs()
        with torch.inference_mode():
            expected = logits(reference, {"pixel_values": pixels})
        assert distance(run(tmp_path / "o", {"pixel_values": pixels})[0], expected) <= INT8_TOLERANCE
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(tmp_path / "o/model.onnx").graph
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    clips = [node for node in graph.node if node.op_type == "Clip"]
    assert clips
    for node in clips:
        scale = values[node.input[1].replace("input_quantized_lowest", "input_scale")]
        np.testing.assert_allclose(values[node.input[1]], -127 * scale, rtol=1e-6)


def test_large_float_tensors_are_halved_only_where_that_is_exact() -> None:
    """Expected: 65,536 values of float16 become float16 with a Cast, others stay; ONNX's evaluator reads the same."""
    pytest.importorskip("onnx")
    from onnx import TensorProto, checker, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator
    from squeezoo.compress.onnx_graph import halve_floats_

    exact = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float16).astype(np.float32)
    tensors = {"exact": exact, "other": exact + np.float32(1e-7), "large": exact * np.float32(1e6), "few": exact[:2]}
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in tensors]
    outputs = [helper.make_tensor_value_info(f"{n}_out", TensorProto.FLOAT, list(t.shape)) for n, t in tensors.items()]
    made = [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], outputs, made), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    halve_floats_(model.graph)
    checker.check_model(model, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    float_, half = TensorProto.FLOAT, TensorProto.FLOAT16
    assert kinds == {"exact.float16": half, "other": float_, "large": float_, "few": float_}
    for found, expected in zip(ReferenceEvaluator(model).run(None, {}), tensors.values()):
        np.testing.assert_array_equal(found, expected)


def test_a_gemm_that_is_not_called_as_a_module_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expected: its name, nothing left behind, and the older export untouched."""
    pytest.importorskip("onnx")
    from timm.layers import Mlp

    folder = saved("timm_vit", GPUSQ, tmp_path / "c")
    export(folder, "onnx", tmp_path / "o")
    before = (tmp_path / "o/model.onnx").read_bytes()

    def reads_the_weight(self: Any, x: Tensor) -> Tensor:
        hidden = self.act(nn.functional.linear(x, self.fc1.weight, self.fc1.bias))
        return self.fc2(hidden)

    monkeypatch.setattr(Mlp, "forward", reads_the_weight)
    with pytest.raises(ExportError, match=r"blocks\.0\.mlp\.fc1 stands 0 times in the traced model, expected once"):
        export(folder, "onnx", tmp_path / "o")
    assert (tmp_path / "o/model.onnx").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "o"]


def test_a_model_that_cannot_be_traced_or_that_fixed_a_length_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    from timm.layers import Mlp

    folder = saved("timm_vit", GPUSQ, tmp_path / "c")
    forward = Mlp.forward

    def cannot_be_traced(self: Any, x: Tensor) -> Tensor:
        # An operator that ONNX does not have.
        return forward(self, torch.special.bessel_j0(x))

    monkeypatch.setattr(Mlp, "forward", cannot_be_traced)
    with pytest.raises(ExportError, match=r"VisionTransformer cannot be traced into ONNX .*bessel.*--to dense"):
        export(folder, "onnx", tmp_path / "o")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    pytest.importorskip("onnxruntime")

    def fixes_the_batch(self: Any, x: Tensor) -> Tensor:
        return forward(self, x * torch.full((int(x.shape[0]), 1, 1), 1.0 / int(x.shape[0])))

    monkeypatch.setattr(Mlp, "forward", fixes_the_batch)
    with pytest.raises(ExportError, match="nothing was kept"):
        export(folder, "onnx", tmp_path / "o")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_what_is_missing_or_in_the_way_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs neither onnx nor onnxruntime."""
    folder = saved("bert", GPUSQ, tmp_path / "c")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find_spec(name))
    with pytest.raises(ExportError, match=r"needs the package onnx, which is not installed: pip install 'squeezoo\["):
        export(folder, "onnx", tmp_path / "o")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: find_spec("json"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ExportError, match="is no model folder"):
        export(folder, "onnx", tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent != folder) == ["c", "mine", "thesis.txt"]


def test_without_onnxruntime_the_file_is_written_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    folder = saved("vit", GPUSQ, tmp_path / "c")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find_spec(name, *rest)
    )
    assert export(folder, "onnx", tmp_path / "o").notes == (
        "not run: onnxruntime is not installed (pip install 'squeezoo[onnx]')",
    )
    assert (tmp_path / "o/model.onnx").is_file()


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
def test_placeholders_keep_shapes_and_types(name: str) -> None:
    """Expected: scores of the same shape with every GEMM marked; needs no onnx."""
    model, plan = ALL[name](), make_plan(ALL[name](), GPUSQ)
    batch = tiny_batch(name, n=2)
    with torch.inference_mode():
        expected = logits(model, batch)
        mark_(model, {gemm.name: gemm.shape for gemm in plan.gemms}, ())
        found = logits(model, batch)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert {type(model.get_submodule(gemm.name)).__name__ for gemm in plan.gemms} == {"_Placeholder"}


def test_the_second_shape_and_the_names_of_axes() -> None:
    """Expected by hand; needs no onnx."""
    batch = {"input_ids": torch.ones(2, 16, dtype=torch.long), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    model = ALL["bert"]()
    found = _other_shape(batch, model)
    assert {name: tensor.shape for name, tensor in found.items()} == dict.fromkeys(batch, torch.Size([6, 20]))
    assert not found["attention_mask"][:, 16:].any()
    one = {name: tensor[:1] for name, tensor in batch.items()}
    assert _other_shape(one, model)["input_ids"].shape == (1, 20)
    model.config.max_position_embeddings = 20  # type: ignore[union-attr, assignment]
    assert _other_shape(batch, model)["input_ids"].shape == (6, 16)
    assert _other_shape({"pixel_values": torch.ones(1, 1, 8, 8)}, model)["pixel_values"].shape == (3, 1, 8, 8)
    tokens = {0: "batch", 1: "sequence"}
    assert axis_names("input_ids", batch["input_ids"], batch) == tokens
    assert axis_names("logits", torch.ones(2, LABELS), batch) == {0: "batch"}
    assert axis_names("logits", torch.ones(2, 16, LABELS), batch) == tokens
    written = {**batch, "decoder_input_ids": torch.ones(2, 8)}
    assert axis_names("logits", torch.ones(2, 8, 128), written) == {0: "batch", 1: "decoder_sequence"}
    sound = {"input_values": torch.ones(2, 200)}
    assert axis_names("input_values", sound["input_values"], sound) == {0: "batch", 1: "samples"}
    assert axis_names("logits", torch.ones(2, 19, 20), sound) == {0: "batch", 1: "frames"}
