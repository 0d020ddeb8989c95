"""GLUE from official files, from the Hub's form, and the real data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from squeezoo.eval import files, get_task, glue
from texts import sentence_tokenizer

SST2 = "sentence\tlabel\nit 's good . \t1\nbad \t0\n"
MRPC = (
    "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    '1\t10\t11\tHe said "yes.\tHe said yes.\r\n'
    "0\t12\t13\tA cat.\tNo dog.\r\n"
)


@pytest.mark.parametrize("layout", ["glue/SST-2", "SST-2"])
def test_both_layouts(tmp_path: Path, layout: str) -> None:
    """The two documented places; trailing spaces of SST-2 are stripped."""
    (tmp_path / layout).mkdir(parents=True)
    (tmp_path / layout / "dev.tsv").write_text(SST2, encoding="utf-8")
    assert get_task("glue/sst2").rows("dev", tmp_path) == [
        {"texts": ("it 's good .",), "label": 1},
        {"texts": ("bad",), "label": 0},
    ]


def test_mrpc_is_a_pair(tmp_path: Path) -> None:
    """The official MRPC form: byte order mark, unbalanced quotation marks, columns #1 String and #2 String."""
    (tmp_path / "MRPC").mkdir()
    (tmp_path / "MRPC" / "train.tsv").write_bytes(MRPC.encode())
    rows = get_task("glue/mrpc").rows("train", tmp_path)
    assert rows[0] == {"texts": ('He said "yes.', "He said yes."), "label": 1}
    assert [row["label"] for row in rows] == [1, 0]


def test_wrong_label_is_reported_with_its_line(tmp_path: Path) -> None:
    """Line 3 holds the label 2."""
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "dev.tsv").write_text("sentence\tlabel\na\t1\nb\t2\n", encoding="utf-8")
    with pytest.raises(files.DataError, match=r"dev\.tsv:3: expected a label 0 to 1, found '2'"):
        get_task("glue/sst2").rows("dev", tmp_path)


def test_missing_file_says_what_where_and_both_ways(tmp_path: Path) -> None:
    """The one error for missing data, with a folder given."""
    with pytest.raises(files.MissingDataError) as caught:
        get_task("glue/sst2").rows("dev", tmp_path)
    for part in ("glue/sst2, split dev", str(tmp_path), "glue/SST-2/dev.tsv.xz", "--data-dir", "SQUEEZOO_DATA", "Hub"):
        assert part in str(caught.value)


def test_offline_without_folder_says_both_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The one error for missing data, offline (tests run with HF_HUB_OFFLINE=1) and without a folder."""
    import datasets

    monkeypatch.delenv("SQUEEZOO_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(files.MissingDataError) as caught:
        get_task("glue/mrpc").rows("dev", None)
    for part in ("glue/mrpc", "nyu-mll/glue (mrpc)", "--data-dir", "SQUEEZOO_DATA", "online"):
        assert part in str(caught.value)


def test_hub_form_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the Hub repository's form (configurations in README.md, parquet files, split ``validation``), read by
    the real ``datasets.load_dataset``; the columns are those of nyu-mll/glue."""
    import datasets

    hub = tmp_path / "hub"
    (hub / "mrpc").mkdir(parents=True)
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: mrpc\n  data_files:\n"
        "  - split: validation\n    path: mrpc/validation-00000-of-00001.parquet\n---\n",
        encoding="utf-8",
    )
    labels = datasets.ClassLabel(names=["not_equivalent", "equivalent"])
    text, number = datasets.Value("string"), datasets.Value("int32")
    datasets.Dataset.from_dict(
        {"sentence1": ["A cat."], "sentence2": ["No dog. "], "label": [1], "idx": [9]},
        features=datasets.Features({"sentence1": text, "sentence2": text, "label": labels, "idx": number}),
    ).to_parquet(str(hub / "mrpc" / "validation-00000-of-00001.parquet"))
    monkeypatch.delenv("SQUEEZOO_DATA", raising=False)
    monkeypatch.setattr(glue, "HUB", str(hub))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert get_task("glue/mrpc").rows("dev", None) == [{"texts": ("A cat.", "No dog."), "label": 1}]


def test_unknown_split_names_the_nearest(tmp_path: Path) -> None:
    """GLUE's dev set is called validation on the Hub, dev here."""
    with pytest.raises(ValueError, match="unknown split 'tran': expected one of train, dev; did you mean 'train'"):
        get_task("glue/sst2").rows("tran", tmp_path)


def test_encoding_is_unpadded_and_truncated() -> None:
    """By hand: [CLS] a b [SEP] has 4 tokens; a pair adds the second text and [SEP] as segment 1."""
    tokenizer = sentence_tokenizer()
    rows: list[Any] = [{"texts": ("a b",), "label": 1}, {"texts": ("a b c d e",), "label": 0}]
    features = get_task("glue/sst2").encode(rows, tokenizer, 5)
    assert [len(feature["input_ids"]) for feature in features] == [4, 5]
    assert tokenizer.decode(features[1]["input_ids"]) == "[CLS] a b c [SEP]"
    assert [feature["labels"] for feature in features] == [1, 0]
    (pair,) = get_task("glue/mrpc").encode([{"texts": ("a b", "c"), "label": 1}], tokenizer, 128)
    assert tokenizer.decode(pair["input_ids"]) == "[CLS] a b [SEP] c [SEP]"
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_no_tokenizer_is_an_error() -> None:
    """A model folder without its tokenizer."""
    with pytest.raises(ValueError, match="tokenizer"):
        get_task("glue/sst2").encode([{"texts": ("a",), "label": 1}], None, 128)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "split", "count", "positive"),
    [
        ("glue/sst2", "train", 67_349, 37_569),
        ("glue/sst2", "dev", 872, 444),
        ("glue/mrpc", "train", 3_668, 2_474),
        ("glue/mrpc", "dev", 408, 279),
    ],
)
def test_real_files(data_dir: Path, name: str, split: str, count: int, positive: int) -> None:
    """Row and positive counts of the official GLUE release (dataset card of nyu-mll/glue)."""
    task = get_task(name)
    rows = task.rows(split, data_dir)
    assert len(rows) == count == task.size(split)
    assert sum(row["label"] for row in rows) == positive
    assert all(text == text.rstrip() for row in rows for text in row["texts"])


@pytest.mark.data
def test_majority_baseline_of_mrpc(data_dir: Path) -> None:
    """Known of the dev set: always answering "paraphrase" scores 68.4 accuracy and 81.2 F1."""
    task = get_task("glue/mrpc")
    labels = [row["label"] for row in task.rows("dev", data_dir)]
    values = task.score([1] * len(labels), labels)
    assert round(100 * values["accuracy"], 1) == 68.4
    assert round(100 * values["f1"], 1) == 81.2
