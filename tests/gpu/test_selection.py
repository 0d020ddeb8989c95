"""The selection of kernels, memory and errors on a real device."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cuda_models import DEVICE, moved, pruned_model, saved
from emulated import emulating
from squeezoo.bench_models import BenchModel, Squeezed, make_inputs, samples_of, squeeze
from squeezoo.compress.checkpoint import CheckpointError, load
from squeezoo.compress.recipe import Recipe
from squeezoo.compress.runtime.candidates import units_of
from squeezoo.compress.runtime.choice import MARGIN
from squeezoo.compress.runtime.cuda import use_cuda_
from squeezoo.compress.runtime.cuda_source import CudaOptions
from squeezoo.compress.runtime.cuda_support import CudaError, cuda_capability
from squeezoo.compress.runtime.select_table import explain_rows
from squeezoo.compress.runtime.selection import select_kernels_
from squeezoo.models.dense import logits
from torch import nn

pytestmark = pytest.mark.gpu

BERT = BenchModel(
    "bert", "transformers/bert", "classification", ((128, 0),),
    dict(hidden_size=768, num_hidden_layers=2, num_attention_heads=12, intermediate_size=3072, vocab_size=1000),
)  # fmt: skip
ROWS = (1, 17, 1024)


@pytest.fixture(scope="module")
def bert() -> tuple[nn.Module, Squeezed]:
    """Two blocks of BERT-base, dense and squeezed, on the CPU."""
    dense = BERT.dense()
    return dense, squeeze(BERT.dense(), samples_of(dense, BERT.sizes[0]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved("bert", Recipe.load("gpusq-gemm-int8"), tmp_path / "c")


@torch.inference_mode()
def test_kernels_are_measured_once_per_device(
    bert: tuple[nn.Module, Squeezed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured, written, and read again by the next load, which chooses the same without measuring. What is chosen at a
    measured number of rows is the fastest kernel, or the built-in rule's within the margin: never slower than the dense
    16-bit matrix. Any choice gives the result of its kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("squeezoo.compress.runtime.selection.steady", lambda samples: True)  # others may use the GPU
    _, squeezed = bert
    model = squeezed.build("cuda", DEVICE)
    first = select_kernels_(model, measure="auto", rows=ROWS, budget_s=600 if emulating() else 60)
    assert first.path is not None
    assert first.notes == ()
    table = json.loads(Path(first.path).read_text(encoding="utf-8"))
    assert table["device"]["name"] == torch.cuda.get_device_name(DEVICE)
    measured = [chosen for chosen in first.chosen if chosen.choice is not None]
    assert {chosen.source for chosen in measured} == {"measured"}
    assert {chosen.workload.kind for chosen in measured} == {"linear", "ffn"}
    for chosen in measured:
        assert chosen.choice is not None
        assert set(chosen.times) == set(ROWS)
        for rows, samples in chosen.times.items():
            assert {"sparse_int8", "dense_int8", "dense_half"} <= set(samples)
            fastest = min(sample.fastest for sample in samples.values())
            assert samples[chosen.choice(rows)].fastest <= fastest * (1 + MARGIN)
    assert len(explain_rows(first)) == len(first.chosen)

    other = squeezed.build("cuda", DEVICE)
    second = select_kernels_(other, measure="auto", rows=ROWS)
    assert {c.source for c in second.chosen if c.choice is not None} == {"table"}
    assert [(c.workload, c.choice) for c in second.chosen] == [(c.workload, c.choice) for c in first.chosen]
    for named in units_of(other):
        x = named.unit.example(17)
        assert torch.equal(named.unit.run(named.unit.choose(17), *x), named.unit.run(named.unit.choose(17), *x))
    for length in (1, 17, 128):
        inputs = moved(make_inputs(bert[0], 1, (length, 0)))
        assert torch.equal(logits(other, inputs), logits(other, inputs))


@torch.inference_mode()
def test_auto_agrees_with_the_reference(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``load`` does without a word about the backend. Tolerance: that of bfloat16 in test_models.py."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SQUEEZOO_SELECT", "auto")
    batch = tiny.tiny_batch("bert", n=8, seed=5)
    expected = logits(load(folder, backend="reference"), batch)
    found = logits(load(folder, device=DEVICE), moved(batch)).float().cpu()
    assert float((found - expected).abs().max() / expected.abs().max()) <= 0.03
    assert list((tmp_path / "squeezoo" / "kernels").glob("*.json"))


def allocated() -> int:
    """Bytes of tensors; without cuBLAS's workspace, which the first product makes and all models share."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@torch.inference_mode()
def test_a_packed_model_takes_less_memory_than_bfloat16(bert: tuple[nn.Module, Squeezed]) -> None:
    """2:4 int8 is 10 bits a weight in cuSPARSELt's form (0.63 bytes against 2), and most of this model's weights are
    that. Expected: under a half of the dense model, before and after calls."""
    dense, squeezed = bert
    before = allocated()
    half = copy.deepcopy(dense).to(DEVICE, torch.bfloat16)
    whole = allocated() - before
    del half
    before = allocated()
    ours = squeezed.build("cuda", DEVICE)
    loaded = allocated() - before
    for batch in (1, 8):
        logits(ours, moved(make_inputs(dense, batch, (128, 0))))
    called = allocated() - before
    print(f"bfloat16 {whole:,} bytes, squeezed {loaded:,} when loaded, {called:,} after calls")
    assert 0 < loaded <= whole / 2
    assert called <= whole / 2


# -- errors


def test_a_device_that_is_not_there(folder: Path) -> None:
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(CheckpointError, match=f"expected a device below {absent}, found {absent}"):
        load(folder, device=absent, backend="cuda")
    with pytest.raises(CudaError, match="expected a device below"):
        cuda_capability(absent)


def test_a_backend_of_the_cpu(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="the int8 backend runs on the CPU, not on cuda"):
        load(folder, device=DEVICE, backend="int8")
    with pytest.raises(CheckpointError, match="write device='cuda'"):
        load(folder, backend="cuda")


def test_a_model_that_is_on_the_gpu_already() -> None:
    model, sites, gemms, _ = pruned_model("bert")
    model.to(DEVICE)
    with pytest.raises(CudaError, match=r"is on cuda:0: call model\.cpu\(\) before use_cuda_"):
        use_cuda_(model, sites, gemms)


@torch.inference_mode()
def test_a_text_that_is_too_long_does_not_stop_the_process(folder: Path) -> None:
    """Else the lookup of its positions would be an assertion on the device, after which no CUDA call works."""
    model = load(folder, device=DEVICE, backend="cuda")
    ids = torch.ones(1, 65, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match=r"expected at most 64 tokens for this BertFor.*found 65"):
        model(input_ids=ids)
    assert model(input_ids=ids[:, :64]).logits.isfinite().all()


@torch.inference_mode()
def test_numbers_that_are_not_finite(folder: Path) -> None:
    """Refused where that was asked for; an infinite activation is a level's end otherwise, as in the reference."""
    model, sites, gemms, _ = pruned_model("timm_vit")
    use_cuda_(model, sites, gemms, options=CudaOptions(device=DEVICE, check_finite=True))
    batch: dict[str, Any] = moved(tiny.tiny_batch("timm_vit"))
    assert logits(model, batch).isfinite().all()
    batch["pixel_values"][0] = float("nan")
    with pytest.raises(ValueError, match="expected finite values, found"):
        logits(model, batch)


def test_inputs_that_are_no_activations(folder: Path) -> None:
    model = load(folder, device=DEVICE, backend="cuda")
    dense: Any = model.get_submodule("bert.encoder.layer.0.attention.output.dense")
    with pytest.raises(TypeError, match="expected a floating point input, found int64"):
        dense(torch.zeros(3, 32, dtype=torch.long, device=DEVICE))
    with pytest.raises(ValueError, match=r"expected an input of 32 features, found the shape \[3, 31\]"):
        dense(torch.zeros(3, 31, device=DEVICE))
