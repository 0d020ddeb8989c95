"""What a checkpoint was made with."""

from __future__ import annotations

import importlib.metadata


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a checkpoint computes."""
    versions = {}
    for name in ("squeezoo", "torch", "transformers", "timm", "safetensors", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
