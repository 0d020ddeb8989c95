"""A GPU of compute capability 9.0 in host memory, so that tests marked ``gpu`` run where there is none.

``SQUEEZOO_EMULATED_GPU=1`` makes ``conftest.py`` call `install` (``make test-gpu-emulated``). PyTorch's operators run
by their CPU forms (``device.cpp``), Triton's kernels in its interpreter, cuSPARSELt's by their definition, with what
they refuse (``cuda_only.py``); a CUDA graph is a tape of operators, and waiting for the device while one is captured is
an error. Not there: speed, several streams, and ``torch.compile``, which writes code for a real GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_SOURCE = Path(__file__).parent / "device.cpp"
_NAME, _CAPABILITY, _BYTES = "emulated GPU", (9, 0), 16 << 30


def emulating() -> bool:
    """Whether this process was asked to."""
    return bool(os.environ.get("SQUEEZOO_EMULATED_GPU"))


def install() -> None:
    """Make ``cuda`` the emulated device, for the whole process and before anything has asked for CUDA.

    Raises:
        RuntimeError: a PyTorch built with CUDA, whose own kernels would be in the way.
    """
    if torch.version.cuda is not None:
        raise RuntimeError(f"the emulated GPU needs a CPU build of PyTorch, found {torch.__version__}; `make test-gpu`")
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton's kernels are defined
    torch.cuda._lazy_init = lambda: None  # type: ignore[assignment]
    torch.ops.load_library(str(_built()))
    from . import cuda_only

    cuda_only.install(synchronize)
    _install_triton()
    torch.version.cuda = "13.0"
    torch.UntypedStorage.clone = _clone  # type: ignore[method-assign]
    torch._C._cuda_clearCublasWorkspaces = lambda: None
    properties = SimpleNamespace(
        name=_NAME, major=_CAPABILITY[0], minor=_CAPABILITY[1], total_memory=_BYTES, multi_processor_count=132, uuid="0"
    )
    allocated = torch.ops.emulated.allocated
    found: dict[str, Any] = {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1,
        "current_device": lambda: 0, "get_device_capability": lambda device=None: _CAPABILITY,
        "get_device_name": lambda device=None: _NAME, "get_device_properties": lambda device=None: properties,
        "synchronize": synchronize, "empty_cache": lambda: None, "memory_allocated": lambda device=None: allocated(),
        "max_memory_allocated": lambda device=None: allocated(), "reset_peak_memory_stats": lambda device=None: None,
        "device": Device, "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph,
        "stream": lambda stream: contextlib.nullcontext(), "current_stream": lambda device=None: Stream(),
        "is_current_stream_capturing": torch.ops.emulated.capturing, "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None, "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "set_sync_debug_mode": lambda mode: torch.ops.emulated.refuse(mode in ("error", 2)),
    }  # fmt: skip
    for name, value in found.items():
        setattr(torch.cuda, name, value)
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, value)


def _built() -> Path:
    """``device.cpp`` as a library for this PyTorch, compiled once."""
    from squeezoo.compress.runtime.caches import writable_folders
    from squeezoo.compress.runtime.native.compiler import find_compiler

    key = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode() + torch.__file__.encode()).hexdigest()[:16]
    folder = next(writable_folders("emulated"))
    library = folder / f"{key}.so"
    if not library.exists():
        root = Path(torch.__file__).parent
        made = folder / f"{key}.{os.getpid()}.so"
        include = [f"-I{root / 'include' / part}" for part in ("", "torch/csrc/api/include")]
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w", f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run([*find_compiler(), str(_SOURCE), "-o", str(made), *include, *flags], check=True)
        made.replace(library)
    return library


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Without CUDA PyTorch makes no storage there, only tensors; ``copy.deepcopy`` asks for one."""
    bytes_ = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return bytes_.clone().untyped_storage()


# -- what torch.cuda has


def synchronize(device: Any = None) -> None:
    torch.ops.emulated.wait()


class Device:
    """``torch.cuda.device``: there is one."""

    def __init__(self, device: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: Any) -> None: ...


class Stream:
    """There is one, and it is always done."""

    def wait_stream(self, other: Stream) -> None: ...


class Event:
    """A time of the host."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.enable_timing = enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        assert self.enable_timing
        assert end.enable_timing
        return (end.at - self.at) * 1000


class Graph:
    """A tape of operators and kernels; a replay runs them on the tensors of the capture."""

    def __init__(self) -> None:
        self.tape: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def replay(self) -> None:
        for function, args, kwargs, captured in self.tape:
            found = function(*args, **kwargs)
            for old, new in zip(_tensors(captured), _tensors(found)):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Tape(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.graph.tape.append((func, args, kwargs or {}, result))
        return result


_captured: list[Graph] = []  # the one that is being captured


@contextlib.contextmanager
def graph(found: Graph) -> Iterator[None]:
    torch.ops.emulated.capture(True)
    _captured.append(found)
    try:
        with _Tape(found):
            yield
    finally:
        _captured.clear()
        torch.ops.emulated.capture(False)


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, Tensor)]


# -- Triton


def _install_triton() -> None:
    """Its interpreter, on the device's own memory, refusing what lies on the host."""
    from triton.runtime import interpreter

    executor: Any = interpreter.GridExecutor
    run, convert = executor.__call__, interpreter._convert_float

    def rounded(data: Any, source: Any, wanted: Any, mode: Any) -> Any:
        """The interpreter cuts bfloat16 off where a GPU rounds it."""
        if (source.name, wanted.name) != ("fp32", "bf16"):
            return convert(data, source, wanted, mode)
        wide = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        return wide.to(torch.bfloat16).view(torch.uint16).numpy()

    def on_host(value: Any) -> Any:
        if isinstance(value, Tensor) and not value.is_cuda:
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        return torch.ops.emulated.host(value) if isinstance(value, Tensor) else value

    def arguments(self: Any, args: Any, kwargs: Any) -> Any:
        return [on_host(x) for x in args], {name: on_host(x) for name, x in kwargs.items()}

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        for found in _captured:
            found.tape.append((lambda *a, **k: launch(self, *a, **k), args, kwargs, None))
        with _disable_current_modes():
            run(self, *args, **kwargs)

    interpreter._convert_float = rounded
    executor._init_args_hst = arguments
    executor._restore_args_dev = lambda self, *args: None
    executor.__call__ = launch
