"""Squeezoo: a model zoo of compressed transformers and the engine that fills it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compress.checkpoint import load, verify
    from .compress.recipe import Recipe
    from .eval.run import evaluate
    from .eval.speed import benchmark
    from .models.adapter import Adapter
    from .zoo_cards.hub import list_models

__version__ = "0.1.0"

_PUBLIC = {
    "load": "compress.checkpoint",
    "verify": "compress.checkpoint",
    "Recipe": "compress.recipe",
    "evaluate": "eval.run",
    "benchmark": "eval.speed",
    "Adapter": "models.adapter",
    "list_models": "zoo_cards.hub",
}
__all__ = ["Adapter", "Recipe", "benchmark", "evaluate", "list_models", "load", "verify"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import squeezoo`` costs nothing."""
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
