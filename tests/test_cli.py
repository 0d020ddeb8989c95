"""The command line as a user meets it: output, JSON, exit codes, errors."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from squeezoo.cli import app
from squeezoo.compress import selftest
from squeezoo.compress.backends import CheckpointError
from squeezoo.compress.runtime import caches, int8_supported, native
from squeezoo.compress.runtime.cuda_support import CudaError
from squeezoo.compress.selftest import Check
from squeezoo.models.dense import load_dense, save_dense
from squeezoo.pipeline import load_any
from tiny import TIMM_ARGS
from typer.testing import CliRunner

COMMANDS = (
    "quickstart", "plan", "permute", "compress", "finetune", "sweep", "eval", "bench", "bench-engine", "roofline",
    "compare", "verify", "load-check", "card", "publish", "list", "info", "adapters", "recipes", "tasks", "doctor",
)  # fmt: skip


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny random ViT for digits, saved as an ordinary timm folder."""
    folder = tmp_path_factory.mktemp("cli") / "dense"
    model = load_dense("timm/vit_tiny_patch16_224", model_args=TIMM_ARGS | {"num_classes": 10}).model
    save_dense(model, None, folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(dense):
    folder = dense.parent / "tiny-vit.digits.gpusq-gemm-int8"
    run(
        "compress", dense, "--recipe", "gpusq-gemm-int8", "--task", "digits", "--out", folder,
        "--epochs", 1, "--limit", 64, "--batch-size", 32,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    text = run(name, "--help").output
    assert "Usage" in text
    assert "Example: squeezoo" in text or name == "load-check"


def test_plan_prints_before_anything_is_done(dense):
    text = run("plan", dense, "--recipe", "gpusq-gemm-int8").output
    assert "9 GEMMs" in text
    assert "2:4 kept, int8 weights, int8 inputs" in text
    data = json.loads(run("plan", dense, "--recipe", "gpusq-gemm-int8", "--json").stdout)
    assert len(data["gemms"]) == 9


def test_finetune_compress_eval_verify_bench_card(dense, checkpoint, tmp_path):
    """The whole chain on 64 scans: what each command writes is what the next one reads."""
    options = ("--task", "digits", "--epochs", 1, "--limit", 64, "--json")
    made = json.loads(run("finetune", dense, "--out", tmp_path / "d", *options).stdout)
    assert (made["folder"], made["stages"][0]["steps"]) == (str(tmp_path / "d"), 4)
    assert json.loads((tmp_path / "d" / "squeezoo_training.json").read_text())["base"]["name"] == "dense"
    for model in (dense, checkpoint):
        scores = json.loads(run("eval", model, "--task", "digits", "--limit", 40, "--json").stdout)["scores"]
        assert [(s["metric"], s["samples"], s["complete"]) for s in scores] == [
            ("accuracy", 40, False),
            ("top5", 40, False),
        ]
    assert "golden output" in run("verify", checkpoint).output
    assert json.loads(run("load-check", checkpoint, "--json").stdout)["reference_error"] < 1e-3
    found = json.loads(run("info", checkpoint, "--json").stdout)
    assert found["recipe"] == "gpusq-gemm-int8"
    assert any("2:4 int8" in line for line in found["stored"])
    assert "runs here as" in run("info", checkpoint).stdout
    speeds = json.loads(run("bench", checkpoint, "--batch", 1, "--batch", 2, "--repeats", 20, "--json").stdout)
    explained = json.loads(run("bench", checkpoint, "--batch", 1, "--repeats", 20, "--explain", "--json").stdout)
    assert [*explained] == ["speed", "selection"]  # nothing is measured in tests, so nothing was chosen
    assert "--backend auto alone" in run("bench", checkpoint, "--repeats", 20, "--explain", "--backend", "dense").stderr
    assert [(s["batch"], s["repeats"], s["image_size"]) for s in speeds] == [(1, 20, [8, 8]), (2, 20, [8, 8])]
    run(
        "card", checkpoint, "--dense", dense, "--task", "digits", "--batch", 1, "--repeats", 20,
        "--command", "squeezoo compress ...", "--note", "a test", "--plots",
    )  # fmt: skip
    results = json.loads((checkpoint / "results.json").read_text())
    assert results["name"] == "tiny-vit.digits.gpusq-gemm-int8"
    assert list(checkpoint.glob("plots/*.png"))
    text = (checkpoint / "README.md").read_text()
    (checkpoint / "README.md").unlink()
    run("card", checkpoint)
    assert (checkpoint / "README.md").read_text() == text
    json_file = tmp_path / "scores.json"
    run("eval", checkpoint, "--task", "digits", "--limit", 5, "--json-file", json_file)
    assert json.loads(json_file.read_text())["scores"][0]["samples"] == 5


def test_each_epoch_is_scored_on_rows_that_are_not_reported(dense, tmp_path):
    """Digits have a validation split beside the reported one: 355 rows. The lines are said, and kept in the log."""
    from squeezoo.compress.checkpoint import load
    from squeezoo.eval.run import evaluate

    options = ("--task", "digits", "--epochs", 2, "--limit", 64, "--batch-size", 32)
    result = run("compress", dense, "-r", "nxm-admm", *options, "--eval-each-epoch", "-o", tmp_path / "a", "--json")
    assert "scored after each epoch: the task's own split 'validation'" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "a" / "training_log.jsonl").read_text().splitlines()]
    scored = [line for line in lines if line["kind"] == "evaluation"]
    assert [(s["stage"], s["step"], s["epoch"], s["split"], s["samples"]) for s in scored] == [
        (1, 2, 1.0, "validation", 355),
        (1, 4, 2.0, "validation", 355),
    ]
    for score in scored:
        text = f"epoch {score['epoch']:g}: accuracy {score['accuracy']:.4f}, top5 {score['top5']:.4f}, split validation"
        assert text in result.stderr
    # the last look is at what was saved
    found = evaluate(load(tmp_path / "a"), "digits", None, split="validation", progress=False)
    assert found[0].value == pytest.approx(scored[-1]["accuracy"], abs=1 / 355 + 1e-9)
    plain = run("compress", dense, "-r", "nxm-admm", *options, "-o", tmp_path / "b", "--json")
    assert "epoch 1: accuracy" not in plain.stderr
    assert "evaluation" not in (tmp_path / "b" / "training_log.jsonl").read_text()
    assert "needs a task" in run("compress", dense, "-r", "nxm-admm", "--eval-each-epoch", "-o", "x", code=1).stderr
    refused = run(
        "compress", dense, "-r", "magnitude-2-4", "-t", "digits", "--eval-each-epoch", "-o", tmp_path / "x", code=1
    )  # fmt: skip
    assert "recipe magnitude-2-4 has none" in refused.stderr


def test_what_is_used_in_place_of_missing_coefficients_is_told_once(dense, tmp_path):
    """SAWB has none for 6 bits: the plan says so, in both forms, and compress says it before it begins, and no warning
    of Python's does."""
    import warnings

    (tmp_path / "six.yaml").write_text(RECIPE_OF_SIX_BITS)
    told = "no SAWB coefficients are published for 6 bits, zero-aligned: the clip value is max|w| instead; write `fit:"
    assert run("plan", dense, "-r", tmp_path / "six.yaml").stdout.count(told) == 1
    assert told in json.loads(run("plan", dense, "-r", tmp_path / "six.yaml", "--json").stdout)["notes"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = run(
            "compress", dense, "-r", tmp_path / "six.yaml", "-t", "digits", "--limit", 32, "-o", tmp_path / "x"
        )
    assert result.stderr.count(told) == 1
    assert told not in result.stdout
    assert json.loads(run("plan", dense, "-r", "gpusq-gemm-int8", "--json").stdout)["notes"] == []


RECIPE_OF_SIX_BITS = """
name: six
description: d
source: s
rules: [{roles: [block], weight: {method: sawb, bits: 6}, input: {method: minmax, bits: 8}}]
stages: [{stage: calibrate}]
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "{dense}", "--recipe", "gpusq"), "Did you mean 'gpusq-gemm-int8'?"),
        (("eval", "{dense}", "--task", "glue/sst3"), "did you mean 'glue/sst2'?"),
        (("eval", "{dense}", "--task", "cifar10", "--data-dir", "/does/not/exist"), "--data-dir"),
        (("eval", "no-such-model", "--task", "digits"), "no-such-model"),
        (("compress", "{dense}", "-r", "gpusq-gemm-int8", "-o", "{tmp}/x"), "needs data: pass a task"),
        (("compress", "{dense}", "-r", "{tmp}/none.yaml", "-o", "{tmp}/x"), "does not exist"),
        (("eval", "{dense}", "--task", "glue/sst2"), "glue/sst2 is a task on text, but VisionTransformer reads images"),
        (("compress", "{dense}", "-r", "asp-2-4", "-t", "glue/mrpc", "-o", "{tmp}/x"), "is a task on text"),
        (("verify", "{dense}"), "holds no squeezoo.json"),
        (("plan", "{checkpoint}", "-r", "asp-2-4"), "squeezoo export"),
        (("permute", "digits-vit.digits.gpusq-gemm-int8"), "is a compressed model of the zoo"),
        (("plan", "no-such-model", "-r", "no-such-recipe"), "no-such-recipe"),
        (("adapters", "--check", "no-such-model"), "no-such-model"),
        (("info", "nothing"), "nothing"),
        (("adapters", "--show", "resnet"), "Known: bert"),
        (("card", "{checkpoint}", "--dense", "{dense}"), "give --task"),
        (("card", "{checkpoint}", "--dense", "{dense}", "--task", "digits", "--also", "x"), "NAME=FOLDER"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_1(arguments, message, dense, checkpoint, tmp_path):
    filled = [a.format(dense=dense, checkpoint=checkpoint, tmp=tmp_path) for a in arguments]
    result = run(*filled, code=1)
    assert "error:" in result.stderr
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "x").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("options", [(), ("--backend", "cuda"), ("--throughput", 3)])
@pytest.mark.parametrize("which", ["dense", "checkpoint"])
def test_eval_on_cuda_without_cuda_is_one_message(which, options, dense, checkpoint):
    """The device reaches the loading: a checkpoint's CUDA backend is asked for, not the CPU's moved there."""
    model = {"dense": dense, "checkpoint": checkpoint}[which]
    result = run("eval", model, "--task", "digits", "--limit", 5, "--device", "cuda", *options, code=1)
    assert "built without" in " ".join(result.stderr.split()) or "no CUDA device" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_checkpoint_is_loaded_for_its_device(dense, checkpoint):
    """Not loaded for the CPU and then moved: its CUDA backend says itself that it cannot run; a dense model is asked
    about its device before it is read."""
    with pytest.raises(CheckpointError, match="CUDA was asked for, but PyTorch"):
        load_any(str(checkpoint), device="cuda")
    for source in (str(dense), "no-such-model"):
        with pytest.raises(CudaError, match="CUDA was asked for, but PyTorch"):
            load_any(source, device="cuda")


def test_a_failed_check_of_an_adapter_is_exit_code_1_and_its_table_alone(dense, monkeypatch):
    failed = [Check("something", False, "why")]
    monkeypatch.setattr(selftest, "self_test", lambda model: failed)
    result = run("adapters", "--check", dense, code=1)
    assert "why" in result.stdout
    assert "error" not in result.stderr


def test_wrong_usage_is_exit_code_2(dense):
    run("bench", "x", "--repeats", 2, code=2)
    run("plan", dense, code=2)
    run("bench", "x", "--backend", "quick", code=2)


@pytest.mark.parametrize("name", ["list", "adapters", "recipes", "tasks", "doctor"])
def test_catalogues_in_both_forms(name):
    assert run(name).stdout.strip()
    assert json.loads(run(name, "--json").stdout) is not None


def test_one_adapter_and_one_recipe():
    assert json.loads(run("adapters", "--show", "bert", "--json").stdout)["per_block"] == 6
    assert "temperature: 2.0" in run("recipes", "--show", "gpusq-gemm-int8").stdout


def test_doctor_says_what_the_runtime_can_use():
    """Every part that README speaks of, each with a reason; the same facts in both forms. Expected: what the parts say
    themselves."""
    data = json.loads(run("doctor", "--json").stdout)
    runtime = data["runtime"]
    assert set(runtime) == {"int8", "native", "cuda", "triton", "selection", "reference"}
    assert all(isinstance(part["supported"], bool) and part["note"] for part in runtime.values())
    assert (runtime["int8"]["supported"], runtime["int8"]["note"]) == int8_supported()
    assert (runtime["native"]["supported"], runtime["native"]["note"]) == native.available()
    if runtime["native"]["supported"]:
        assert Path(runtime["native"]["library"]).is_file()
        assert runtime["native"]["compiler"]
        assert "avx512_vnni" in runtime["native"]["instructions"]
    if not torch.cuda.is_available():
        assert (runtime["cuda"]["supported"], runtime["cuda"]["capability"]) == (False, None)
        assert "CUDA was asked for, but" in runtime["cuda"]["note"]
    assert data["libraries"]["torch"]
    text = " ".join(run("doctor").stdout.split())
    for part in ("native int8 kernels", "backend cuda", "Triton kernels", "measured times", "compiler", "folder"):
        assert part in text


def test_doctor_without_compiler_and_with_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "squeezoo").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    caches._private_root.cache_clear()
    runtime = json.loads(run("doctor", "--json").stdout)["runtime"]
    caches._private_root.cache_clear()
    assert runtime["native"]["compiler"] is None
    assert not runtime["selection"]["writable"]
    assert runtime["selection"]["folder"].startswith(str(tmp_path / "squeezoo-"))
    assert "cannot be written" in runtime["selection"]["note"]
