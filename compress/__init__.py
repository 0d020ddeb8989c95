"""What is done to a model: recipes, plans, stages, checkpoints.

The package can be called: ``squeezoo.compress(model, recipe, data, out)`` is `squeezoo.compress.engine.compress`. One
name stands for both, because a function of that name would vanish behind the package at its first import.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from .engine import compress

        return compress(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
