"""Dense models written as ordinary folders and read back, by us and by their own library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from squeezoo.models.dense import (
    DenseError,
    example_batch,
    load_dense,
    load_processor,
    logits,
    save_config,
    save_dense,
)
from torch import nn
from torch.nn.utils import parametrize


def bert_tokenizer(folder: Path) -> Any:
    """A WordPiece tokenizer of 12 words."""
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "##s", "very", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    return BertTokenizer(str(folder / "vocab.txt"))


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    """What save_dense writes for the tiny BERT."""
    folder = tmp_path / "tiny-bert"
    save_dense(tiny.TINY["bert"](), None, folder)
    return folder


def scores(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return logits(model, tiny.tiny_batch(name))


@pytest.mark.parametrize("name", list(tiny.TINY))
def test_saved_folder_loads_back_equal(name: str, tmp_path: Path) -> None:
    """Same outputs to the bit through our reader: float32 weights survive safetensors unchanged."""
    model = tiny.TINY[name]()
    save_dense(model, None, tmp_path / "saved")
    dense = load_dense(tmp_path / "saved")
    assert (dense.name, dense.revision, dense.processor) == ("saved", None, None)
    assert dense.library == ("timm" if name == "timm_vit" else "transformers")
    assert not dense.model.training
    assert type(dense.model) is type(model)
    assert torch.equal(scores(dense.model, name), scores(model, name))
    assert not list(tmp_path.glob(".*"))  # no scratch folder stays behind


def test_saved_folder_is_the_librarys_own(tmp_path: Path) -> None:
    """transformers' from_pretrained and timm's local-dir read it without us and give the same outputs."""
    import timm
    from transformers import AutoModelForSequenceClassification

    bert, vit = tiny.TINY["bert"](), tiny.TINY["timm_vit"]()
    save_dense(bert, None, tmp_path / "bert")
    save_dense(vit, None, tmp_path / "vit")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    assert torch.equal(scores(theirs, "bert"), scores(bert, "bert"))
    theirs = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
    assert torch.equal(scores(theirs, "timm_vit"), scores(vit, "timm_vit"))
    for folder in ("bert", "vit"):
        text = (tmp_path / folder / "config.json").read_text()
        assert str(tmp_path) not in text  # no path of this machine


def test_tokenizer_and_image_processor_travel(tmp_path: Path) -> None:
    """The processor in the folder works as the one that was saved: token ids are line numbers of its vocabulary."""
    from transformers import ViTImageProcessor

    tokenizer = bert_tokenizer(tmp_path)
    save_dense(tiny.TINY["bert"](), tokenizer, tmp_path / "bert")
    again = load_dense(tmp_path / "bert").processor
    assert again("a very good film.")["input_ids"] == [2, 5, 10, 6, 8, 11, 3]  # lines of the vocabulary
    assert load_processor(tmp_path / "bert")("bad films")["input_ids"] == [2, 7, 8, 9, 3]

    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1] * 3, image_std=[0.7] * 3)
    save_dense(tiny.TINY["vit"](), processor, tmp_path / "vit")
    assert list(load_dense(tmp_path / "vit").processor.image_mean) == [0.1] * 3
    save_dense(tiny.TINY["timm_vit"](), None, tmp_path / "timm")
    assert load_processor(tmp_path / "timm") is None
    with pytest.raises(DenseError, match="no folder"):
        load_processor(tmp_path / "nowhere")


def test_save_refuses(tmp_path: Path) -> None:
    """An attached model, a directory of other things, a model of no library: refused before anything is written."""
    model = tiny.TINY["bert"]()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("do not lose me")
    with pytest.raises(DenseError, match="no model folder"):
        save_dense(model, None, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "do not lose me"
    with pytest.raises(DenseError, match=r"transformers model .* or a timm model .*found torch\.nn.*Linear"):
        save_dense(nn.Linear(2, 2), None, tmp_path / "linear")
    unknown = tiny.TINY["timm_vit"]()
    unknown.squeezoo_model_args = {**tiny.TIMM_ARGS, "depth": 5}
    with pytest.raises(DenseError, match="cannot be rebuilt"):
        save_dense(unknown, None, tmp_path / "unknown")
    parametrize.register_parametrization(model.classifier, "weight", nn.Identity())
    with pytest.raises(DenseError, match=r"still attached \(classifier\.parametrizations.*fold it"):
        save_dense(model, None, tmp_path / "attached")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


class FullDisk:
    """A processor whose files no longer fit."""

    def save_pretrained(self, folder: Path) -> None:
        raise OSError(28, "No space left on device")


def test_failed_save_keeps_the_old_folder(bert_folder: Path) -> None:
    """The disk fills up while the new folder is written: the old one is untouched. A good save then replaces it."""
    before = {path.name: path.read_bytes() for path in bert_folder.iterdir()}
    changed = tiny.TINY["bert"]()
    nn.init.ones_(changed.classifier.weight)
    with pytest.raises(OSError, match="No space left"):
        save_dense(changed, FullDisk(), bert_folder)
    assert {path.name: path.read_bytes() for path in bert_folder.iterdir()} == before
    assert [path.name for path in bert_folder.parent.iterdir()] == [bert_folder.name]

    (bert_folder / "stale.txt").write_text("of the earlier model")
    save_dense(changed, None, bert_folder)
    assert set(before) == {path.name for path in bert_folder.iterdir()}
    assert torch.equal(load_dense(bert_folder).model.classifier.weight, changed.classifier.weight)


@pytest.mark.parametrize("name", list(tiny.TINY))
def test_config_alone_and_example_batch(name: str, tmp_path: Path) -> None:
    """save_config writes the same config.json as save_dense; example_batch is something that the model takes."""
    model = tiny.TINY[name]()
    save_dense(model, None, tmp_path / "whole")
    save_config(model, tmp_path)
    ours, whole = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "whole"))
    assert {**ours, "dtype": 0} == {**whole, "dtype": 0}
    batch = example_batch(model)
    assert logits(model, batch).shape == (2, tiny.LABELS)
    assert all(torch.equal(value, example_batch(model)[key]) for key, value in batch.items())
    if name == "bert":
        assert batch["attention_mask"].sum(1).tolist() == [16, 8]
        assert example_batch(model, padded=False)["attention_mask"].all()
