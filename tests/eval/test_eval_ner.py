"""Named entities: column files, tags of words at their first sub-token, and entity scores by seqeval."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from squeezoo.eval import files, get_task, metrics, ner
from squeezoo.eval.run import evaluate
from squeezoo.models.dense import logits
from squeezoo.pipeline import training_data
from texts import sentence_tokenizer
from tiny import ALL
from torch import nn

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "metrics.json").read_text(encoding="utf-8"))
WNUT = "a\tO\nb\tB-person\nc\tI-person\n\t\nd\tO\n\n\ne\tB-location\n\ufeff\n"
CONLL = (
    "-DOCSTART- -X- -X- O\n\nEU NNP B-NP I-ORG\nrejects VBZ B-VP O\nGerman JJ B-NP I-MISC\n\n"
    "Peter NNP B-NP I-PER\nBlackburn NNP I-NP I-PER\nBonn NNP I-NP B-PER\nLeeds NNP B-NP I-LOC\n"
)


def _wnut(tmp_path: Path, text: str = WNUT, split: str = "test") -> Path:
    (tmp_path / "wnut17").mkdir(exist_ok=True)
    (tmp_path / "wnut17" / f"{split}.conll.xz").write_bytes(lzma.compress(text.encode()))
    return tmp_path


def _model(labels: int = 13) -> Any:
    model: Any = ALL["bert_token"]()
    torch.manual_seed(3)
    model.classifier = nn.Linear(32, labels)
    model.num_labels = model.config.num_labels = labels
    return model.eval()


def test_column_file(tmp_path: Path) -> None:
    """Sentences end at lines without characters, be they empty, a lone tab or a byte order mark (WNUT-2017 has all)."""
    rows = get_task("wnut17").rows("test", _wnut(tmp_path))
    assert rows == [
        {"words": ("a", "b", "c"), "tags": ("O", "B-person", "I-person")},
        {"words": ("d",), "tags": ("O",)},
        {"words": ("e",), "tags": ("B-location",)},
    ]


@pytest.mark.parametrize("name", ["valid.txt", "eng.testa"])
def test_conll2003(tmp_path: Path, name: str) -> None:
    """Four columns, -DOCSTART- left out, IOB1 turned into IOB2 by hand: I- begins an entity unless one of its type is
    open."""
    (tmp_path / "conll2003").mkdir()
    (tmp_path / "conll2003" / name).write_text(CONLL, encoding="utf-8")
    rows = get_task("conll2003").rows("valid", tmp_path)
    assert [row["tags"] for row in rows] == [("B-ORG", "O", "B-MISC"), ("B-PER", "I-PER", "B-PER", "B-LOC")]
    assert rows[0]["words"] == ("EU", "rejects", "German")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tO\nb\n", r"test\.conll\.xz:2: expected a token and its tag in columns, found 'b'"),
        ("a\tO\nb\tB-persn\n", r"test\.conll\.xz:2: unknown tag 'B-persn': expected one of O, B-corporation"),
        ("a\tO\n\tO\n", r":2: expected a token"),
        ("\n\n", r":1: expected sentences, found none"),
    ],
)
def test_broken_lines(tmp_path: Path, text: str, message: str) -> None:
    """File and line, counted by hand."""
    with pytest.raises(files.DataError, match=message):
        get_task("wnut17").rows("test", _wnut(tmp_path, text))


def test_labels_stand_at_first_sub_tokens() -> None:
    """By hand: "ab-c" is cut into three tokens by the tests' tokenizer, "(d)" too; only the first carries the tag."""
    rows: list[Any] = [{"words": ("x", "a-c", "(d)"), "tags": ("O", "B-person", "I-person")}]
    (feature,) = get_task("wnut17").encode(rows, sentence_tokenizer(), 128)
    labels = get_task("wnut17").label_names
    assert feature["_first"] == [1, 2, 5]
    expected = [-100, 0, labels.index("B-person"), -100, -100, labels.index("I-person"), -100, -100, -100]
    assert feature["labels"] == expected
    assert len(feature["input_ids"]) == 9


def test_truncated_words_have_no_token() -> None:
    """[CLS] x y [SEP] is all that four tokens hold; the words beyond are predicted O but scored."""
    rows: list[Any] = [{"words": ("x", "y", "z"), "tags": ("O", "O", "B-person")}]
    (feature,) = get_task("wnut17").encode(rows, sentence_tokenizer(), 4)
    assert feature["_first"] == [1, 2, None]


def test_byte_level_tokenizers_count_the_space_to_the_token() -> None:
    """Offsets as GPT-2's tokenizer gives them, the space inside the token; as RoBERTa's, without it: the same words."""
    words, text = ("ab", "c", "d"), "ab c d"
    assert ner.first_tokens(words, text, [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6)]) == [0, 2, 4]
    assert ner.first_tokens(words, text, [(0, 0), (0, 2), (3, 4), (5, 6), (0, 0)]) == [1, 2, 3]


def test_scores_of_a_model(tmp_path: Path) -> None:
    """Reference: the model called by hand on each sentence alone, tags compared by seqeval; equal at any batch size."""
    model, tokenizer, task = _model(), sentence_tokenizer(), get_task("wnut17")
    folder = _wnut(tmp_path)
    found = []
    for row in task.rows("test", folder):
        with torch.no_grad():
            scores_LC = logits(model, dict(tokenizer(" ".join(row["words"]), return_tensors="pt")))[0]
        found.append([task.label_names[int(c)] for c in scores_LC[1:-1].argmax(-1)])
    expected = metrics.entities(found, [row["tags"] for row in task.rows("test", folder)])
    for batch_size in (1, 3):
        scores = evaluate(model, task, tokenizer, data_dir=folder, batch_size=batch_size)
        assert {score.metric: score.value for score in scores} == expected
        assert [score.metric for score in scores] == ["f1", "precision", "recall", "token_accuracy"]
        assert scores[0].settings == {"max_length": 128}
    with pytest.raises(ValueError, match=r"needs logits \[rows, tokens, 13\], the model gives \[3, 5, 4\]"):
        evaluate(_model(4), task, tokenizer, data_dir=folder)
    with pytest.raises(ValueError, match="needs a model of kind 'token'"):
        evaluate(ALL["bert"](), task, tokenizer, data_dir=folder)


def test_entities_against_vectors() -> None:
    """Expected: vectors/metrics.json, made with seqeval (IOB2, default mode)."""
    found = metrics.entities(VECTORS["ner_pred"], VECTORS["ner_true"])
    for name, key in (("f1", "ner_f1"), ("precision", "ner_precision"), ("recall", "ner_recall")):
        assert found[name] == pytest.approx(VECTORS[key], rel=1e-6)
    assert found["token_accuracy"] == pytest.approx(VECTORS["ner_token_accuracy"], rel=1e-6)
    nothing = metrics.entities([["O", "O"]], [["B-X", "O"]])
    assert nothing == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "token_accuracy": 0.5}


def test_training_labels_are_padded(tmp_path: Path) -> None:
    """Labels of tokens, -100 at padding and at [CLS] and [SEP]; the number of a tag is its place among the labels."""
    data = training_data("wnut17", sentence_tokenizer(), data_dir=_wnut(tmp_path, split="train"), model=_model())
    batch = data.collate(list(data.features))
    names = get_task("wnut17").label_names
    person, inside, place = (names.index(tag) for tag in ("B-person", "I-person", "B-location"))
    assert batch["labels"].tolist() == [
        [-100, 0, person, inside, -100],
        [-100, 0, -100, -100, -100],
        [-100, place, -100, -100, -100],
    ]
    assert "_first" not in batch


def test_hub_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``tokens`` and ``ner_tags`` as class ids, whose names the data set's features tell, as the Hub has them."""
    import datasets

    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-person", "I-person"]))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": tags})
    table = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[0, 1]]}, features=features)
    monkeypatch.delenv("SQUEEZOO_DATA", raising=False)
    monkeypatch.setattr(files, "load_from_hub", lambda *args, **how: table)
    assert get_task("wnut17").rows("dev", None) == [{"words": ("a", "b"), "tags": ("O", "B-person")}]


@pytest.mark.data
def test_real_files(data_dir: Path) -> None:
    """Sentences and tokens of WNUT-2017 (the data folder's README and a count of its tags with grep). Derczynski et al.
    2017 give 1,079 entities of the test split too."""
    task = get_task("wnut17")
    rows = {split: task.rows(split, data_dir) for split in task.splits}
    assert {split: len(found) for split, found in rows.items()} == {"train": 3_394, "dev": 1_009, "test": 1_287}
    begins = {s: sum(tag.startswith("B-") for row in found for tag in row["tags"]) for s, found in rows.items()}
    assert begins == {"train": 1_975, "dev": 835, "test": 1_079}
    perfect = task.score([row["tags"] for row in rows["test"]], [row["tags"] for row in rows["test"]])
    assert set(perfect.values()) == {1.0}
    blind = task.score([["O"] * len(row["tags"]) for row in rows["test"]], [row["tags"] for row in rows["test"]])
    assert (blind["f1"], round(blind["token_accuracy"], 4)) == (0.0, round(21_654 / 23_394, 4))
