"""One-shot pruning of one model by one method, in a process of its own so that its peak of memory is its own.

Started by `bench_engine`: ``python -m squeezoo.bench_oneshot JSON`` with the fields of `Job`; the last line that it
prints is the record. The protocol: the model's tokenizer on the text of WikiText-2 as the file has it; calibration
windows from its valid split; perplexity on the first tokens of its test split in windows side by side, of which all
but the first token are scored.
"""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Calibration = Literal["first", "even"]
METHODS = ("dense", "magnitude", "wanda", "sparsegpt")
CALIBRATED = ("wanda", "sparsegpt")
_HEAD_TOKENS = 128  # of one product with the vocabulary: a window at once would take more memory than the pruning


@dataclass(frozen=True)
class Job:
    """What one process does.

    Args:
        method: one of `METHODS`. model: source of `load_dense`. data_dir: holds WikiText-2, see ``eval.wikitext``.
        threads: of PyTorch. rows, length: calibration windows, tokens of each.
        calibration: which windows of the split: the ``first``, or as many ``even`` ones spread over all of it.
        test_tokens, window: of the perplexity; 0 tokens: none.
        recompute: see `prune_oneshot_`. offload: weights wait in the system's folder of temporary files, see there.
    """

    method: str
    model: str
    data_dir: str
    threads: int = 2
    rows: int = 32
    length: int = 512
    calibration: Calibration = "first"
    test_tokens: int = 16_384
    window: int = 1_024
    recompute: bool = False
    offload: bool = False


def run_job(job: Job) -> dict[str, Any]:
    """Do it in a fresh process; its record: see `_measure`.

    Raises:
        RuntimeError: the process failed; holds the end of what it said.
    """
    command = [sys.executable, "-m", f"{__package__}.bench_oneshot", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"one-shot pruning by {job.method} failed:\n{done.stderr[-2000:]}")
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def _measure(job: Job) -> dict[str, Any]:
    """``seconds`` of the pruning alone; memory of the process in MiB: ``imported``, ``start`` (model and tokenizer
    loaded, plan attached), ``peak_loading``, ``peak_pruning``, ``peak`` (loading and pruning, what a peer's table
    means), ``peak_evaluation``; None where the system does not tell."""
    import torch

    from .compress.attach import attach_, fold_, prune_
    from .compress.lockstep import give_back_memory
    from .compress.oneshot import prune_oneshot_
    from .compress.plan import make_plan
    from .compress.recipe import Recipe
    from .models.dense import find_folder, load_dense, load_processor

    torch.set_num_threads(job.threads)
    memory: dict[str, float | None] = {"imported": _memory("VmRSS")}
    # text before weights: a whole split in tokens takes memory of its own for a moment
    processor = load_processor(find_folder(job.model)[0])
    windows = calibration_windows(_ids(processor, job, "valid"), job)
    test = _ids(processor, job, "test")[: job.test_tokens] if job.test_tokens else []
    del processor
    give_back_memory()
    model: Any = load_dense(job.model, kind="causal-lm").model
    if job.method != "dense":
        attach_(model, make_plan(model, Recipe.load(f"{job.method}-2-4")))
    gc.collect()
    give_back_memory()
    memory |= {"start": _memory("VmRSS"), "peak_loading": _memory("VmHWM")}
    _reset_peak()
    ways: dict[str, Callable[[], object]] = {"dense": lambda: None, "magnitude": lambda: prune_(model)}
    started = time.perf_counter()
    if job.method in ways:
        ways[job.method]()
    else:
        batch = {"input_ids": torch.tensor(windows)}
        folder = tempfile.gettempdir() if job.offload else None
        prune_oneshot_(model, job.method, [batch], recompute=job.recompute, offload=folder)  # type: ignore[arg-type]
    seconds = time.perf_counter() - started
    memory["peak_pruning"] = _memory("VmHWM")
    peaks = [value for value in (memory["peak_loading"], memory["peak_pruning"]) if value is not None]
    memory["peak"] = max(peaks) if peaks else None
    _reset_peak()
    fold_(model)
    ppl = _perplexity(model, test, job.window) if test else None
    memory["peak_evaluation"] = _memory("VmHWM")
    told = {name: value for name, value in asdict(job).items() if name != "data_dir"}  # a path of one machine
    told["model"] = Path(job.model).name
    return {"method": job.method, "seconds": seconds, "perplexity": ppl, "memory_mib": memory, "job": told}


def calibration_windows(ids: Sequence[int], job: Job) -> list[list[int]]:
    """``rows`` windows of ``length`` tokens.

    Raises:
        ValueError: the split is too short for them.
    """
    whole = len(ids) // job.length
    if whole < job.rows:
        raise ValueError(f"expected {job.rows} calibration windows of {job.length} tokens, the split has {whole}")
    chosen = range(job.rows) if job.calibration == "first" else [row * whole // job.rows for row in range(job.rows)]
    return [list(ids[row * job.length : (row + 1) * job.length]) for row in chosen]


def _ids(processor: Any, job: Job, split: str) -> list[int]:
    from .eval import files
    from .eval.perplexity import text_tokens

    names = (f"wikitext-2-raw/wiki.{split}.raw", f"wikitext-2/wiki.{split}.tokens")
    path = files.find_file(f"wikitext2, split {split},", Path(job.data_dir), names)
    return text_tokens(processor, files.read_text(path))


def _perplexity(model: Any, ids: Sequence[int], window: int) -> float:
    import torch

    backbone, head = model.base_model, model.get_output_embeddings()
    nll, count = 0.0, 0
    with torch.no_grad():
        for left in range(0, len(ids), window):
            tokens_L = torch.tensor(ids[left : left + window])
            states_LD, labels_L = backbone(tokens_L[None]).last_hidden_state[0, :-1], tokens_L[1:]
            parts = zip(states_LD.split(_HEAD_TOKENS), labels_L.split(_HEAD_TOKENS), strict=True)
            for states, labels in parts:
                nll += float(torch.nn.functional.cross_entropy(head(states), labels, reduction="sum"))
            count += len(labels_L)
    return math.exp(nll / count)


def _memory(field: str) -> float | None:
    """MiB of this process; VmHWM is its peak. `getrusage` will not do: it starts from what the parent process had."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), None)


def _reset_peak() -> None:
    """So that the next peak is that of what comes now; where it cannot be done peaks only grow."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    print(json.dumps(_measure(Job(**json.loads(sys.argv[1])))))
