"""GLUE from official files, from the Hub's form, and the real data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from squeezoo.eval import files, get_task, glue
from squeezoo.eval.run import evaluate
from squeezoo.eval.task import Score
from squeezoo.pipeline import training_data
from texts import sentence_tokenizer
from tiny import TINY
from torch import nn

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
    with pytest.raises(
        files.DataError, match=r"dev\.tsv:3: expected a label 0 to 1 or one of negative, positive, found '2'"
    ):
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


# one good file of each task in its official form: path, content, the rows expected of it by hand
OFFICIAL: dict[str, tuple[str, str, list[tuple[tuple[str, ...], float]]]] = {
    "glue/cola": ("CoLA/dev.tsv", "gj04\t1\t\tA b.\nks08\t0\t*\tB a.\n", [(("A b.",), 1), (("B a.",), 0)]),
    "glue/stsb": (
        "STS-B/dev.tsv",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tg\tf\ty\t1\tn\tn\ta\tb\t3.800\n",
        [(("a", "b"), 3.8)],
    ),
    "glue/qqp": (
        "QQP/dev.tsv",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\ta?\tb?\t1\n4\t5\tcut off\n6\t7\t8\tc?\td?\t0\n",
        [(("a?", "b?"), 1), (("c?", "d?"), 0)],
    ),
    "glue/mnli": (
        "MNLI/dev_matched.tsv",
        "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label\n0\tg\ta\tb\tneutral\tcontradiction\n",
        [(("a", "b"), 2)],
    ),
    "glue/mnli-mm": ("MNLI/mnli_mismatched.txt", "neutral\ta\tb\n", [(("a", "b"), 1)]),
    "glue/qnli": (
        "QNLI/dev.tsv", "index\tquestion\tsentence\tlabel\n0\ta?\tb.\tnot_entailment\n", [(("a?", "b."), 1)],
    ),
    "glue/rte": ("RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n", [(("a", "b"), 0)]),
    "glue/wnli": ("WNLI/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", [(("a", "b"), 1)]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OFFICIAL))
def test_official_layouts(tmp_path: Path, name: str) -> None:
    """Columns of the official archives; QQP's short line is skipped; class ids are those of the Hub's nyu-mll/glue."""
    path, content, expected = OFFICIAL[name]
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(content, encoding="utf-8")
    task = get_task(name)
    rows = task.rows(task.report_split, tmp_path)
    assert [(row["texts"], row["label"]) for row in rows] == expected
    assert rows[0].get("settings") == ({"text": "tokenised"} if "mnli_" in path else None)


def test_similarity_without_header_and_with_source_columns(tmp_path: Path) -> None:
    """The form of the STS benchmark itself: no header, Windows line ends, on some lines two more columns."""
    (tmp_path / "STS-B").mkdir()
    lines = "g\tf\t2012\t1\t5.000\ta\tb\r\ng\tf\t2016\t2\t4\tc\td\tsource\tsource\r\n"
    (tmp_path / "STS-B" / "sts-dev.csv").write_bytes(lines.encode())
    rows = get_task("glue/stsb").rows("dev", tmp_path)
    assert [(row["texts"], row["label"]) for row in rows] == [(("a", "b"), 5.0), (("c", "d"), 4.0)]
    (tmp_path / "STS-B" / "sts-dev.csv").write_bytes(lines.replace("5.000", "5.5").encode())
    with pytest.raises(files.DataError, match=r"sts-dev\.csv:1: expected a number from 0 to 5, found '5.5'"):
        get_task("glue/stsb").rows("dev", tmp_path)


def test_similarity_is_regression(tmp_path: Path) -> None:
    """One logit per row; both correlations; labels are floats when training."""
    (tmp_path / "STS-B").mkdir()
    lines = [f"g\tf\t1\t{i}\t{i / 2}\t{'a ' * i}\tb" for i in range(1, 9)]
    for split in ("train", "dev"):
        (tmp_path / "STS-B" / f"sts-{split}.csv").write_text("\n".join(lines), encoding="utf-8")
    model: Any = TINY["bert"]()
    with pytest.raises(ValueError, match=r"glue/stsb needs logits \[rows, 1\], the model gives \[8, 3\]"):
        evaluate(model, "glue/stsb", sentence_tokenizer(), data_dir=tmp_path)
    model.classifier = nn.Linear(32, 1)
    scores = evaluate(model, "glue/stsb", sentence_tokenizer(), data_dir=tmp_path)
    assert [score.metric for score in scores] == ["spearman", "pearson"]
    assert all(-1 <= score.value <= 1 and score.value for score in scores)
    data = training_data("glue/stsb", sentence_tokenizer(), data_dir=tmp_path, model=model)
    batch = data.collate(list(data.features))
    assert (batch["labels"].dtype.is_floating_point, batch["labels"].tolist()) == (True, [i / 2 for i in range(1, 9)])


def test_variant_of_the_files_is_recorded(tmp_path: Path) -> None:
    """The tokenised 1,000-row samples of MNLI are no official dev set: said in the settings, and no complete score."""
    (tmp_path / "MNLI").mkdir()
    (tmp_path / "MNLI" / "mnli_matched.txt").write_text("neutral\ta b\tc\ncontradiction\ta\tb\n", encoding="utf-8")
    (score,) = evaluate(TINY["bert"](), "glue/mnli", sentence_tokenizer(), data_dir=tmp_path)
    assert (score.settings, score.complete) == ({"max_length": 128, "text": "tokenised"}, False)


def test_test_splits_are_refused(tmp_path: Path) -> None:
    """GLUE does not publish the labels of its test splits."""
    with pytest.raises(ValueError, match="glue/qnli: the official split 'test' has no public labels"):
        evaluate(TINY["bert"](), "glue/qnli", sentence_tokenizer(), split="test", data_dir=tmp_path)
    with pytest.raises(ValueError, match="glue/mnli: the official split 'test_matched' has no public labels"):
        evaluate(TINY["bert"](), "glue/mnli", sentence_tokenizer(), split="test_matched", data_dir=tmp_path)


def _score(task: str, metric: str, value: float, complete: bool = True) -> Score:
    return Score(task, 1, "dev", metric, value, 1, complete, True, {"torch": "2"})


def test_both_means() -> None:
    """Expected: BERT-base of NxMTransformer, table 1 (vectors/metrics.json): geometric mean 81.775122 of eight scores,
    where accuracy of MRPC and the metrics of other tasks do not count."""
    row = [84.5, 84.8, 92.5, 91.6, 56.7, 89.6, 91.7, 70.7]
    names = ["mnli", "mnli-mm", "sst2", "qnli", "cola", "stsb", "mrpc", "rte"]
    scores = [
        _score(f"glue/{name}", get_task(f"glue/{name}").metric, value / 100)
        for name, value in zip(names, row, strict=True)
    ]
    means = glue.glue_means([*scores, _score("glue/mrpc", "accuracy", 0.1), _score("imdb", "accuracy", 0.1)])
    assert 100 * (means.geometric or 0) == pytest.approx(81.775122, rel=1e-6)
    assert 100 * means.arithmetic == pytest.approx(sum(row) / 8)
    assert means.tasks == tuple(sorted(f"glue/{name}" for name in names))
    assert means.complete
    sample = glue.glue_means([*scores[:-1], _score("glue/rte", "accuracy", 0.5, complete=False)])
    assert not sample.complete
    assert glue.glue_means([_score("glue/cola", "matthews", -0.1)]).geometric is None
    for bad in ([], [scores[0], scores[0]]):
        with pytest.raises(ValueError, match="one of each"):
            glue.glue_means(bad)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "split", "counts"),
    [
        ("glue/sst2", "train", (29_780, 37_569)),
        ("glue/sst2", "dev", (428, 444)),
        ("glue/mrpc", "train", (1_194, 2_474)),
        ("glue/mrpc", "dev", (129, 279)),
        ("glue/cola", "train", (2_528, 6_023)),
        ("glue/cola", "dev", (324, 719)),
        ("glue/qnli", "dev", (2_702, 2_761)),
        ("glue/rte", "train", (1_249, 1_241)),
        ("glue/rte", "dev", (146, 131)),
        ("glue/wnli", "train", (323, 312)),
        ("glue/wnli", "dev", (40, 31)),
    ],
)
def test_real_files(data_dir: Path, name: str, split: str, counts: tuple[int, int]) -> None:
    """Rows of each class: the official GLUE release (dataset card of nyu-mll/glue), counted in the files with cut."""
    task = get_task(name)
    rows = task.rows(split, data_dir)
    assert len(rows) == task.size(split)
    assert tuple(sum(row["label"] == label for row in rows) for label in (0, 1)) == counts
    assert all(text == text.rstrip() for row in rows for text in row["texts"])


@pytest.mark.data
def test_real_samples_and_similarity(data_dir: Path) -> None:
    """MNLI's samples of 1,000 (label counts by cut), STS-B's 5,749 and 1,500 rows from 0 to 5."""
    for name, split, counts in (
        ("glue/mnli", "dev_matched", [373, 311, 316]),
        ("glue/mnli-mm", "dev_mismatched", [346, 319, 335]),
    ):
        rows = get_task(name).rows(split, data_dir)
        assert [sum(row["label"] == label for row in rows) for label in range(3)] == counts
    task = get_task("glue/stsb")
    for split in task.splits:
        rows = task.rows(split, data_dir)
        assert len(rows) == task.size(split)
        assert {min(row["label"] for row in rows), max(row["label"] for row in rows)} == {0.0, 5.0}


@pytest.mark.data
def test_majority_baseline_of_mrpc(data_dir: Path) -> None:
    """Known of the dev set: always answering "paraphrase" scores 68.4 accuracy and 81.2 F1."""
    task = get_task("glue/mrpc")
    labels = [row["label"] for row in task.rows("dev", data_dir)]
    values = task.score([1] * len(labels), labels)
    assert round(100 * values["accuracy"], 1) == 68.4
    assert round(100 * values["f1"], 1) == 81.2
