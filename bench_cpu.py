"""``make bench-cpu``: squeezed models against dense float32 and the int8 peers on this CPU, interleaved in one run.

Every cell (model, batch, size) is written to ``results/cpu-<environment>.json`` as soon as it is measured; a second run
measures only what is missing or stale. ``python -m squeezoo.bench_cpu --help`` lists what can be chosen.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from .bench_models import BenchModel, samples_of, squeeze
from .bench_run import ROOT, Job, parse_arguments, run, say
from .compress.runtime.selection import select_kernels_
from .eval.allocator import give_back_freed_memory
from .eval.peers import Peer, PeerError, disagreement, write_batch, write_model
from .eval.rounds import Call
from .models.dense import logits

EAGER, OURS = "eager fp32", "squeezoo"
DYNAMIC = {"torch dynamic int8 (onednn)": "onednn", "torch dynamic int8 (x86)": "x86"}
PEERS = {"OpenVINO NNCF int8": "openvino", "ONNX Runtime int8": "onnxruntime"}
PEER_LABELS = (*DYNAMIC, *PEERS, "OpenVINO NNCF int8, this shape")
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"


class CpuBench:
    """One model on every engine of a CPU."""

    def __init__(self, model: BenchModel, settings: argparse.Namespace) -> None:
        self.failed: dict[str, str] = {}
        self._stack = ExitStack()
        dense = model.dense()
        samples = samples_of(dense, model.sizes[0])
        squeezed = squeeze(dense, samples, model.recipe)
        del dense  # one of the largest models, dense, squeezed and packed at once, would not fit into 24 GB
        give_back_freed_memory()
        ours = squeezed.build("int8")
        del squeezed
        give_back_freed_memory()
        for note in select_kernels_(ours).notes:
            say(f"  selection: {note}")
        dense = model.dense()
        self.models: dict[str, nn.Module] = {EAGER: dense, OURS: ours}
        for name, engine in DYNAMIC.items():
            give_back_freed_memory()
            try:
                self.models[name] = dynamic(dense, engine)
            except (RuntimeError, ValueError, TypeError, AttributeError) as error:
                self.failed[name] = str(error).splitlines()[0]
        self.peers: dict[str, Peer] = {}
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        if not settings.no_peers:
            self._start_peers(dense, samples)

    def _start_peers(self, dense: nn.Module, samples: list[dict[str, Tensor]]) -> None:
        if not PEER_PYTHON.is_file():
            self.failed |= dict.fromkeys(PEERS, f"no environment {PEER_PYTHON.parents[1].name}: run `make peers`")
            return
        class_name = write_model(dense, self._folder / "model")
        files = [write_batch(sample, self._folder / f"sample{i}.safetensors") for i, sample in enumerate(samples)]
        for name, engine in PEERS.items():
            peer = Peer(PEER_PYTHON, engine, torch.get_num_threads(), self._folder)
            self._stack.callback(peer.close)
            try:
                say(f"  {name} quantizes")
                peer.prepare(self._folder / "model", class_name, files)
                self.peers[name] = peer
            except PeerError as error:
                self.failed[name] = str(error)

    def __enter__(self) -> CpuBench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.models.clear()
        self._stack.close()

    @torch.inference_mode()
    def calls(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Call], dict[str, str]]:
        """See `Bench`."""
        unable: dict[str, str] = {}
        calls: dict[str, Call] = {}
        give_back_freed_memory()
        expected = logits(self.models[EAGER], inputs)
        self._errors: dict[str, float] = {}  # at once: the outputs of all engines may be larger than the models
        for name, model in self.models.items():
            try:
                if name != EAGER:
                    self._errors[name] = disagreement(logits(model, inputs), expected)
                calls[name] = lambda model=model: timed(model, inputs)  # type: ignore[misc]
            except (RuntimeError, TypeError, AttributeError) as error:
                unable[name] = str(error).splitlines()[0]
        batch = write_batch(inputs, self._folder / "batch.safetensors") if self.peers else None
        for name, peer in self.peers.items():
            assert batch is not None
            try:
                peer.use_(batch)
                for variant in peer.variants:
                    label = name if variant == "any shape" else f"{name}, {variant}"
                    self._errors[label] = disagreement(peer.output(variant), expected)
                    calls[label] = functools.partial(peer.call, variant)
            except PeerError as error:
                unable[name] = str(error)
        return calls, unable

    def errors(self) -> dict[str, float]:
        """See `Bench`."""
        return self._errors


@torch.inference_mode()
def timed(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    logits(model, inputs)
    return (time.perf_counter() - start) * 1000


def dynamic(dense: nn.Module, engine: str) -> nn.Module:
    """PyTorch's own dynamic int8: every linear, by one of its engines."""
    before = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated since PyTorch 2.10, and still the built-in peer
        try:
            torch.backends.quantized.engine = engine
            mine = copy.deepcopy(dense)
            return torch.ao.quantization.quantize_dynamic(mine, {nn.Linear}, dtype=torch.qint8, inplace=True)
        finally:
            torch.backends.quantized.engine = before


def main(arguments: list[str] | None = None) -> None:
    """Run it from the command line."""
    run(Job("cpu", EAGER, OURS, PEER_LABELS, CpuBench), parse_arguments("bench_cpu", __doc__, arguments))


if __name__ == "__main__":
    main()
