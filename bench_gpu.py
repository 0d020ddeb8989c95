"""``make bench-gpu``: squeezed models against dense ones on this GPU, interleaved in one run.

Baselines: eager float32 with and without TF32, bfloat16 with fused attention, the same compiled and in a CUDA graph.
Ours: the CUDA runtime as ``load`` gives it, and in a CUDA graph. Cells go to ``results/gpu-<environment>.json`` one by
one; a second run measures only what is missing or stale. ``python -m squeezoo.bench_gpu --help`` lists the choices.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor, nn

from .bench_models import BenchModel, samples_of, squeeze
from .bench_run import Job, parse_arguments, run, say
from .compress.runtime.selection import select_kernels_
from .eval.peers import disagreement
from .eval.rounds import Call
from .eval.timing import clock_for
from .models.dense import logits

FP32, TF32, BF16, COMPILED, GRAPH = "eager fp32", "eager TF32", "bf16 SDPA", "compiled bf16", "bf16 CUDA graph"
OURS, OURS_EAGER = "squeezoo CUDA graph", "squeezoo"
PEERS = (COMPILED, GRAPH)
_WARMUP = 3  # calls before a capture: kernels are searched and memory is reserved in them


class GpuBench:
    """One model on every engine of a GPU."""

    def __init__(self, model: BenchModel, settings: argparse.Namespace) -> None:
        self.failed: dict[str, str] = {}
        dense = model.dense()
        squeezed = squeeze(dense, samples_of(dense, model.sizes[0]), model.recipe)
        ours = squeezed.build("cuda", "cuda")
        selection = select_kernels_(ours)
        for note in selection.notes:
            say(f"  selection: {note}")
        del squeezed
        dense = model.dense()
        self.models = {FP32: dense.to("cuda"), BF16: copy.deepcopy(dense).to("cuda", torch.bfloat16), OURS_EAGER: ours}
        self.compiled = torch.compile(self.models[BF16])
        self._clock = clock_for(torch.device("cuda"))

    def __enter__(self) -> GpuBench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.models.clear()
        del self.compiled
        torch.compiler.reset()
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def calls(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Call], dict[str, str]]:
        """See `Bench`."""
        on_device = {name: tensor.to("cuda") for name, tensor in inputs.items()}
        half = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in on_device.items()}
        plain: dict[str, Callable[[], Tensor]] = {
            FP32: lambda: logits(self.models[FP32], on_device),
            TF32: lambda: _with_tf32(self.models[FP32], on_device),
            BF16: lambda: logits(self.models[BF16], half),
            COMPILED: lambda: self.compiled(**half, **_fixed(self.models[BF16])).logits,
            OURS_EAGER: lambda: logits(self.models[OURS_EAGER], half),
        }
        calls: dict[str, Call] = {}
        unable: dict[str, str] = {}
        self._outputs: dict[str, Tensor] = {}
        for name, once in plain.items():
            try:
                self._outputs[name] = once().float()
                calls[name] = lambda once=once: self._timed(once)  # type: ignore[misc]
            except (RuntimeError, TypeError, ValueError) as error:
                unable[name] = str(error).splitlines()[0]
        for name, source in ((GRAPH, BF16), (OURS, OURS_EAGER)):
            try:
                replay, output = captured(plain[source])
                replay()
                self._outputs[name] = output.float()
                calls[name] = lambda replay=replay: self._timed(replay)  # type: ignore[misc]
            except (RuntimeError, TypeError, ValueError) as error:
                unable[name] = str(error).splitlines()[0]
        return calls, unable

    def errors(self) -> dict[str, float]:
        """See `Bench`."""
        expected = self._outputs[FP32]
        return {n: disagreement(found, expected) for n, found in self._outputs.items() if n != FP32}

    @torch.inference_mode()
    def _timed(self, once: Callable[[], object]) -> float:
        return self._clock(once)


def captured(once: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """``once`` as a CUDA graph: what replays it, and the tensor that then holds its result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUP):
            once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = once()
    return graph.replay, output


def _with_tf32(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with tf32():
        return logits(model, inputs)


@contextmanager
def tf32() -> Iterator[None]:
    """Float32 matmuls and convolutions by TensorFloat-32, inside only."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _fixed(model: nn.Module) -> dict[str, bool]:
    """As `logits` calls a model that generates."""
    return {"use_cache": False} if model.can_generate() else {}  # type: ignore[operator]


def main(arguments: list[str] | None = None) -> None:
    """Run it from the command line.

    Raises:
        SystemExit: this machine has no CUDA device.
    """
    settings = parse_arguments("bench_gpu", __doc__, arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu needs a CUDA device, and this PyTorch finds none; `make bench-cpu` times the CPU")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # the baseline is float32 itself
    run(Job("cuda", FP32, OURS, PEERS, GpuBench), settings)


if __name__ == "__main__":
    main()
