"""What a real checkpoint weighs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from squeezoo.compress.attach import attach_, fold_, prune_
from squeezoo.compress.calibrate import calibrate_
from squeezoo.compress.checkpoint import save_checkpoint
from squeezoo.compress.engine import compress
from squeezoo.compress.finetune import TrainData
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.models.dense import Dense, save_dense
from squeezoo.zoo_cards.card import Breakdown, Size, StorageForm
from squeezoo.zoo_cards.sizes import measure_size, measure_storage
from tiny import TINY, tiny_batch

# Tiny ViT: 2 blocks of [96, 32] + [32, 32] + [64, 32] + [32, 64] = 8,192 weights, and a head of [3, 32] = 96.
BLOCKS, HEAD = 2 * 8192, 96


def one_shot(*roles: str, quantized: bool = False) -> Recipe:
    rule = {"roles": roles, "sparsity": "2:4"} | ({"weight": {"bits": 8}, "input": {"bits": 8}} if quantized else {})
    stages = [{"stage": "prune"}, *([{"stage": "calibrate", "batches": 1}] if quantized else [])]
    return Recipe.parse({"name": "test", "description": "-", "source": "-", "rules": [rule], "stages": stages})


def squeeze(name: str, recipe: Recipe, folder: Path, processor: object = None) -> tuple[Path, Path]:
    """(checkpoint, dense folder) of a tiny model."""
    model = TINY[name]()
    batch = tiny_batch(name, 4)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    data = TrainData(rows, lambda rows: {key: torch.stack([row[key] for row in rows]) for key in rows[0]})
    dense = Dense(model, processor, name, None, "timm" if name == "timm_vit" else "transformers")
    save_dense(model, processor, folder / "dense")
    compress(dense, recipe, data, folder / "small")
    return folder / "small", folder / "dense"


def test_int8_2_4_weighs_what_the_paper_says(tmp_path: Path) -> None:
    """Source: 20 bits per group of four (GPUSQ-TLM, section 3): 0.3125 of FP16; counts of the tiny ViT by hand."""
    small, dense = squeeze("timm_vit", one_shot("block", "final", quantized=True), tmp_path)
    size = measure_size(small, dense)
    assert size.paper_dense_fp16_bytes == 2 * (BLOCKS + HEAD)
    assert size.paper_bytes == (BLOCKS + HEAD) * 5 // 8 == 0.3125 * size.paper_dense_fp16_bytes
    scales = 4 * (2 * (96 + 32 + 64 + 32) + 3) + 4 * 9  # one per output channel, one per input
    assert replace(size.breakdown, other=0) == Breakdown((BLOCKS + HEAD) // 2, (BLOCKS + HEAD) // 8, scales, 0)
    assert size.true_bytes == sum(path.stat().st_size for path in small.rglob("*") if path.is_file())
    assert size.true_dense_bytes == sum(path.stat().st_size for path in dense.rglob("*") if path.is_file())
    assert size.true_dense_dtype == "float32"
    assert size.parameters == sum(parameter.numel() for parameter in TINY["timm_vit"]().parameters())
    assert size.parameters - size.nonzeros >= (BLOCKS + HEAD) // 2


def test_gemms_that_the_plan_leaves_alone_count_in_fp16(tmp_path: Path) -> None:
    """Source: FP16 2:4 is 36 bits per group, 0.5625 of FP16; the unpruned head counts in full on both sides. The card
    written beside the checkpoint does not count."""
    small, dense = squeeze("timm_vit", one_shot("block"), tmp_path)
    before = measure_size(small, dense)
    (small / "README.md").write_text("a card")
    size = measure_size(small, dense)
    assert size == before
    assert size.paper_bytes == BLOCKS * 9 // 8 + 2 * HEAD
    assert (size.breakdown.values, size.breakdown.indices, size.breakdown.scales) == (BLOCKS, BLOCKS // 8, 0)


FORMATS: dict[str, tuple[dict[str, Any], int, tuple[int, int]]] = {
    # rule, paper bytes of the blocks, (bytes of values, bytes of indices) in the file
    "int4 2:4": ({"sparsity": "2:4", "weight": {"bits": 4}}, BLOCKS * 3 // 8, (BLOCKS // 4, BLOCKS // 8)),
    "int8 1:4": ({"sparsity": "1:4", "weight": {"bits": 8}}, BLOCKS * 10 // 32, (BLOCKS // 4, BLOCKS // 16)),
    "int8 2:16": ({"sparsity": "2:16", "weight": {"bits": 8}}, BLOCKS * 24 // 128, (BLOCKS // 8, BLOCKS // 16)),
    "int3": ({"weight": {"bits": 3}}, BLOCKS * 3 // 8, (BLOCKS * 3 // 8, 0)),
    "int4": ({"weight": {"method": "sawb", "bits": 4}}, BLOCKS // 2, (BLOCKS // 2, 0)),
    "75%": ({"sparsity": "75%"}, BLOCKS * 2, (BLOCKS // 2, BLOCKS // 8)),
    "75% int8": ({"sparsity": "75%", "weight": {"bits": 8}}, BLOCKS, (-1, BLOCKS // 8)),
    "5% int8": ({"sparsity": "5%", "weight": {"bits": 8}}, BLOCKS, (BLOCKS, 0)),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_weighs_what_its_formula_and_its_file_say(kind: str, tmp_path: Path) -> None:
    """Source: ALGORITHMS F, bits per weight N (b + i) / M, by hand for the tiny ViT; the papers save nothing by
    unstructured zeros. Counts of zeros from the folded model itself."""
    changes, paper, (values, indices) = FORMATS[kind]
    stages = [{"stage": "prune"}] if "sparsity" in changes else []
    stages += [{"stage": "calibrate", "batches": 1}] if "weight" in changes else []
    body = {"name": "test", "description": "-", "source": "-", "rules": [{"roles": ["block"], **changes}]}
    recipe = Recipe.parse({**body, "stages": stages, "storage": {"values": "float16", "other": "float32"}})
    model = TINY["timm_vit"]()
    save_dense(model, None, tmp_path / "dense")
    plan = make_plan(model, recipe)
    attach_(model, plan)
    prune_(model)
    if "weight" in changes:
        calibrate_(model, [tiny_batch("timm_vit")])
    save_checkpoint(model, plan, recipe, tmp_path / "c", name="n", base={"name": "tiny", "revision": None})
    fold_(model)
    size = measure_size(tmp_path / "c", tmp_path / "dense")
    assert size.paper_bytes == paper + 2 * HEAD
    halves = {f"{gemm.name}.weight" for gemm in plan.gemms if gemm.weight is None}
    stored = {name: p.half() if name in halves else p for name, p in model.named_parameters()}
    assert size.nonzeros == sum(int(p.count_nonzero()) for p in stored.values())
    assert size.parameters == sum(p.numel() for p in model.parameters())
    kept = sum(int(model.get_submodule(gemm.name).weight.count_nonzero()) for gemm in plan.gemms)
    assert size.breakdown.values == (kept if values < 0 else values)
    assert size.breakdown.indices == indices
    assert size.true_bytes == sum(path.stat().st_size for path in (tmp_path / "c").rglob("*") if path.is_file())
    header = 8 + int.from_bytes((tmp_path / "c" / "weights.safetensors").read_bytes()[:8], "little")
    tensors = load_file(tmp_path / "c" / "weights.safetensors").values()
    weights = (tmp_path / "c" / "weights.safetensors").stat().st_size
    assert weights == header + sum(t.numel() * t.element_size() for t in tensors)
    check_storage(kind, measure_storage(tmp_path / "c"), size)
    if kind == "int4":
        assert size.breakdown.scales == 2 * 4 * (3 + 1 + 1 + 1)  # Q, K, V and three others a block
    elif "weight" in changes:
        assert size.breakdown.scales == 2 * 4 * (96 + 32 + 64 + 32)


SHOWN = {  # form and number that a reader sees; note
    "int4 2:4": ("2:4", "int4", ""), "int8 1:4": ("1:4", "int8", ""), "int8 2:16": ("2:16", "int8", ""),
    "int3": ("dense", "int3", ""), "int4": ("dense", "int4", ""), "75%": ("bitmap", "float16", ""),
    "75% int8": ("bitmap", "int8", ""),
    "5% int8": ("dense", "int8", "5% zeros, stored like other values: a bitmap would not be smaller"),
}  # fmt: skip


def check_storage(kind: str, storage: tuple[StorageForm, ...], size: Size) -> None:
    """Source: the format's name, the 8 matrices of the blocks, and the breakdown of the same file."""
    (form,) = storage
    assert (form.form, form.number, form.note) == SHOWN[kind]
    assert (form.count, form.weights) == (8, BLOCKS)
    assert form.bytes == size.breakdown.values + size.breakdown.indices
    assert form.scale_bytes == size.breakdown.scales  # inputs are not quantized in these
    assert form.bits == pytest.approx(8 * form.bytes / BLOCKS)
    if kind in ("int4 2:4", "int8 1:4", "int8 2:16", "int3", "int4"):
        bits = {"int4 2:4": 3, "int8 1:4": 2.5, "int8 2:16": 1.5, "int3": 3, "int4": 4}  # ALGORITHMS F: N (b + i) / M
        assert form.bits == bits[kind]


def test_no_dense_weights_is_an_error(tmp_path: Path) -> None:
    """Source: the contract."""
    small, _ = squeeze("timm_vit", one_shot("block"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"expected the dense model's \*.safetensors"):
        measure_size(small, tmp_path / "empty")
