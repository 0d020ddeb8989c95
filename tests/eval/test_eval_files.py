"""Finding and reading official files: layouts, encodings, and an error with file and line for each kind of damage."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest
from squeezoo.eval import files


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(lzma.compress(content) if path.suffix == ".xz" else content)
    return path


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.xz"])
def test_reads_the_official_form(tmp_path: Path, name: str) -> None:
    """A byte order mark, Windows line ends, quotation marks and a Unicode line separator inside a sentence: published
    files have all of them, and each sentence is expected as typed."""
    text = '\ufeffid\ttext\tlabel\r\n1\t"Hi", he said\u2028again\t0\r\n2\tsay "no\t1\r\n\r\n'
    rows = list(files.read_tsv(_write(tmp_path / name, text.encode()), ("text", "label")))
    assert [row.values for row in rows] == [
        {"text": '"Hi", he said\u2028again', "label": "0"},
        {"text": 'say "no', "label": "1"},
    ]
    assert rows[1].where == f"{tmp_path / name}:3"


@pytest.mark.parametrize(
    ("content", "line", "expected"),
    [
        (b"sentence\tLabel\nx\t1\n", 1, "label"),
        (b"sentence\tlabel\nx\t1\ny\n", 3, "found 1"),
        (b"sentence\tlabel\nx\ty\t1\n", 2, "found 3"),
        (b"sentence\tlabel\nx\t1\n\nz\t1\n", 3, "found 1"),
        (b"sentence\tlabel\n \t1\n", 2, "'sentence' is empty"),
        (b"sentence\tlabel\nx\t1\ncaf\xe9\t1\n", 3, "0xe9"),
        (b"sentence\tlabel\n", 1, "found none"),
        (b"", 1, "missing"),
    ],
)
def test_damage_is_reported_with_its_line(tmp_path: Path, content: bytes, line: int, expected: str) -> None:
    """The line numbers are counted by hand, header = 1."""
    path = _write(tmp_path / "dev.tsv", content)
    with pytest.raises(files.DataError) as caught:
        list(files.read_tsv(path, ("sentence", "label")))
    assert f"{path}:{line}:" in str(caught.value)
    assert expected in str(caught.value)


def test_truncated_xz_names_the_file(tmp_path: Path) -> None:
    """A download cut in half."""
    path = tmp_path / "dev.tsv.xz"
    path.write_bytes(lzma.compress(b"sentence\tlabel\n" + bytes(range(256)) * 40)[:60])
    with pytest.raises(files.DataError, match=r"dev\.tsv\.xz: not a complete"):
        list(files.read_tsv(path, ("sentence", "label")))


@pytest.mark.parametrize("value", ["2", "-1", "0.0", "", "one", "¹"])
def test_wrong_label(value: str) -> None:
    """Two classes are 0 and 1, written as plain digits."""
    with pytest.raises(files.DataError, match=r"f\.tsv:7: expected a label 0 to 1"):
        files.parse_label(value, 2, "f.tsv:7")


def test_data_dir_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documented: the argument, then SQUEEZOO_DATA, then None; a folder that is not there is named with its origin."""
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    monkeypatch.delenv("SQUEEZOO_DATA", raising=False)
    assert files.resolve_data_dir() is None
    monkeypatch.setenv("SQUEEZOO_DATA", str(b))
    assert files.resolve_data_dir() == b
    assert files.resolve_data_dir(a) == a
    with pytest.raises(files.MissingDataError, match="--data-dir"):
        files.resolve_data_dir(tmp_path / "c")
    monkeypatch.setenv("SQUEEZOO_DATA", str(tmp_path / "c"))
    with pytest.raises(files.MissingDataError, match=r"from \$SQUEEZOO_DATA"):
        files.resolve_data_dir()


def test_plain_file_is_preferred_and_missing_lists_all_tried(tmp_path: Path) -> None:
    """The candidates are tried in order, each plain and then ``.xz``."""
    (tmp_path / "x").mkdir()
    second = _write(tmp_path / "x" / "b.tsv.xz", b"1")
    assert files.find_file("it", tmp_path, ("a.tsv", "x/b.tsv")) == second
    plain = _write(tmp_path / "x" / "b.tsv", b"1")
    assert files.find_file("it", tmp_path, ("a.tsv", "x/b.tsv")) == plain
    with pytest.raises(files.MissingDataError, match=r"a\.tsv, a\.tsv\.xz, c\.tsv, c\.tsv\.xz"):
        files.find_file("it", tmp_path, ("a.tsv", "c.tsv"))


def test_files_without_header(tmp_path: Path) -> None:
    """The names are given, the first line is a row, and its number is 1."""
    path = _write(tmp_path / "a.tsv", b"x\t1\ty\nx\t0\tz\n")
    rows = list(files.read_tsv(path, ("text", "label"), header=("source", "label", "text")))
    assert [(row.where, row.values) for row in rows] == [
        (f"{path}:1", {"text": "y", "label": "1"}),
        (f"{path}:2", {"text": "z", "label": "0"}),
    ]
    with pytest.raises(files.DataError, match=r"a\.tsv:1: expected rows, found none"):
        list(files.read_tsv(_write(tmp_path / "a.tsv", b"\n"), ("text",), header=("text",)))


def test_how_strictly_fields_are_counted(tmp_path: Path) -> None:
    """STS-B has lines with two more fields, QQP three lines with too few: only those tasks say so."""
    path = _write(tmp_path / "a.tsv", b"text\tlabel\nx\t1\nlonger\t0\tmore\nshort\n")
    with pytest.raises(files.DataError, match=r"a\.tsv:3: .*found 3"):
        list(files.read_tsv(path, ("text",)))
    with pytest.raises(files.DataError, match=r"a\.tsv:4: .*found 1"):
        list(files.read_tsv(path, ("text",), fields="more"))
    skipped = files.read_tsv(path, ("text",), fields="skip-short")
    assert [row.values["text"] for row in skipped] == ["x", "longer"]


def test_labels_by_name_and_numbers() -> None:
    """A cell holds the class's name or its id; a number is checked for its range."""
    assert files.parse_label("neutral", 3, "f:1", ("entailment", "neutral", "contradiction")) == 1
    assert files.parse_label(2, 3, "f:1", ("entailment", "neutral", "contradiction")) == 2
    with pytest.raises(files.DataError, match=r"f:1: expected a label 0 to 1 or one of no, yes, found '-'"):
        files.parse_label("-", 2, "f:1", ("no", "yes"))
    assert files.parse_number("3.8", 0, 5, "f:1") == 3.8
    for value in ("5.1", "nan", "-1", "x"):
        with pytest.raises(files.DataError, match=f"f:1: expected a number from 0 to 5, found '{value}'"):
            files.parse_number(value, 0, 5, "f:1")


def test_parquet(tmp_path: Path) -> None:
    """Columns by name; what is no parquet file, or lacks a column or rows, is named."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [1, 0], "id": [7, 8]}), path)
    assert files.read_parquet(path, ("text", "label")) == [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    with pytest.raises(files.DataError, match=r"a\.parquet: expected the columns \['texts'\]"):
        files.read_parquet(path, ("texts",))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(files.DataError, match=r"a\.parquet: expected rows, found none"):
        files.read_parquet(path, ("text",))
    path.write_bytes(b"PAR1 cut off")
    with pytest.raises(files.DataError, match=r"a\.parquet: not a readable parquet file"):
        files.read_parquet(path, ("text",))
