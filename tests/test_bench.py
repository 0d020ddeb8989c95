"""The benchmark commands, on tiny models: what is measured, kept and skipped."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from emulated import emulating
from squeezoo import bench_run
from squeezoo.bench_cpu import EAGER, OURS, CpuBench, dynamic
from squeezoo.bench_gpu import main as bench_gpu
from squeezoo.bench_models import MODELS, BenchModel, chosen, make_inputs, samples_of, squeeze
from squeezoo.bench_run import Job, parse_arguments, run, sizes_of, work_of
from squeezoo.compress.runtime import int8_supported
from squeezoo.eval.grid import Grid
from squeezoo.models.dense import logits
from torch import Tensor

_SIZES: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
_SPEECH: dict[str, Any] = dict(
    _SIZES, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
)  # fmt: skip
_BART: dict[str, Any] = dict(
    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=99,
)  # fmt: skip
_OPT: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64, word_embed_proj_dim=32, vocab_size=99
)
TINY = (
    BenchModel("bert", "transformers/bert", "classification", ((8, 0), (16, 0)), dict(_SIZES, vocab_size=99)),
    BenchModel("opt", "transformers/opt", "causal-lm", ((8, 0),), _OPT),
    BenchModel("bart", "transformers/bart", "seq2seq-lm", ((12, 5),), _BART),
    BenchModel("vit", "transformers/vit", "classification", ((5, 0),), dict(_SIZES, image_size=8, patch_size=4),
               "pixels"),
    BenchModel("wav", "transformers/wav2vec2", "ctc", ((400, 0),), _SPEECH, "samples"),
)  # fmt: skip
needs_int8 = pytest.mark.skipif(not int8_supported()[0], reason=int8_supported()[1])


def settings(tmp_path: Path, *more: str) -> argparse.Namespace:
    found = parse_arguments("bench_cpu", None, ["--results", str(tmp_path), "--batches", "1,2", "--no-peers", *more])
    found.seconds = 0.0
    return found


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize("model", TINY, ids=lambda model: model.name)
def test_every_kind_of_model_is_squeezed_and_runs_on_all_engines(model: BenchModel, tmp_path: Path) -> None:
    """All GEMMs of the blocks are int8; the reference of the same tensors agrees (random weights: two levels)."""
    dense = model.dense()
    squeezed = squeeze(model.dense(), samples_of(dense, model.sizes[0]), model.recipe)
    inputs = make_inputs(dense, 2, model.sizes[0])
    ours, reference = squeezed.build("int8"), squeezed.build("reference")
    assert len(squeezed.plan.gemms) >= 6
    assert all(gemm.weight_bits == 8 and gemm.sparsity == "2:4" for gemm in squeezed.plan.gemms)
    found, expected = logits(ours, inputs), logits(reference, inputs)
    assert float((found - expected).norm() / expected.norm()) < 0.05
    assert logits(dynamic(dense, "onednn"), inputs).shape == expected.shape
    with CpuBench(model, settings(tmp_path)) as bench:
        calls, unable = bench.calls(inputs)
        assert unable == {}
        assert {EAGER, OURS} <= set(calls)
        assert all(call() > 0 for call in calls.values())
        assert 0 < bench.errors()[OURS] < 1


class Fake:
    """Engines of known speed; counts the models that were made ready."""

    made = 0

    def __init__(self, model: BenchModel, given: argparse.Namespace) -> None:
        Fake.made += 1
        self.failed = {"absent": "not installed"}

    def __enter__(self) -> Fake:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def calls(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, str]]:
        return {"base": lambda: 4.0, "ours": lambda: 1.0}, {"peer": "too long"}

    def errors(self) -> dict[str, float]:
        return {"ours": 0.5}


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> Job:
    for module in ("bench_run", "bench_models"):
        monkeypatch.setattr(f"squeezoo.{module}.MODELS", {model.name: model for model in TINY})
    monkeypatch.setattr(bench_run, "dense_rate", lambda device: 1e12)
    Fake.made = 0
    return Job("cpu", "base", "ours", ("peer",), Fake)


def test_a_second_run_measures_only_what_is_missing(
    tiny_models: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(tiny_models, settings(tmp_path, "--models", "bert", "--lengths", "8"))
    assert [(cell.key, cell.failed) for cell in first] == [
        (f"bert/{batch}/8", {"absent": "not installed", "peer": "too long"}) for batch in (1, 2)
    ]
    assert first[0].ratio("ours", "base") == 4.0
    assert Fake.made == 1
    assert "4.00x" in capsys.readouterr().out
    cells = run(tiny_models, settings(tmp_path, "--models", "bert,vit"))
    assert Fake.made == 3
    assert [cell.key for cell in cells] == [
        "bert/1/8",
        "bert/2/8",
        "bert/1/16",
        "bert/2/16",
        "vit/1/224x224",
        "vit/2/224x224",
    ]
    run(tiny_models, settings(tmp_path, "--models", "bert,vit"))
    assert Fake.made == 3
    run(tiny_models, settings(tmp_path, "--models", "vit", "--again"))
    assert Fake.made == 4
    monkeypatch.setattr(bench_run, "stamp", lambda found: "another version")
    run(tiny_models, settings(tmp_path, "--models", "vit"))
    assert Fake.made == 5
    (path,) = tmp_path.iterdir()
    assert {cell.stamp == "another version" for key, cell in Grid(path, {}).cells.items() if "vit" in key} == {True}


def test_lengths_replace_what_text_models_read() -> None:
    """Not what they write, nor the size of images."""
    labels = {name: [MODELS[name].label(size) for size in sizes_of(MODELS[name], [16, 64])] for name in MODELS}
    assert labels["bert-base"] == labels["opt-125m"] == ["16", "64"]
    assert labels["bart-base"] == ["16->60", "64->60"]
    assert labels["vit-b16"] == ["224x224"]
    assert sizes_of(MODELS["bert-base"], None) == MODELS["bert-base"].sizes


def test_cells_that_would_take_too_long_are_skipped_with_the_reason(
    tiny_models: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate at which a call of one sequence of 8 tokens takes a second: two of them pass the limit of 1.5. With a
    higher one the next run measures them."""
    bert = TINY[0]
    work = work_of(bert.dense(), make_inputs(bert.dense(), 1, (8, 0)))
    block = 4 * 32 * 32 + 2 * 32 * 64  # six GEMMs of a block
    assert work == 2 * 8 * (2 * block + 32 * 32 + 2 * 32)  # two blocks, pooler, head of two labels
    monkeypatch.setattr(bench_run, "dense_rate", lambda device: work)
    given = ("--models", "bert", "--lengths", "8", "--max-call")
    cells = run(tiny_models, settings(tmp_path, *given, "1.5"))
    assert [cell.skipped for cell in cells] == [None, "skipped: some 2 s a dense call, the limit is 1.5"]
    cells = run(tiny_models, settings(tmp_path, *given, "2.5"))
    assert [cell.skipped for cell in cells] == [None, None]


def test_the_issue_s_models_sizes_and_batches_are_there() -> None:
    """Issue 6, item 5: models, lengths and batches."""
    assert {name: [model.label(size) for size in model.sizes] for name, model in MODELS.items()} == {
        "minilm-l6": ["128", "384"], "bert-base": ["128", "384"], "bert-large": ["128", "384"], "opt-125m": ["2048"],
        "opt-1.3b": ["2048"], "bart-base": ["1024->60"], "vit-b16": ["224x224"], "wav2vec2-base": ["10 s"],
    }  # fmt: skip
    assert parse_arguments("bench_cpu", None, []).batch_sizes == [1, 8, 32]
    assert parse_arguments("bench_cpu", None, ["--quick"]).batch_sizes == [1, 8]
    assert parse_arguments("bench_cpu", None, ["--quick", "--batches", "4"]).batch_sizes == [4]
    with pytest.raises(ValueError, match="unknown model 'bert-huge'; allowed: minilm-l6"):
        list(chosen("bert-huge"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_the_gpu_benchmark_says_that_there_is_no_gpu() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        bench_gpu([])


@pytest.mark.gpu
def test_the_gpu_benchmark_measures_a_cell(tmp_path: Path) -> None:
    """Every engine runs; on an emulated GPU nothing is compiled, and 8 tokens take long enough."""
    length = "8" if emulating() else "128"
    bench_gpu(["--results", str(tmp_path), "--models", "minilm-l6", "--batches", "2", "--lengths", length, "--quick"])
    (path,) = tmp_path.iterdir()
    (cell,) = Grid(path, {}).cells.values()
    assert set(cell.failed) == ({"compiled bf16"} if emulating() else set())
    assert {"eager fp32", "eager TF32", "bf16 CUDA graph", "squeezoo", "squeezoo CUDA graph"} <= set(cell.engines)
    assert cell.errors["squeezoo"] < 0.5
