"""The command line as a user meets it: output, JSON, exit codes, errors."""

import json

import pytest
from squeezoo.cli import app
from squeezoo.models.dense import load_dense, save_dense
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
        scores = json.loads(run("eval", model, "--task", "digits", "--limit", 40, "--json").stdout)
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
    assert json.loads(json_file.read_text())[0]["samples"] == 5


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


def test_wrong_usage_is_exit_code_2(dense):
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
    data = json.loads(run("doctor", "--json").stdout)
    assert set(data["runtime"]) == {"int8", "reference"}
    assert data["libraries"]["torch"]
