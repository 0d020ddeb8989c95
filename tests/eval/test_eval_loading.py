"""Loading and memory in fresh processes, on folders of real (tiny and less tiny) models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from squeezoo.eval.loading import DENSE_LOADER, Loading, Memory, measure_loading, measure_memory
from squeezoo.eval.probe import probe
from squeezoo.eval.speed import Timing
from squeezoo.models.dense import save_dense
from tiny import make

MEMORY: dict[str, Any] = {
    "source": "m", "loader": DENSE_LOADER, "device": "a CPU (1 thread)", "backend": "pytorch", "dtype": "float32",
    "threads": 1, "batch": 2, "sequence": 8, "image_size": None, "audio_seconds": None, "repeats": 3, "tensors": 40,
    "baseline": 100,
    "loaded": 150, "load_peak": 180, "run_peak": 170, "cuda_loaded": None, "cuda_peak": None,
    "libraries": {"torch": "2.13"},
}  # fmt: skip
LOADING: dict[str, Any] = {
    "source": "m", "loader": DENSE_LOADER, "device": "a CPU (1 thread)", "dtype": "float32", "threads": 1,
    "first_seconds": 1.0, "evicted": True, "warm": Timing(2.0, 1.5, 3.0, 1.0), "import_seconds": 3.0, "repeats": 3,
    "libraries": {"torch": "2.13"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny BERT, and one of a single block whose feed-forward has 2 x 512 x 20,000 weights (78 MiB)."""
    import transformers
    from tiny import BERT, HEAD

    root = tmp_path_factory.mktemp("models")
    save_dense(make("bert"), None, root / "small")
    size = {"hidden_size": 512, "num_hidden_layers": 1, "intermediate_size": 20_000}
    wide = transformers.BertConfig(**{**BERT, **HEAD, **size})
    save_dense(transformers.BertForSequenceClassification(wide), None, root / "large")
    return {name: str(root / name) for name in ("small", "large")}


def test_memory_grows_with_the_model(folders: dict[str, str]) -> None:
    """The large model holds its 78 MiB of feed-forward in tensors, and a process that runs it needs them more than one
    that runs the small one; peaks are no less than what is resident; the conditions are in the record."""
    small, large = (
        measure_memory(folders[name], batch=2, sequence=8, threads=1, options={"kind": "auto"}, repeats=1)
        for name in ("small", "large")
    )
    weights = 2 * 512 * 20_000 * 4
    assert weights < large.tensors < 1.1 * weights
    assert large.run_peak - small.run_peak > 0.9 * weights
    for found in (small, large):
        assert found.load_peak >= found.loaded > found.baseline
        assert (found.batch, found.sequence, found.image_size, found.threads) == (2, 8, None, 1)
        assert found.run_peak > found.baseline
        assert found.device.endswith("(1 thread)")
        assert (found.cuda_loaded, found.cuda_peak) == (None, None)
    assert large.source == "large"
    assert Memory.from_dict(json.loads(json.dumps(large.to_dict()))) == large


def test_loading_is_timed_in_fresh_processes(folders: dict[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    """A loader of a module beside this test notes each process and what it finds in the cache: the first finds it
    empty, the three others what the first left."""
    (tmp_path / "noting_loader.py").write_text(
        "import os, pathlib, torch\n"
        "def load(source, log):\n"
        "    cache = pathlib.Path(os.environ['XDG_CACHE_HOME']) / 'table'\n"
        "    with open(log, 'a') as file: file.write(f'{os.getpid()} {cache.exists()}\\n')\n"
        "    cache.parent.mkdir(parents=True, exist_ok=True); cache.touch()\n"
        "    return torch.nn.Linear(2, 2)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"
    found = measure_loading(
        folders["small"], loader="noting_loader:load", options={"log": str(log)}, threads=1, repeats=3
    )
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [exists for _, exists in lines] == ["False", "True", "True", "True"]
    assert len({process for process, _ in lines}) == 4
    assert (found.repeats, found.threads, found.source) == (3, 1, "small")
    assert found.first_seconds > 0
    assert found.import_seconds > 0
    assert Loading.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"fresh process failed: (.|\n)*No module named 'nowhere'"):
        measure_memory(tmp_path, loader="nowhere:load", batch=1, sequence=4)
    with pytest.raises(ValueError, match="at least 3"):
        measure_loading(tmp_path, repeats=1)


@pytest.mark.parametrize(("record", "good"), [(Memory, MEMORY), (Loading, LOADING)])
def test_every_field_is_needed(record: Any, good: dict[str, Any]) -> None:
    for field in good:
        with pytest.raises(TypeError, match=field):
            record(**{name: value for name, value in good.items() if name != field})
    assert record.from_dict(json.loads(json.dumps(record(**good).to_dict()))) == record(**good)


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [(Memory, "batch", 0), (Memory, "sequence", None), (Memory, "audio_seconds", 1.0), (Memory, "run_peak", None),
     (Memory, "cuda_peak", 5), (Memory, "dtype", ""), (Loading, "warm", 2.0), (Loading, "first_seconds", 0),
     (Loading, "device", ""), (Loading, "evicted", None), (Loading, "libraries", {})],
)  # fmt: skip
def test_bad_values_are_refused(record: Any, field: str, value: Any) -> None:
    good = MEMORY if record is Memory else LOADING
    with pytest.raises(ValueError, match=r"Memory|Loading|libraries"):
        record(**{**good, field: value})


def test_images_and_audio_name_their_size(tmp_path: Path) -> None:
    """The probe itself, in this process: an image model declares 8 x 8 pixels; a speech model takes seconds. Bytes of
    tensors: 4 for each of the float32 numbers, by counting them."""
    for name, seconds in (("vit", None), ("wav2vec2", 0.05)):
        model = make(name)
        save_dense(model, None, tmp_path / name)
        found = probe(DENSE_LOADER, str(tmp_path / name), {"kind": "auto"}, "cpu", None, 1, None, seconds, 1)
        assert found["image_size"] == ([8, 8] if seconds is None else None)
        assert found["tensors"] == 4 * sum(p.numel() for p in model.parameters())
        assert found["dtype"] == "float32"
        assert found["ran"][1] >= found["before"][0] > 0
