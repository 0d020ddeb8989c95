"""Lets torchvision be imported beside a PyTorch build that its compiled operators were not made for.

The torchvision wheel on PyPI is a CUDA build. Beside a CPU-only torch its ``_C`` library cannot be loaded, and then
``import torchvision`` itself fails with "operator torchvision::nms does not exist", and with it every import of timm,
of torchmetrics and of the transformers models, none of which needs these operators.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import torch

_NAMES = ("nms", "qnms")
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def ensure_torchvision_importable() -> None:
    """Declare torchvision's ``nms`` and ``qnms`` operators, only when its own compiled ones cannot be loaded.

    Call it before importing timm, torchmetrics or a transformers model. It costs one attempt to load a shared library,
    may be called any number of times, and does nothing when torchvision is absent, already imported or intact. The
    declared operators have no implementation: calling one of them raises.
    """
    if "torchvision" not in sys.modules:
        _mend()


@cache  # the cache keeps the Library alive: its operators vanish with it
def _mend() -> torch.library.Library | None:
    spec = find_spec("torchvision")
    if spec is None or spec.submodule_search_locations is None or _compiled_operators_load(spec):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _NAMES:
        if not hasattr(torch.ops.torchvision, name):  # a script may have applied the same mend before us
            library.define(name + _SIGNATURE)
    return library


def _compiled_operators_load(spec: ModuleSpec) -> bool:
    """Whether torchvision's ``_C`` library exists and loads: the same attempt that ``import torchvision`` will make."""
    for folder in spec.submodule_search_locations or ():
        for suffix in EXTENSION_SUFFIXES:
            path = Path(folder) / f"_C{suffix}"
            if path.is_file():
                try:
                    torch.ops.load_library(str(path))
                except OSError:
                    return False
                return True
    return False
