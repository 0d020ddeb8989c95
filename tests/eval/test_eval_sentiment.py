"""IMDb in its two forms, its halves, and its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from squeezoo.eval import files, get_task
from squeezoo.eval.run import sample_rows
from texts import sentence_tokenizer


def _parquet(tmp_path: Path, columns: dict[str, list[Any]], split: str = "test") -> Path:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "imdb").mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "imdb" / f"{split}.parquet")
    return tmp_path


def test_parquet_and_original_folder_give_the_same_rows(tmp_path: Path) -> None:
    """The original names its files <number>_<rating>.txt; number 10 comes after number 9."""
    folder = _parquet(tmp_path / "a", {"text": ["bad b", "bad c", "good"], "label": [0, 0, 1], "rating": [1, 2, 9]})
    expected = [{"texts": (text,), "label": label} for text, label in (("bad b", 0), ("bad c", 0), ("good", 1))]
    assert get_task("imdb").rows("test", folder) == expected
    original = tmp_path / "b" / "aclImdb" / "test"
    for name, text in (("neg/9_1", "bad b"), ("neg/10_2", "bad c"), ("pos/0_9", "good")):
        (original / name).parent.mkdir(parents=True, exist_ok=True)
        (original / f"{name}.txt").write_text(text, encoding="utf-8")
    assert get_task("imdb").rows("test", tmp_path / "b") == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", " "], "label": [1, 0]}, r"test\.parquet row 1: the review is empty"),
        ({"text": ["a", None], "label": [1, 0]}, r"test\.parquet row 1: the review is empty"),
        ({"text": ["a"], "label": [2]}, r"row 0: expected a label 0 to 1, found '2'"),
        ({"text": ["a"], "labels": [1]}, r"expected the columns \['text', 'label'\].*\['label'\] missing"),
    ],
)
def test_broken_rows(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    """Each kind of damage with its row."""
    with pytest.raises(files.DataError, match=message):
        get_task("imdb").rows("test", _parquet(tmp_path, columns))


def test_damage_of_the_original_folder(tmp_path: Path) -> None:
    """A review that is not UTF-8 is named; a folder without reviews too; what is nowhere has both ways out."""
    folder = tmp_path / "aclImdb" / "train" / "neg"
    folder.mkdir(parents=True)
    with pytest.raises(files.DataError, match="expected reviews"):
        get_task("imdb").rows("train", tmp_path)
    (folder / "0_1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(files.DataError, match=r"0_1\.txt:1: expected UTF-8, found the byte 0xe9"):
        get_task("imdb").rows("train", tmp_path)
    with pytest.raises(files.MissingDataError, match=r"imdb/test\.parquet"):
        get_task("imdb").rows("test", tmp_path)


def test_halves_are_disjoint_and_balanced(tmp_path: Path) -> None:
    """By hand: of each label the even rows are validation, the odd ones test."""
    folder = _parquet(tmp_path, {"text": list("abcdefgh"), "label": [0, 0, 0, 0, 1, 1, 1, 1]})
    task = get_task("imdb/halves")
    assert [row["texts"][0] for row in task.rows("validation", folder)] == ["a", "c", "e", "g"]
    assert [row["texts"][0] for row in task.rows("test", folder)] == ["b", "d", "f", "h"]
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        task.rows("dev", folder)


def test_four_metrics() -> None:
    """By hand: 3 of 4 right; class 1 predicted twice, once right, and there once."""
    values = get_task("imdb").score([1, 1, 0, 0], [1, 0, 0, 0])
    assert values == pytest.approx({"accuracy": 0.75, "precision": 0.5, "recall": 1.0, "f1": 2 / 3})
    assert next(iter(values)) == get_task("imdb").metric


def test_long_reviews_are_truncated(tmp_path: Path) -> None:
    """512 tokens is the task's own length."""
    task = get_task("imdb")
    (feature,) = task.encode([{"texts": ("a " * 600,), "label": 1}], sentence_tokenizer(), task.max_length or 0)
    assert len(feature["input_ids"]) == 512


@pytest.mark.data
def test_real_files(data_dir: Path) -> None:
    """25,000 reviews a split, half of them positive (Maas et al. 2011); a sample has both classes."""
    for split in ("train", "test"):
        rows = get_task("imdb").rows(split, data_dir)
        assert len(rows) == 25_000
        assert sum(row["label"] for row in rows) == 12_500
    drawn = sample_rows(rows, 1_000)
    assert 450 < sum(row["label"] for row in drawn) < 550
    for split in ("validation", "test"):
        half = get_task("imdb/halves").rows(split, data_dir)
        assert (len(half), sum(row["label"] for row in half)) == (12_500, 6_250)
