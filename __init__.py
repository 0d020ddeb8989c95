"""Squeezoo: a model zoo of compressed transformers and the engine that fills it.

    import squeezoo
    model = squeezoo.load("digits-vit.digits.gpusq-gemm-int8")

Public names are imported on first use, so that ``import squeezoo`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import compress
    from .compress.recipe import Recipe
    from .compress.train_data import TrainData
    from .eval.run import evaluate
    from .eval.speed import benchmark
    from .models.adapter import Adapter
    from .models.dense import load_dense
    from .zoo_cards.hub import list_models, load, load_processor, verify

__version__ = "0.1.0"

_HOME = {
    "Adapter": "models.adapter",
    "Recipe": "compress.recipe",
    "TrainData": "compress.train_data",
    "benchmark": "eval.speed",
    "evaluate": "eval.run",
    "list_models": "zoo_cards.hub",
    "load": "zoo_cards.hub",
    "load_dense": "models.dense",
    "load_processor": "zoo_cards.hub",
    "verify": "zoo_cards.hub",
}
__all__ = [
    "Adapter",
    "Recipe",
    "TrainData",
    "benchmark",
    "compress",
    "evaluate",
    "list_models",
    "load",
    "load_dense",
    "load_processor",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name == "compress":  # a package that can be called, see there
        return import_module(".compress", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
