"""`squeezoo eval` as a user meets it: several tasks, the file of scores, exit codes, errors before the first score."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from squeezoo import terminal
from squeezoo.eval.environment import device_name
from squeezoo.measure_eval import without_folders
from squeezoo.models.dense import load_dense, save_dense
from test_cli import run
from texts import sentence_tokenizer
from tiny import TINY
from torch import nn


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """SST-2 and MRPC of a few rows; no other task of GLUE."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "SST-2").mkdir()
    (folder / "MRPC").mkdir()
    for split in ("train", "dev"):
        (folder / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\na b\t1\nc\t0\nd e f\t1", encoding="utf-8")
        rows = "".join(f"\n{i % 2}\t1\t2\ta {'b' * (i % 3)}\tc" for i in range(8))
        text = f"Quality\t#1 ID\t#2 ID\t#1 String\t#2 String{rows}"
        (folder / "MRPC" / f"{split}.tsv").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny random BERT with two classes and its tokenizer."""
    model: Any = TINY["bert"]()
    torch.manual_seed(2)
    model.classifier = nn.Linear(32, 2)
    model.config.num_labels = model.num_labels = 2
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    save_dense(model, sentence_tokenizer(), folder)
    return folder


def test_the_command_of_the_issue(bert, data, tmp_path):
    """What can be scored is; the rest is named on the error stream and in the file; families that do not fit are no
    failure. Digest: of the file's bytes, by hashlib."""
    path = tmp_path / "new" / "out.json"
    result = run("eval", bert, "--task", "glue,squad,wikitext2", "--data-dir", data, "--json", path)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {score["task"] for score in record["scores"]} == {"glue/sst2", "glue/mrpc"}
    assert {one["task"] for one in record["skipped"]} >= {"glue/qqp", "glue/mnli", "squad1", "wikitext2/token"}
    assert "skipped glue/qqp: glue/qqp, split dev, not found" in result.stderr
    assert "glue/sst2" in result.stdout
    assert "mean over glue/mrpc, glue/sst2" in result.stdout
    digest = hashlib.sha256((bert / "model.safetensors").read_bytes()).hexdigest()
    assert record["model"] == {"name": "tiny-bert", "revision": None, "sha256": {"model.safetensors": digest}}
    assert (record["device"], record["threads"]) == (device_name("cpu"), torch.get_num_threads())
    assert (record["backend"], record["seed"]) == (None, None)
    assert record["libraries"]["torch"] == torch.__version__
    assert len(record["date"]) == 10
    for folder in (str(data), str(tmp_path), str(bert.parent)):
        assert folder not in path.read_text(encoding="utf-8")


def test_json_with_and_without_a_file(bert, data, tmp_path):
    """Alone it prints, before another option too; with a file it prints the table; ``--json-file`` is the same."""
    options = ("eval", bert, "--data-dir", data)
    printed = json.loads(run(*options, "--json", "--task", "glue/sst2").stdout)
    assert [score["task"] for score in printed["scores"]] == ["glue/sst2"]
    assert json.loads(run(*options, "-t", "glue/sst2", "--json", "-").stdout)["scores"] == printed["scores"]
    for name, option in (("a", ("--json",)), ("b", ("--json-file",))):
        text = run(*options, *option, tmp_path / name, "--task", "glue/sst2").stdout
        assert "accuracy" in text
        assert json.loads((tmp_path / name).read_text())["scores"] == printed["scores"]
    both = json.loads(run(*options, "-t", "glue/sst2", "--json", "--json-file", tmp_path / "c").stdout)
    assert both == json.loads((tmp_path / "c").read_text())
    run(*options, f"--json={tmp_path / 'd'}", "-t", "glue/sst2")
    assert (tmp_path / "d").is_file()
    two = run(*options, "-t", "glue/sst2", "--json", tmp_path / "e", "--json-file", tmp_path / "f", code=1)
    assert "two files for one result" in two.stderr


def test_a_full_name_without_a_score_is_exit_code_1(bert, data, tmp_path):
    """The other task is scored, shown and kept; an older file gives way to what was scored, not to nothing."""
    path = tmp_path / "out.json"
    path.write_text("[]")
    result = run("eval", bert, "-t", "glue/qqp,wnut17", "--data-dir", data, "--json", path, code=1)
    assert "no score for" in result.stderr
    assert path.read_text() == "[]"
    result = run("eval", bert, "-t", "glue/mrpc,glue/qqp", "--data-dir", data, "--json", path, code=1)
    assert "error: no score for glue/qqp" in result.stderr
    assert "glue/mrpc" in result.stdout
    record = json.loads(path.read_text())
    assert [score["metric"] for score in record["scores"]] == ["f1", "accuracy"]
    assert [one["task"] for one in record["skipped"]] == ["glue/qqp"]


def test_what_was_scored_survives_ctrl_c(bert, data, tmp_path, monkeypatch):
    """Ctrl-C while MRPC, the second task, is read: exit code 130, SST-2 is in the table and in the file."""
    from squeezoo.eval import several

    real = several.evaluate

    def interrupted(model: Any, task: Any, *args: Any, **how: Any) -> Any:
        if task.name == "glue/mrpc":
            raise KeyboardInterrupt
        return real(model, task, *args, **how)

    monkeypatch.setattr(several, "evaluate", interrupted)
    path = tmp_path / "out.json"
    options = ("eval", bert, "--data-dir", data, "--json", path)
    result = run(*options, "-t", "glue/sst2,glue/mrpc", code=130)
    assert f"interrupted with 1 of 2 tasks scored, in {path}" in result.stderr
    assert "checkpoint" not in result.stderr
    assert "glue/sst2" in result.stdout
    record = json.loads(path.read_text())
    assert [score["task"] for score in record["scores"]] == ["glue/sst2"]
    assert record["skipped"] == [{"task": "glue/mrpc", "reason": "interrupted"}]
    alone = run(*options, "-t", "glue/mrpc", code=130)
    assert alone.stderr.strip() == "interrupted"


def test_a_fine_tuned_and_a_compressed_model_say_seed_names_and_kernels(bert, data, tmp_path):
    """Fine-tuning stores the task's names, compressing keeps them; the seed is that of the command; the file says what
    ran. ``reference`` runs no kernel, so no module but PyTorch's."""
    dense, squeezed, path = tmp_path / "dense", tmp_path / "tiny.mrpc.int8", tmp_path / "out.json"
    tuned = ("--data-dir", data, "--epochs", 1, "--limit", 8, "--seed", 3)
    run("finetune", bert, "-t", "glue/mrpc", "-o", dense, *tuned)
    assert json.loads((dense / "config.json").read_text())["id2label"] == {"0": "not_equivalent", "1": "equivalent"}
    run("compress", dense, "-r", "deepcomp-sparse-int8", "-t", "glue/mrpc", "-o", squeezed, *tuned)
    assert load_dense(dense, kind="auto").model.config.label2id["equivalent"] == 1
    run("eval", squeezed, "-t", "glue", "--data-dir", data, "--backend", "reference", "--json", path)
    record = json.loads(path.read_text())
    assert (record["seed"], record["scores"][0]["seed"]) == (3, 3)
    assert {score["task"] for score in record["scores"]} == {"glue/mrpc"}  # SST-2 has other classes
    assert any("do not match the task's" in one["reason"] for one in record["skipped"] if one["task"] == "glue/sst2")
    assert record["model"]["recipe"] == "deepcomp-sparse-int8"
    assert [*record["model"]["sha256"]] == ["weights.safetensors"]
    assert (record["backend"]["asked"], record["backend"]["ran"]) == ("reference", "reference")
    assert sum(record["backend"]["gemms"].values()) >= 12  # six of each of two blocks
    assert record["backend"]["kernels"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-t", "glue/mrpc,"), "an empty name in the list of tasks 'glue/mrpc,'"),
        (("-t", "glue/mrpc", "--split", "validation"), "did you mean 'dev'?"),
        (("-t", "glue/mrpc", "--backend", "int8"), "--backend int8 is for compressed checkpoints"),
        (("-t", "glue/mrpc", "--json", "{tmp}"), "it is a folder, expected the name of a file"),
        (("-t", "glue/mrpc", "--json", "{tmp}/file/out.json"), "cannot write"),
        (("-t", "glue/mrpc", "--device", "cuda:99"), "no device 'cuda:99'"),
        (("-t", "glue/mrpc", "--device", "gpu"), "unknown device 'gpu'"),
        (("-t", "glue/mrpc", "--set", "beams"), "--set takes NAME=VALUE"),
        (("-t", "glue/mrpc,glue/sst2", "--set", "beams=2"), "unknown setting 'beams'"),
    ],
)
def test_errors_come_before_the_first_score(arguments, message, bert, data, tmp_path):
    (tmp_path / "file").write_text("")
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    result = run("eval", bert, "--data-dir", data, *filled, code=1)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not result.stdout.strip()


@pytest.mark.parametrize("arguments", [("--max-length", "-7"), ("--max-length", "0"), ("--limit", "0")])
def test_numbers_out_of_range_are_wrong_usage(arguments, bert, data):
    run("eval", bert, "-t", "glue/mrpc", "--data-dir", data, *arguments, code=2)


def test_an_extra_that_is_not_installed_is_named(bert, data, monkeypatch):
    """Packages of pyproject.toml's extras; any other failed import stays an error of ours, with its traceback."""
    found = terminal.missing_extra(ModuleNotFoundError("No module named 'rouge_score'", name="rouge_score.scoring"))
    assert found == "this needs rouge-score, which is not installed: pip install 'squeezoo[eval]'"
    known = ImportError("a sweep needs Optuna: pip install 'squeezoo[eval]'")
    assert terminal.missing_extra(known) == str(known)
    assert terminal.missing_extra(ImportError("cannot import name 'x' from 'squeezoo.eval'", name="squeezoo")) is None
    assert terminal.missing_extra(ModuleNotFoundError("No module named 'sqeezoo'", name="sqeezoo")) is None
    from squeezoo.eval import metrics

    def absent(*_: Any) -> float:
        raise known

    monkeypatch.setattr("sklearn.metrics.accuracy_score", absent)
    assert metrics is not None
    result = run("eval", bert, "-t", "glue/sst2", "--data-dir", data, code=1)
    assert result.stderr.strip() == f"error: {known}"


def test_folders_of_this_machine_are_cut_to_their_names():
    """By hand; addresses and fractions stay."""
    assert without_folders("looked in '/a/b c/d' for x/y.tsv") == "looked in 'b c/d' for x/y.tsv"
    assert without_folders("/data/glue/RTE/dev.tsv:3: broken") == "dev.tsv:3: broken"
    assert without_folders("see https://a.b/c/d, 1/2 and a/b") == "see https://a.b/c/d, 1/2 and a/b"
    assert Path(without_folders("/")) == Path("/")
