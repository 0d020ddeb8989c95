"""Which adapter serves a model: the built-in table and adapters from installed packages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
from squeezoo.models import ADAPTERS, AdapterError, adapter_for, adapter_named, all_adapters, find_sites, model_type_of
from torch import nn


class Mine(nn.Module):
    """A model of no library."""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, entry_points: str, code: str) -> None:
    """What pip leaves behind for a pure Python package: its module and its dist-info folder, on sys.path."""
    (folder / f"{package}_module.py").write_text(code)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[squeezoo.adapters]\n{entry_points}\n")
    monkeypatch.syspath_prepend(str(folder))


PLUGIN = """
import torch
from squeezoo.models.adapter import Adapter, AttentionSite, GemmSite

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        block = lambda: torch.nn.ModuleDict({"up": torch.nn.Linear(8, 16), "down": torch.nn.Linear(16, 8)})
        self.stack = torch.nn.ModuleList([block(), block(), block()])

ADAPTER = Adapter(
    name=NAME, model_types=(TYPE,), library="torch>=2", block=r"stack\\.(\\d+)",
    gemms=(GemmSite("up", "ffn_up"), GemmSite("down", "ffn_down")),
    attention=(), final_projection=None, per_block=2,
)
"""


def plugin(name: str, model_type: str) -> str:
    return f"NAME, TYPE = {name!r}, {model_type!r}\n{PLUGIN}"


@pytest.mark.parametrize(
    ("name", "model_type"), [("bert", "bert"), ("mbart", "mbart"), ("timm_vit", "timm.VisionTransformer")]
)
def test_model_type(name: str, model_type: str) -> None:
    """transformers' config.model_type, timm's class name."""
    model = tiny.ALL[name]()
    assert model_type_of(model) == model_type
    assert adapter_for(model).name == tiny.ROWS[name].adapter


def test_unknown_model_type() -> None:
    """The message names the type, the known ones and both ways to add one."""
    with pytest.raises(AdapterError) as caught:
        adapter_for(Mine())
    known = ("bert", "vit", "timm.VisionTransformer", "timm.VisionTransformerDistilled")
    for word in ("Mine'", *known, "models/bert.py", "models/__init__.py", "entry point", "squeezoo.adapters"):
        assert word in str(caught.value)


def test_plugin_adapter_serves_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of one's own adds an architecture: its entry point alone is enough, nothing of ours is edited."""
    code = plugin("plugged", "plugged_pkg_module.Net")
    install(tmp_path, monkeypatch, "plugged_pkg", "plugged = plugged_pkg_module:ADAPTER", code)
    import plugged_pkg_module

    assert list(all_adapters()) == [*(adapter.name for adapter in ADAPTERS), "plugged"]
    assert adapter_named("plugged") is plugged_pkg_module.ADAPTER
    model = plugged_pkg_module.Net()
    sites = find_sites(model, adapter_for(model))
    assert [gemm.name for gemm in sites.gemms[:2]] == ["stack.0.up", "stack.0.down"]
    assert len(sites.gemms) == 6


@pytest.mark.parametrize(
    ("package", "value", "code", "message"),
    [
        (
            "boom_pkg",
            "boom_pkg_module:ADAPTER",
            "import no_such_module_at_all",
            "ModuleNotFoundError.*Repair or uninst",
        ),
        ("gone_pkg", "gone_pkg_module:MISSING", "", "does not load: AttributeError"),
        ("list_pkg", "list_pkg_module:ADAPTER", "ADAPTER = [1]", "is a list, expected a squeezoo.models.Adapter"),
        ("twin_pkg", "twin_pkg_module:ADAPTER", plugin("bert", "twin"), "two adapters have the name 'bert'"),
        ("type_pkg", "type_pkg_module:ADAPTER", plugin("other", "bert"), "two adapters have the model type 'bert'"),
    ],
)
def test_bad_plugin_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, value: str, code: str, message: str
) -> None:
    """One clear error that names the package at fault."""
    install(tmp_path, monkeypatch, package, f"bad = {value}", code)
    with pytest.raises(AdapterError, match=message) as caught:
        all_adapters()
    assert re.search(rf"\b{package}\b", str(caught.value))


def test_broken_plugin_does_not_stop_built_in_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in is imported only when it is asked for: BERT goes on working beside one that cannot be imported."""
    install(tmp_path, monkeypatch, "broken_pkg", "bad = broken_pkg_module:ADAPTER", "raise RuntimeError('half done')")
    assert adapter_for(tiny.TINY["bert"]()).name == adapter_named("bert").name == "bert"
    for ask in (lambda: adapter_for(Mine()), lambda: adapter_named("theirs")):
        with pytest.raises(AdapterError, match=r"broken_pkg.*RuntimeError: half done"):
            ask()


def test_unknown_name() -> None:
    """Loading a checkpoint of a plug-in's architecture without the plug-in says what is missing."""
    with pytest.raises(AdapterError, match=r"no adapter is named 'nobody'. Known: bert.*plug-in"):
        adapter_named("nobody")
