"""The torchvision mend, each case in a fresh interpreter: operators are declared once per process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

GUARD = "from squeezoo.models.torchvision_guard import ensure_torchvision_importable as ensure, _mend\n"
HAS_NMS = "hasattr(torch.ops.torchvision, 'nms')"


def run(code: str, *path: Path) -> str:
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([*map(str, path), os.environ.get("PYTHONPATH", "")]))
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_timm_and_transformers_import_after_the_guard() -> None:
    """Whatever torchvision is installed here, intact or built for another torch: both libraries import."""
    code = GUARD + (
        "ensure(); ensure()\n"
        "import timm, timm.data, torchvision, transformers\n"
        "ensure()\n"
        "from transformers import ViTForImageClassification\n"
        "print(timm.create_model('vit_tiny_patch16_224', img_size=32).num_classes)"
    )
    assert run(code) == "1000"


def test_declares_the_operators_where_the_compiled_ones_are_missing(tmp_path: Path) -> None:
    """A torchvision without a loadable _C: `nms` and `qnms` exist, have the right schema, and raise when called."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_C.so").write_bytes(b"not a library")
    code = GUARD + (
        "import torch\n"
        f"assert not {HAS_NMS}\n"
        "ensure(); ensure()\n"
        "torch.library.register_fake('torchvision::nms', lambda dets, scores, iou_threshold: dets)\n"
        "print(torch.ops.torchvision.nms.default._schema); torch.ops.torchvision.qnms\n"
        "try: torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)\n"
        "except NotImplementedError: print('raises')"
    )
    schema, raises = run(code, tmp_path).splitlines()
    assert schema == "torchvision::nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    assert raises == "raises"


def test_leaves_an_intact_torchvision_alone(tmp_path: Path) -> None:
    """A _C that loads (any shared library does, here torch's own): nothing is declared in its name."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_C.so").symlink_to(torch._C.__file__)
    assert run(GUARD + f"import torch; ensure(); print(_mend(), {HAS_NMS})", tmp_path) == "None False"


def test_does_nothing_without_torchvision() -> None:
    """torchvision hidden from the import system, as on a machine that lacks it."""
    code = GUARD + (
        "import sys, torch\n"
        "class Hidden:\n"
        "    def __init__(self, finder): self.finder = finder\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        return None if name == 'torchvision' else self.finder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]\n"
        f"ensure(); print(_mend(), {HAS_NMS})"
    )
    assert run(code) == "None False"
