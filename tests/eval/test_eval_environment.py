"""What the environment report says, and result files that are whole or absent."""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from squeezoo.eval import environment, results


def test_environment_names_this_machine() -> None:
    """Expected: what torch and the operating system say themselves."""
    report = environment.environment()
    assert json.loads(json.dumps(report)) == report
    assert report["libraries"]["torch"] == torch.__version__
    assert "squeezoo" in report["libraries"]
    for name in ("rouge-score", "sacrebleu", "tokenizers", "jiwer", "seqeval", "soundfile", "pillow"):
        assert report["libraries"][name] == importlib.metadata.version(name)
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["cpu"]["name"] in environment.device_name("cpu")
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert report["memory_bytes"] is None or report["memory_bytes"] > 2**28
    assert (report["cuda"] is None) == (torch.version.cuda is None)
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512"):
        assert {"AVX2": "avx2", "AVX512": "avx512f"}[capability] in report["cpu"]["features"]


def test_threads_are_part_of_the_device_name() -> None:
    """One thread is said in the singular."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert environment.device_name("cpu").endswith("(1 thread)")
    finally:
        torch.set_num_threads(before)


def test_write_and_overwrite(tmp_path: Path) -> None:
    """The file holds the last object; folders are made; nothing else stays behind."""
    path = tmp_path / "a" / "r.json"
    for obj in ({"x": 1}, {"x": [1.5, "é"]}):
        results.atomic_write_json(path, obj)
        assert json.loads(path.read_text(encoding="utf-8")) == obj
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


@pytest.mark.parametrize("obj", [{"x": float("nan")}, {"x": object()}])
def test_unwritable_object_leaves_the_old_file(tmp_path: Path, obj: Any) -> None:
    """NaN is not JSON, nor is an arbitrary object."""
    path = tmp_path / "r.json"
    results.atomic_write_json(path, {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        results.atomic_write_json(path, obj)
    assert json.loads(path.read_text(encoding="utf-8")) == {"old": 1}


def test_failure_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the bytes are flushed: the old file is whole and no temporary file stays."""
    path = tmp_path / "r.json"
    results.atomic_write_json(path, {"old": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        results.atomic_write_json(path, {"new": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
