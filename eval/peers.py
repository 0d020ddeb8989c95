"""The int8 peers, each in a process of an environment of its own, so that their pins never meet ours."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

WORKER = Path(__file__).with_name("peers_worker.py")
ENGINES = ("openvino", "onnxruntime")


class PeerError(RuntimeError):
    """A peer that cannot do what was asked, in its own words."""


class Peer:
    """One engine in its process; a context manager that ends it.

    Args:
        python: the interpreter of the peers' environment. engine: one of `ENGINES`. threads: CPU threads.
        folder: where it reads the model and inputs; the caller's, and kept by the caller.

    Raises:
        PeerError: from every method, when the engine fails or its process ends.
    """

    def __init__(self, python: Path, engine: str, threads: int, folder: Path) -> None:
        self.engine, self.threads, self.folder = engine, threads, folder
        self.versions: dict[str, str] = {}
        self.variants: tuple[str, ...] = ()
        self._log = (folder / f"{engine}.log").open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [str(python), str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def prepare(self, model: Path, class_name: str, samples: Sequence[Path]) -> float:
        """Quantize the transformers model in ``model``, calibrated on ``samples`` (see `write_batch`); seconds."""
        reply = self._ask(
            do="prepare", engine=self.engine, model=str(model), samples=[str(path) for path in samples],
            threads=self.threads, **{"class": class_name},
        )  # fmt: skip
        self.versions, self.variants = dict(reply["versions"]), tuple(reply["variants"])
        return float(reply["seconds"])

    def use_(self, batch: Path) -> None:
        """Take the batch of a file for the next calls."""
        self._ask(do="inputs", file=str(batch))

    def call(self, variant: str) -> float:
        """Run one of ``variants`` once: milliseconds, measured in the process."""
        return float(self._ask(do="call", variant=variant)["ms"])

    def output(self, variant: str) -> Tensor:
        """The logits of the batch."""
        from safetensors.torch import load_file

        path = self.folder / f"{self.engine}.output.safetensors"
        self._ask(do="output", variant=variant, file=str(path))
        return load_file(path)["logits"]

    def _ask(self, **request: Any) -> Mapping[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if not line:
            lines = (self.folder / f"{self.engine}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            said = lines[-1] if lines else "nothing"
            raise PeerError(f"{self.engine}: its process ended at {request['do']!r}; the last it said: {said}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerError(f"{self.engine}: {reply['error']}")
        return reply


def write_model(model: nn.Module, folder: Path) -> str:
    """Write a dense transformers model for the peers; the name of its class."""
    model.save_pretrained(folder)  # type: ignore[operator]
    return type(model).__name__


def write_batch(batch: Mapping[str, Tensor], path: Path) -> Path:
    """One batch as a file, for `Peer.use_` and as a calibration sample."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous().to("cpu") for name, tensor in batch.items()}, path)
    return path


def disagreement(logits: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value."""
    return float((logits.float() - expected.float()).abs().amax() / torch.clamp(expected.float().abs().amax(), 1e-12))
