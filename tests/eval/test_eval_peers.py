"""The peers' processes and their protocol. The engines themselves need their environment; here speaks the real worker
in this one, which has none of them, and with an engine of the test's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from squeezoo.eval import peers
from squeezoo.eval.peers import Peer, PeerError, disagreement, write_batch

# The real worker with one more engine: y = 2 x, which counts its calls.
_WORKER = """
import sys
sys.path.insert(0, {folder!r})
import peers_worker

class Double:
    versions, variants = {{"double": "1"}}, ("plain",)
    def use_(self, inputs):
        if "x" not in inputs:
            raise KeyError("x")
        self.inputs = inputs
    def call(self, variant):
        print("noise on standard output")
        return self.inputs["x"] * 2

peers_worker.prepare = lambda request: Double()
peers_worker.serve()
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text(_WORKER.format(folder=str(peers.WORKER.parent)))
    monkeypatch.setattr(peers, "WORKER", script)


def test_a_peer_runs_the_same_batch_and_answers_in_milliseconds(worker: None, tmp_path: Path) -> None:
    batch = {"x": torch.randn(2, 3)}
    with Peer(Path(sys.executable), "double", 1, tmp_path) as peer:
        assert peer.prepare(tmp_path, "Model", []) >= 0
        assert (peer.versions, peer.variants) == ({"double": "1"}, ("plain",))
        peer.use_(write_batch(batch, tmp_path / "batch.safetensors"))
        assert peer.call("plain") > 0
        assert torch.equal(peer.output("plain"), batch["x"] * 2)
        with pytest.raises(PeerError, match="double: KeyError"):
            peer.use_(write_batch({"y": batch["x"]}, tmp_path / "other.safetensors"))
        assert peer.call("plain") > 0  # an error is an answer, not the end
        process = peer._process
    assert process.poll() is not None


def test_an_engine_that_is_not_installed_is_an_error_of_this_peer(tmp_path: Path) -> None:
    """The real worker: a model folder that does not exist, and a call before anything is prepared."""
    with Peer(Path(sys.executable), "openvino", 1, tmp_path) as peer:
        with pytest.raises(PeerError, match="openvino: RuntimeError: call before prepare"):
            peer.call("any shape")
        with pytest.raises(PeerError, match="openvino: "):
            peer.prepare(tmp_path / "nothing", "BertModel", [])


def test_a_process_that_dies_is_told_with_its_last_words(worker: None, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text("import sys; sys.exit('out of memory')")
    with (
        Peer(Path(sys.executable), "double", 1, tmp_path) as peer,
        pytest.raises(PeerError, match="its process ended at 'prepare'; the last it said: out of memory"),
    ):
        peer.prepare(tmp_path, "Model", [])


def test_batches_are_written_as_they_are(tmp_path: Path) -> None:
    batch = {"input_ids": torch.arange(6).view(3, 2).t()}
    assert torch.equal(load_file(write_batch(batch, tmp_path / "b"))["input_ids"], batch["input_ids"])


def test_disagreement_is_relative_to_the_largest_value() -> None:
    assert disagreement(torch.tensor([1.0, -4.0]), torch.tensor([1.5, -5.0])) == pytest.approx(0.2)
