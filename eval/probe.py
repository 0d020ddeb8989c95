"""What `eval.loading` runs in a fresh process: load a model, run it, and say on the last line of stdout what it took.

``python -m squeezoo.eval.probe '{"loader": "module:function", "source": ..., ...}'``
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory() -> tuple[int, int] | None:
    """(resident bytes now, their peak since `reset_peak`); None without Linux's /proc.

    Not getrusage: its peak counts the parent process before exec.
    """
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    except (OSError, KeyError, ValueError):
        return None


def reset_peak() -> bool:
    """Whether the peak was set to what is resident now."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def tensor_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, shared storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def probe(
    loader: str,
    source: str,
    options: dict[str, Any],
    device: str,
    threads: int | None,
    batch: int | None,
    sequence: int | None,
    audio_seconds: float | None,
    calls: int,
) -> dict[str, Any]:
    """Load ``loader(source, **options)``, move it to ``device``, and with a ``batch`` run it so many ``calls``."""
    started = time.perf_counter()
    import torch

    module, _, name = loader.partition(":")
    load = getattr(importlib.import_module(module), name)
    if threads is not None:
        torch.set_num_threads(threads)
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.zeros(1, device=device)  # the context is no part of the load
        torch.cuda.reset_peak_memory_stats()
    imported = time.perf_counter()
    resets = reset_peak()
    before = memory()
    begun = time.perf_counter()
    loaded = load(source, **options)
    model: Any = getattr(loaded, "model", loaded)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{loader} gives {type(loaded).__name__}, expected a module or something with a .model")
    model.to(device)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    after = memory()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    found: dict[str, Any] = {
        "import_seconds": imported - started, "load_seconds": seconds, "peak_resets": resets,
        "before": before, "loaded": after, "cuda_loaded": torch.cuda.memory_allocated() if cuda else None,
        "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "tensors": tensor_bytes(model),
    }  # fmt: skip
    if batch is not None:
        found |= _run(model, device, batch, sequence, audio_seconds, calls)
    return found


def _run(
    model: Any, device: str, batch: int, sequence: int | None, audio_seconds: float | None, calls: int
) -> dict[str, Any]:
    import torch

    from ..models.dense import logits
    from .runner import evaluating
    from .speed import backend_of, make_batch

    inputs = {n: t.to(device) for n, t in make_batch(model, batch, sequence, audio_seconds=audio_seconds).items()}
    reset_peak()
    with evaluating(model):
        for _ in range(calls):
            logits(model, inputs)
    images = inputs.get("pixel_values")
    cuda = torch.device(device).type == "cuda"
    return {
        "ran": memory(), "cuda_peak": torch.cuda.max_memory_allocated() if cuda else None,
        "image_size": None if images is None else list(images.shape[2:]), "backend": backend_of(model),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(probe(**json.loads(sys.argv[1]))))
