"""Every kind of text task trains on the engine's own loop: the data has what its losses need."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from squeezoo.compress.finetune import finetune_
from squeezoo.compress.stages import Finetune
from squeezoo.eval.augment import shift_one_pixel
from squeezoo.pipeline import training_data
from texts import SPECIAL, WORDS
from tiny import ALL
from torch import nn


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """The Trainer collects garbage over all imported modules; tiny models gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def _tokenizer() -> Any:
    """Letters, BERT's template, a mask token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *WORDS, "[MASK]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def _write(folder: Path, name: str, lines: list[str]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _data(folder: Path) -> Path:
    """Files for each task below: sixteen rows, or a page of 480 letters."""
    letters = " ".join(WORDS * 20)
    _write(folder, "wikitext-2/wiki.train.tokens", [" = A = ", f" {letters} "])
    _write(folder, "STS-B/sts-train.csv", [f"g\tf\t1\t{i}\t{i % 6}\t{'a ' * (i + 1)}\tb" for i in range(16)])
    _write(folder, "SST-2/train.tsv", ["sentence\tlabel", *(f"{'a b ' * (i + 1)}\t{i % 2}" for i in range(16))])
    _write(folder, "wnut17/train.conll", [line for i in range(16) for line in ["a\tO"] * (i + 1) + ["b\tB-person", ""]])
    return folder


def _model(name: str, labels: int | None) -> Any:
    model: Any = ALL[name]()
    if labels is not None:
        model.classifier = nn.Linear(32, labels)
        model.num_labels = model.config.num_labels = labels
    return model


def _train(name: str, labels: int | None, task: str, folder: Path, out: Path) -> tuple[nn.Module, dict[str, Any]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(name, labels)
        data = training_data(task, _tokenizer(), data_dir=folder, max_length=24, model=model)
        stage = Finetune(stage="finetune", steps=6, learning_rate=1e-3, batch_size=4)
        return model, finetune_(model, stage, data, out, seed=1)


@pytest.mark.parametrize(
    ("name", "labels", "task"),
    [
        ("bert", 2, "glue/sst2"),
        ("bert", 1, "glue/stsb"),
        ("bert_token", 13, "wnut17"),
        ("gpt2", None, "wikitext2/token"),
        ("bert_mlm", None, "wikitext2/masked"),
    ],
)
def test_every_kind_trains(tmp_path: Path, name: str, labels: int | None, task: str) -> None:
    """Six steps with a finite loss change every block; the same seed gives the same weights bit for bit, masks of
    hidden words included."""
    folder = _data(tmp_path / "data")
    model, found = _train(name, labels, task, folder, tmp_path / "a")
    assert 0 < found["loss"] < 20
    assert found["steps"] == 6
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = _model(name, labels).state_dict()
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert len(moved) > len(before) / 2
    again, _ = _train(name, labels, task, folder, tmp_path / "b")
    state = copy.deepcopy(again.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_length_defaults(tmp_path: Path) -> None:
    """The paper's length where the user says none (128 for GLUE), never more than the model's context (64 here)."""
    folder = _data(tmp_path)
    _write(folder, "SST-2/train.tsv", ["sentence\tlabel", f"{'a ' * 300}\t1"])
    assert training_data("glue/sst2", _tokenizer(), data_dir=folder).lengths() == [128]
    model = _model("bert", 2)
    assert training_data("glue/sst2", _tokenizer(), data_dir=folder, model=model).lengths() == [64]
    assert training_data("glue/sst2", _tokenizer(), data_dir=folder, model=model, max_length=9).lengths() == [9]


def test_split_and_augmentation() -> None:
    """Any labelled split may be trained or calibrated on; images keep their augmentation."""
    assert len(training_data("digits", None).features) == 1_080
    data = training_data("digits", None, split="validation", limit=20)
    assert len(data.features) == 20
    assert data.augment is shift_one_pixel
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        training_data("digits", None, split="dev")
