"""The measuring commands and their options on tiny models: what is printed is what was measured."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from squeezoo.eval.energy import Energy
from squeezoo.models.dense import load_dense, save_dense
from test_cli import run
from texts import sentence_tokenizer
from tiny import TIMM_ARGS


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measure") / "vit"
    save_dense(load_dense("timm/vit_tiny_patch16_224", model_args=TIMM_ARGS | {"num_classes": 10}).model, None, folder)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A small random GPT-2, squeezed without data."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("measure") / "gpt2"
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    save_dense(GPT2LMHeadModel(config).eval(), None, folder)
    run("compress", folder, "--recipe", "magnitude-2-4", "--out", folder.parent / "gpt2.magnitude")
    return folder.parent / "gpt2.magnitude"


def test_a_decoder_is_timed_at_the_prompt_and_at_every_token(decoder):
    found = json.loads(
        run("bench", decoder, "--batch", 1, "--length", 8, "--decode", 3, "--repeats", 20, "--json").stdout
    )
    assert [(s["batch"], s["sequence"]) for s in found["speed"]] == [(1, 8)]
    (decode,) = found["decode"]
    assert (decode["prompt"], decode["new_tokens"]) == (8, 3)
    # the whole prompt costs more than nothing, a token too; both are medians of real times
    assert all(decode[key]["median_ms"] > 0 for key in ("dense_prefill", "compressed_token"))


def test_roofline_is_labelled_a_model_and_adds_up(decoder):
    data = json.loads(run("roofline", decoder, "--hardware", "H100-SXM", "--batch", 2, "--length", 16, "--json").stdout)
    assert (data["kind"], data["tokens"]) == ("model", 32)
    assert sum(gemm["dense_us"] for gemm in data["gemms"]) == pytest.approx(data["dense_us"])
    assert "model (placeholder efficiency)" in run("roofline", decoder, "--hardware", "H100-SXM").output
    assert "did you mean" in run("roofline", decoder, "--hardware", "H100", code=1).stderr


def test_finetune_writes_its_energy_and_unknown_is_null(vit, tmp_path):
    run("finetune", vit, "-t", "digits", "-o", tmp_path / "d", "--epochs", 1, "--limit", 32, "--energy", "sensors")
    data = json.loads((tmp_path / "d" / "energy.json").read_text())
    assert data.pop("resumed") is False
    energy = Energy.from_dict(data)
    assert energy.seconds > 0
    assert (energy.kwh is None) == (not energy.included)


def test_a_sweep_from_the_command_line(vit, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("learning_rate: [1.0e-3, 1.0e-2]\n")
    options = ("-r", "dense", "-t", "digits", "--space", space, "-o", tmp_path / "s", "--limit", 64)
    data = json.loads(run("sweep", vit, *options, "--report", "--json").stdout)
    values = [trial["value"] for trial in data["trials"]]
    assert [t["settings"]["learning_rate"] for t in data["trials"]] == [1e-3, 1e-2]
    assert len(values) == 2
    assert data["reported"][0]["split"] == "test"
    assert (tmp_path / "s" / "expected_validation.png").stat().st_size > 1000


def test_settings_and_families_of_tasks(decoder, tmp_path):
    """--set reaches the score; a family means the members that the head fits; an unknown setting names the known."""
    tokenizer = sentence_tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(decoder)
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    text = "".join(f" = Page {i} = \n \n a b c d e f g h i j k l m n o p \n" for i in range(20))
    for split in ("train", "valid", "test"):
        (folder / f"wiki.{split}.tokens").write_text(text)
    options = ("--data-dir", tmp_path, "--max-length", 16, "--limit", 5, "--json")
    scores = json.loads(run("eval", decoder, "--task", "wikitext2", *options).stdout)["scores"]
    assert {s["task"] for s in scores} == {"wikitext2/token", "wikitext2/sliding", "wikitext2/word"}
    one = [
        json.loads(run("eval", decoder, "--task", "wikitext2/sliding", "--set", f"stride={s}", *options).stdout)
        for s in (4, 8)
    ]
    one = [record["scores"][0] for record in one]
    assert [s["settings"]["stride"] for s in one] == [4, 8]
    assert all(a["value"] != b["value"] for a, b in pairwise(one))
    result = run("eval", decoder, "--task", "wikitext2/sliding", "--set", "strid=4", *options, code=1)
    assert "did you mean 'stride'" in result.stderr


def test_eval_times_itself_beside_the_bare_model(vit, tmp_path):
    """--throughput prints no scores: both times of every round, as a table and as JSON."""
    options = ("--task", "digits", "--limit", 64, "--batch-size", 16, "--throughput", 3)
    (found,) = json.loads(run("eval", vit, *options, "--json", "--json-file", tmp_path / "t.json").stdout)
    assert json.loads((tmp_path / "t.json").read_text()) == [found]
    assert (found["task"], found["samples"], found["complete"], found["batches"]) == ("digits", 64, False, 4)
    assert len(found["bare_seconds"]) == len(found["evaluate_seconds"]) == 3
    text = run("eval", vit, *options).stdout
    assert "digits test, 64 rows (sample) in 4 batches on " in text
    assert "median of 3 rounds" in text
    assert "accuracy" not in text
    run("eval", vit, "--task", "digits", "--throughput", 2, code=2)


def test_permute_reports_what_it_brings_and_proves_the_outputs(decoder, tmp_path):
    data = json.loads(
        run("permute", decoder.parent / "gpt2", "--pattern", "2:4", "-o", tmp_path / "p", "--json").stdout
    )
    assert len(data["gemms"]) == 4  # FFN2 and attention output of two blocks
    assert all(gemm["kept_after"] >= gemm["kept_before"] for gemm in data["gemms"])
    assert data["output_error"] < 1e-5
    again = json.loads(run("permute", tmp_path / "p", "--json").stdout)["gemms"][0]
    assert again["kept_before"] == pytest.approx(data["gemms"][0]["kept_after"])


def test_compare_prints_and_writes_what_the_cards_hold(tmp_path):
    name = "minilm-l6.mrpc.gpusq-gemm-int8"
    index = json.loads((Path(__file__).parents[1] / "zoo_cards" / "index.json").read_text())
    f1 = next(entry["compressed"] for entry in index if entry["name"] == name)
    text = run("compare", name).stdout
    assert "gpusq-gemm-int8" in text
    assert f"{100 * f1:.2f} %" in text
    run("compare", name, "--format", "html", "--out", tmp_path / "c.html", "--plots")
    page = (tmp_path / "c.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "data:image/png;base64," in page
    assert "say where with --out" in run("compare", name, "--plots", code=1).stderr
    data = json.loads(run("compare", name, "--json").stdout)
    assert [row["name"] for row in data["rows"]] == ["dense", "gpusq-gemm-int8"]
    assert data["columns"][0]["metric"] == "f1"
    assert data["rows"][1]["values"][0] == pytest.approx(f1, abs=1e-9)
    assert "without --out and --format" in run("compare", name, "--json", "--format", "html", code=1).stderr
