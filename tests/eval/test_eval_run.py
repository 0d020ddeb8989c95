"""Batching and evaluation on real small models: order, padding, limits, modes, errors."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from squeezoo.eval import get_task
from squeezoo.eval.data import batches, collate, collator
from squeezoo.eval.run import evaluate, predict, sample_rows
from squeezoo.eval.runner import Runner
from texts import WORDS, sentence_tokenizer
from tiny import ALL, TINY
from torch import nn

SST2, MRPC = get_task("glue/sst2"), get_task("glue/mrpc")


def _bert(num_labels: int) -> nn.Module:
    model = TINY["bert"]()
    torch.manual_seed(1)
    model.classifier = nn.Linear(32, num_labels)
    return model.eval()


def _rows(count: int, seed: int = 0) -> list[Any]:
    """Sentences of 1 to 12 random letters with random labels."""
    draw = random.Random(seed)
    return [
        {"texts": (" ".join(draw.choices(WORDS, k=draw.randint(1, 12))),), "label": draw.randint(0, 1)}
        for _ in range(count)
    ]


def _folder(tmp_path: Path, rows: list[Any]) -> Path:
    (tmp_path / "SST-2").mkdir(exist_ok=True)
    lines = [f"{row['texts'][0]}\t{row['label']}" for row in rows]
    (tmp_path / "SST-2" / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines]), encoding="utf-8")
    return tmp_path


def test_collate_pads_to_the_longest() -> None:
    """By hand: pad id 9, everything else of a token 0; a multiple of 4 rounds 3 up to 4."""
    features: list[Any] = [
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": 1},
        {"input_ids": [4], "attention_mask": [1], "labels": 0},
    ]
    batch = collate(features, 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert collate(features, 9, 4)["input_ids"].tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]
    with pytest.raises(ValueError, match="padding token"):
        collate(features, None)
    with pytest.raises(ValueError, match="number 1"):
        collate([features[0], {"input_ids": [1]}])
    with pytest.raises(ValueError, match="at least one"):
        collate([])


def test_collate_fills_each_kind_of_value() -> None:
    """By hand: labels of tokens with -100, waveforms with 0, prompts on the left; keys with ``_`` stay out."""
    features: list[Any] = [
        {"input_ids": [1, 2], "decoder_input_ids": [7], "attention_mask": [1, 1], "labels": [5], "_row": 0},
        {"input_ids": [3], "decoder_input_ids": [8, 9], "attention_mask": [1], "labels": [6, 6], "_row": 1},
    ]
    batch = collate(features, 4)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2], [3, 4]],
        "decoder_input_ids": [[7, 4], [8, 9]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [[5, -100], [6, 6]],
    }
    left = collate(features, 4, side="left")
    assert left["input_ids"].tolist() == [[1, 2], [4, 3]]
    assert left["attention_mask"].tolist() == [[1, 1], [0, 1]]
    sounds = [{"input_values": torch.tensor([1.0, 2.0])}, {"input_values": torch.tensor([3.0])}]
    assert collate(sounds)["input_values"].tolist() == [[1.0, 2.0], [3.0, 0.0]]


def test_collator_takes_the_tokenizers_padding_token() -> None:
    """A tokenizer whose padding token has the id 1; for images there is nothing to pad."""
    tokenizer = sentence_tokenizer()
    tokenizer.pad_token = "[UNK]"
    assert collator(tokenizer)([{"input_ids": [5, 6]}, {"input_ids": [5]}])["input_ids"].tolist() == [[5, 6], [5, 1]]
    images: list[Any] = [{"pixel_values": torch.zeros(1, 8, 8), "labels": 0}]
    assert collator(None)(images)["pixel_values"].shape == (1, 1, 8, 8)


def test_batches_hold_each_row_once_longest_first() -> None:
    """By hand: lengths 1 3 2 3 in batches of 2 are (1, 3), (2, 0)."""
    features: list[Any] = [{"input_ids": [0] * length} for length in (1, 3, 2, 3)]
    assert [indices for indices, _ in batches(features, 2)] == [[1, 3], [2, 0]]
    assert [indices for indices, _ in batches(features, 4, max_tokens=6)] == [[1, 3], [2, 0]]
    assert [indices for indices, _ in batches(features, 4, max_tokens=2)] == [[1], [3], [2], [0]]
    waves: list[Any] = [{"input_values": torch.zeros(length)} for length in (2, 5)]
    assert [indices for indices, _ in batches(waves, 1)] == [[1], [0]]
    with pytest.raises(ValueError, match="batch_size"):
        next(batches(features, 0))


@pytest.mark.parametrize("batch_size", [3, 8, 64])
def test_batched_equals_single(batch_size: int) -> None:
    """Reference: the model called by hand on one unpadded row at a time."""
    model = _bert(2)
    features = SST2.encode(_rows(41), sentence_tokenizer(), 128)
    with torch.no_grad():
        single = [
            model(**{k: torch.tensor([v]) for k, v in f.items() if k != "labels"}).logits[0].tolist() for f in features
        ]
    logits = predict(model, features, batch_size, processor=sentence_tokenizer())
    torch.testing.assert_close(logits, torch.tensor(single), atol=1e-5, rtol=1e-4)
    assert not logits.is_inference()


def test_order_of_rows_does_not_matter(tmp_path: Path) -> None:
    """The same rows shuffled give the same score, and that score is the share of right answers counted by hand."""
    model, tokenizer, rows = _bert(2), sentence_tokenizer(), _rows(60)
    (score,) = evaluate(model, SST2, tokenizer, data_dir=_folder(tmp_path, rows), batch_size=7, seed=4)
    right = 0
    for row in rows:
        with torch.no_grad():
            right += int(model(**tokenizer(row["texts"][0], return_tensors="pt")).logits.argmax()) == row["label"]
    assert score.value == right / 60
    assert 0 < right < 60
    for seed in (1, 2):
        shuffled = random.Random(seed).sample(rows, len(rows))
        again = evaluate(model, SST2, tokenizer, data_dir=_folder(tmp_path, shuffled), batch_size=7, seed=4)
        assert again == (score,)


def test_score_carries_its_conditions(tmp_path: Path) -> None:
    """A file of 60 rows is not the official dev set of 872, so the score is a sample; default split, settings."""
    (score,) = evaluate(_bert(2), "glue/sst2", sentence_tokenizer(), data_dir=_folder(tmp_path, _rows(60)))
    assert (score.task, score.task_version, score.split, score.metric) == ("glue/sst2", 1, "dev", "accuracy")
    assert (score.samples, score.complete, score.higher_is_better) == (60, False, True)
    assert score.libraries["torch"] == torch.__version__
    assert score.settings == {"max_length": 128}


def test_images_are_complete_unless_limited() -> None:
    """digits has 362 test rows; the model itself says its image size."""
    model = TINY["timm_vit"]()
    model.head = nn.Linear(32, 10)
    whole, top5 = evaluate(model, "digits", None)
    assert (whole.metric, top5.metric) == ("accuracy", "top5")
    assert (whole.samples, whole.complete, whole.settings) == (362, True, {})
    part, _ = evaluate(model, "digits", None, limit=50)
    assert (part.samples, part.complete) == (50, False)
    assert evaluate(model, "digits", None, limit=10_000) == (whole, top5)


def test_sample_is_fixed_and_nested() -> None:
    """The sample of 10 is part of the sample of 20, in row order, the same on every call, not just the first rows."""
    rows: list[Any] = [{"label": i} for i in range(100)]
    ten, twenty = ([row["label"] for row in sample_rows(rows, n)] for n in (10, 20))
    assert set(ten) < set(twenty)
    assert ten == sorted(ten) == [row["label"] for row in sample_rows(rows, 10)]
    assert ten != list(range(10))
    assert len(twenty) == 20
    assert sample_rows(rows, None) is rows
    with pytest.raises(ValueError, match="limit"):
        sample_rows(rows, 0)


def test_two_metrics_primary_first(tmp_path: Path) -> None:
    """GLUE reports F1 and accuracy of MRPC; F1 is the primary one here."""
    (tmp_path / "MRPC").mkdir()
    text = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\ta b\tb c\n0\t3\t4\tc\td e f\n"
    (tmp_path / "MRPC" / "dev.tsv").write_text(text, encoding="utf-8")
    scores = evaluate(_bert(2), MRPC, sentence_tokenizer(), data_dir=tmp_path)
    assert [score.metric for score in scores] == ["f1", "accuracy"]


def test_modes_are_restored() -> None:
    """A model in training with one frozen module in evaluation mode comes back exactly so."""
    model = _bert(2).train()
    model.bert.encoder.layer[0].eval()
    before = [module.training for module in model.modules()]
    first = predict(model, SST2.encode(_rows(5), sentence_tokenizer(), 128), processor=sentence_tokenizer())
    assert [module.training for module in model.modules()] == before
    second = predict(model, SST2.encode(_rows(5), sentence_tokenizer(), 128), processor=sentence_tokenizer())
    assert torch.equal(first, second)  # dropout was off


def test_errors_before_a_number_is_made(tmp_path: Path) -> None:
    """Wrong width of the head, NaN weights, unknown split, no rows: a message and no score."""
    folder, tokenizer = _folder(tmp_path, _rows(6)), sentence_tokenizer()
    with pytest.raises(ValueError, match=r"needs logits \[rows, 2\].*\[6, 3\].*num_labels=2"):
        evaluate(_bert(3), SST2, tokenizer, data_dir=folder)
    broken = _bert(2)
    nn.init.constant_(broken.classifier.weight, float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite logits for 6 rows"):
        evaluate(broken, SST2, tokenizer, data_dir=folder)
    with pytest.raises(ValueError, match="the official split 'test' has no public labels"):
        evaluate(_bert(2), SST2, tokenizer, split="test", data_dir=folder)
    with pytest.raises(ValueError, match="no features"):
        predict(_bert(2), [])


def test_runner_restores_the_order_and_hands_over_targets() -> None:
    """``function`` sees length-sorted batches; results come back in the order of the features."""
    features: list[Any] = [{"input_ids": [i] * length, "labels": i} for i, length in enumerate((1, 5, 2, 4, 3))]
    seen: list[list[int]] = []

    def function(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[int]:
        assert not model.training
        assert torch.is_inference_mode_enabled()
        seen.append(batch["labels"].tolist())
        return (10 * batch["input_ids"][:, 0]).tolist()

    runner = Runner(_bert(2).train(), sentence_tokenizer(), batch_size=2)
    assert runner.map(features, function) == [0, 10, 20, 30, 40]
    assert seen == [[1, 3], [4, 2], [0]]
    assert runner.model.training
    with pytest.raises(ValueError, match="expected 2 results for a batch of as many rows, found 1"):
        runner.map(features, lambda model, batch: [0])
    with pytest.raises(ValueError, match="no features"):
        runner.map([], function)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_generated_texts_do_not_depend_on_the_batch(name: str) -> None:
    """Reference: ``generate`` on one prompt at a time without padding."""
    model: Any = ALL[name]()
    draw = random.Random(1)
    features: list[Any] = []
    for length in (3, 7, 5, 4):
        ids = [draw.randint(4, 127) for _ in range(length)]
        features.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids})
    how: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, pad_token_id=1)
    runner = Runner(model, sentence_tokenizer(), batch_size=4)
    together = runner.generate(features, **how)
    for feature, tokens in zip(features, together, strict=True):
        with torch.no_grad():
            alone = model.generate(
                input_ids=torch.tensor([feature["input_ids"]]),
                attention_mask=torch.ones(1, len(feature["input_ids"])),
                **how,
            )[0].tolist()
        alone = alone if name == "bart" else alone[len(feature["input_ids"]) :]
        assert [t for t in tokens if t != 1] == [t for t in alone if t != 1]
    with pytest.raises(ValueError, match="BertForSequenceClassification writes no text"):
        Runner(_bert(2), None).generate(features)


def test_task_with_its_own_predictions(tmp_path: Path) -> None:
    """``predict`` gets rows and settings, and what it writes into the settings is in the scores; ``opposite`` metrics
    point the other way; rows may bring settings of their own."""
    rows = [{"label": 3, "settings": {"text": "raw"}}, {"label": 4, "settings": {"text": "raw"}}]

    def predict_lengths(runner: Runner, given: Any) -> list[int]:
        runner.settings["window"] = 7 * int(runner.settings["window"])
        return [row["label"] + 1 for row in given]

    task = replace(
        SST2, rows=lambda split, folder: rows, predict=predict_lengths, settings={"window": 2}, metric="up",
        score=lambda found, labels: {"down": float(sum(labels)), "up": float(sum(found))}, opposite=("down",),
    )  # fmt: skip
    up, down = evaluate(_bert(2), task, None, settings={"window": 3}, max_length=9)
    assert (up.metric, up.value, up.higher_is_better) == ("up", 9.0, True)
    assert (down.metric, down.value, down.higher_is_better) == ("down", 7.0, False)
    assert up.settings == {"max_length": 9, "window": 21, "text": "raw"}
