"""The table of measured kernels in the user's cache: one JSON file per device, its settings and versions.

    $XDG_CACHE_HOME/squeezoo/kernels/<device>-<hash>.json      (~/.cache where it is not set; ``caches.py``)
    {"format": 1, "device": {...}, "times": {workload: {rows: {kernel: [median, fastest, p10, p90, rounds]}}}}

A file that is damaged, or made by anything else, counts as empty: everything is measured anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .caches import readable_folders, user_cache, writable_folders
from .select_timing import Sample

FORMAT = 1
PART = "kernels"  # of the cache
Times = dict[str, dict[int, dict[str, Sample]]]  # workload key, rows, kernel


def device_identity(device: torch.device) -> dict[str, Any]:
    """Everything that makes measured times comparable: the processor and its settings, versions, our own kernels."""
    found: dict[str, Any] = {"torch": torch.__version__, "kernels": kernels_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        sparse = torch.backends.cusparselt
        return found | {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _cuda_driver(),
            "cusparselt": sparse.version() if sparse.is_available() else None,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return found | {
        "name": _cpu_name(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": sorted(name for name in ("amx_int8", "avx512_vnni", "avx_vnni") if capabilities.get(name)),
    }


def table_name(identity: Mapping[str, Any]) -> str:
    """The file name of a device."""
    name = re.sub(r"[^a-z0-9]+", "-", str(identity["name"]).lower()).strip("-")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return f"{name}-{digest}.json"


def table_path(identity: Mapping[str, Any]) -> Path:
    """The file of a device: where it lies, else where it would in the user's cache."""
    name = table_name(identity)
    found = next((folder / name for folder in readable_folders(PART) if (folder / name).is_file()), None)
    return found or (user_cache(PART) or Path(tempfile.gettempdir())) / name


def read_times(identity: Mapping[str, Any]) -> Times:
    """What was measured on this device; empty where there is nothing, or nothing that can be read."""
    times: Times = {}
    for folder in readable_folders(PART):
        _merge_(times, _read(folder / table_name(identity), identity))
    return times


def _read(path: Path, identity: Mapping[str, Any]) -> Times:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["device"] != json.loads(json.dumps(identity)):
            return {}
        return {
            workload: {
                int(rows): {kernel: Sample.from_list(values) for kernel, values in kernels.items()}
                for rows, kernels in by_rows.items()
            }
            for workload, by_rows in data["times"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _merge_(times: Times, new: Times) -> None:
    for workload, by_rows in new.items():
        times.setdefault(workload, {}).update(by_rows)


def write_times(identity: Mapping[str, Any], new: Times) -> str | None:
    """Add to the file of this device, atomically; None, or why it could not be written (that is no failure).

    Two processes that write at once: each writes a whole file, the later one's is kept, and what it lacks of the
    other's is measured again.
    """
    times = read_times(identity)
    _merge_(times, new)
    data = {
        "format": FORMAT,
        "device": dict(identity),
        "times": {
            workload: {
                str(rows): {kernel: sample.to_list() for kernel, sample in kernels.items()}
                for rows, kernels in sorted(by_rows.items())
            }
            for workload, by_rows in sorted(times.items())
        },
    }
    why = "neither the user's cache nor a temporary folder can be written"
    for folder in writable_folders(PART):
        path = folder / table_name(identity)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            why = str(error)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        else:
            return None
    return why


@cache
def kernels_version() -> str:
    """Of this package's own kernels: a hash of their sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h") and not path.name.startswith(("select", "choice")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@cache
def last_level_cache() -> int:
    """Bytes of the CPU's largest cache; 32 MiB where it does not say."""
    try:
        folder = Path("/sys/devices/system/cpu/cpu0/cache")
        sizes = [(path / "size").read_text().strip() for path in folder.glob("index*")]
        units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
        return max(int(size[:-1]) * units[size[-1]] for size in sizes)
    except (OSError, ValueError, KeyError):
        return 32 << 20


@cache
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "CPU implementer")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "cpu"


def _cuda_driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return None
