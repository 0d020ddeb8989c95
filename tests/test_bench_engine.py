"""`bench_engine` at a small size: the rivals are what they claim to be, processes report, targets are judged."""

import itertools
import json

import pytest
import torch
from squeezoo import bench_gemm, bench_loading
from squeezoo.bench_engine import _patterns as patterns
from squeezoo.bench_engine import engine_table, enumeration_mask, mask_part, run_bench_engine, topk_mask
from squeezoo.bench_models import BenchModel
from squeezoo.bench_oneshot import Job, calibration_windows, run_job
from squeezoo.compress.masks import Pattern, magnitude_mask
from squeezoo.compress.runtime import native
from squeezoo.models.dense import save_dense
from tiny import ALL
from transformers import PreTrainedTokenizerFast


@pytest.mark.parametrize("text", ["2:4", "1:4", "2:8"])
def test_the_rivals_make_the_same_mask(text):
    """Random weights without equals: three ways, one mask. The number of patterns is the binomial coefficient."""
    pattern = Pattern.parse(text)
    w_OI = torch.randperm(32 * 64, generator=torch.Generator().manual_seed(0)).float().view(32, 64) + 1
    expected = magnitude_mask(w_OI, pattern)
    found = patterns(pattern.n, pattern.m)
    assert len(found) == len(set(itertools.combinations(range(pattern.m), pattern.n)))
    assert enumeration_mask(w_OI, found).equal(expected)
    assert topk_mask(w_OI, pattern.n, pattern.m).equal(expected)


def test_mask_part_times_every_pattern():
    found = mask_part(64, 3)
    assert [row["pattern"] for row in found["rows"]] == ["2:4", "1:4", "2:8", "4:8"]
    assert all(ms > 0 for row in found["rows"] for ms in row["ms"].values())
    two_of_four = found["rows"][0]["ms"]
    assert found["targets"]["2:4 mask no slower than topk"] is (two_of_four["squeezoo"] <= two_of_four["topk"])


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A tiny Llama with a tokenizer of letters, and a WikiText-2 of a few hundred characters."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    folder = tmp_path_factory.mktemp("bench")
    letters = Tokenizer(WordLevel({chr(97 + i): i for i in range(26)} | {"[UNK]": 26}, unk_token="[UNK]"))
    letters.pre_tokenizer = Split("", "isolated")
    processor = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]", pad_token="[UNK]")
    save_dense(ALL["llama"](), processor, folder / "model")
    text = folder / "data" / "wikitext-2"
    text.mkdir(parents=True)
    for split in ("valid", "test"):
        (text / f"wiki.{split}.tokens").write_text("abcdefghijklmnopqrstuvwxyz" * 20)
    return folder


def job(folder, method, **fields):
    small = {"threads": 1, "rows": 6, "length": 16, "test_tokens": 64, "window": 16, **fields}
    return Job(method, str(folder / "model"), str(folder / "data"), **small)


def test_a_job_runs_in_a_process_of_its_own(language_model):
    """Perplexity of the dense model by hand: 4 windows of 16 letters, 15 of each scored."""
    dense = run_job(job(language_model, "dense"))
    ids_BL = torch.arange(64).remainder(26).view(4, 16)
    with torch.no_grad():
        scores = ALL["llama"]()(ids_BL).logits[:, :-1].flatten(0, 1)
    expected = float(torch.nn.functional.cross_entropy(scores, ids_BL[:, 1:].flatten()).exp())
    assert dense["perplexity"] == pytest.approx(expected, rel=1e-4)
    memory = dense["memory_mib"]
    assert memory["peak"] is None or memory["imported"] < memory["start"] <= memory["peak_loading"] <= memory["peak"]
    pruned = run_job(job(language_model, "sparsegpt"))
    assert pruned["seconds"] > dense["seconds"]
    assert pruned["perplexity"] != pytest.approx(expected, rel=1e-4)


def test_a_process_that_fails_says_why(language_model):
    with pytest.raises(RuntimeError, match=r"one-shot pruning by wanda failed(.|\n)*500 calibration windows"):
        run_job(job(language_model, "wanda", rows=500))


def test_calibration_windows_are_the_first_or_spread(language_model):
    ids = list(range(100))
    one = job(language_model, "dense", rows=2, length=10)
    assert calibration_windows(ids, one) == [ids[:10], ids[10:20]]
    spread = job(language_model, "dense", rows=2, length=10, calibration="even")
    assert calibration_windows(ids, spread) == [ids[:10], ids[50:60]]


def test_the_record_is_written_and_shown(language_model, tmp_path):
    """All parts but the GEMMs at a tiny size; what is on disk is what is returned, and every target has its line."""
    out = tmp_path / "engine.json"
    record = run_bench_engine(
        ("mask", "oneshot", "step"), out, data_dir=language_model / "data", threads=1, repeats=2, size=32,
        methods=("magnitude",), oneshot_model=str(language_model / "model"), step_model="transformers/distilbert",
        batch=2, sequence=8, oneshot={"rows": 2, "length": 16, "test_tokens": 32, "window": 16},
    )  # fmt: skip
    assert json.loads(out.read_text()) == record
    assert str(language_model) not in out.read_text()  # no path of one machine
    table = engine_table(record)
    assert table.count("met: ") + table.count("MISSED: ") == sum(len(p["targets"]) for p in record["parts"].values())
    assert "| magnitude |" in table
    assert record["parts"]["step"]["ratio"] > 0


def test_bad_arguments_are_named(monkeypatch):
    monkeypatch.delenv("SQUEEZOO_DATA", raising=False)
    with pytest.raises(ValueError, match="parts out of mask, gemm, oneshot, step, loading, found speed"):
        run_bench_engine(["speed"])
    with pytest.raises(ValueError, match="found magic"):
        run_bench_engine(["mask"], methods=["magic"])
    with pytest.raises(ValueError, match="set SQUEEZOO_DATA"):
        run_bench_engine(["oneshot"])


def test_parts_measured_earlier_stay_in_the_file_of_the_same_environment(tmp_path):
    out = tmp_path / "new" / "engine.json"
    small = {"threads": 1, "repeats": 1, "size": 8, "step_model": "transformers/distilbert", "batch": 1, "sequence": 4}
    first = run_bench_engine(["step"], out, **small)
    second = run_bench_engine(["mask"], out, **small)
    assert list(second["parts"]) == ["mask"]
    assert json.loads(out.read_text())["parts"] == first["parts"] | second["parts"]
    other = {**json.loads(out.read_text()), "device": "another"}
    out.write_text(json.dumps(other))
    run_bench_engine(["mask"], out, **small)
    assert list(json.loads(out.read_text())["parts"]) == ["mask"]


def test_methods_that_calibrate_run_once_with_each_choice_of_windows(language_model, tmp_path):
    record = run_bench_engine(
        ["oneshot"], tmp_path / "engine.json", data_dir=language_model / "data", threads=1,
        methods=("dense", "wanda"), oneshot_model=str(language_model / "model"),
        oneshot={"rows": 2, "length": 16, "test_tokens": 32, "window": 16},
    )  # fmt: skip
    found = [(row["method"], row["job"]["calibration"]) for row in record["parts"]["oneshot"]["rows"]]
    assert found == [("dense", "first"), ("wanda", "first"), ("wanda", "even")]
    assert list(record["parts"]["oneshot"]["targets"]) == [
        "wanda, first windows in at most 45 s",
        "wanda, even windows in at most 45 s",
    ]


@pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
def test_sparse_int8_matrices_are_timed_beside_dense_ones(monkeypatch):
    """Small matrices; with one row so many copies take turns as the cold bytes ask for."""
    monkeypatch.setattr(bench_gemm, "SHAPES", {"wide": (128, 64)})
    part = bench_gemm.gemm_part(2, rows=(1, 130), cold_bytes=20_000)
    assert [(row["rows"], row["copies"]) for row in part["rows"]] == [(1, 3), (130, 1)]
    assert all(set(row["ms"]) == {"float32", "dense int8", "2:4 int8"} for row in part["rows"])
    assert list(part["targets"].values()) == [part["median gain"] > 1]
    assert bench_gemm.gemm_lines(part)[2].startswith("| wide | 1 (from memory) | ")
    monkeypatch.setattr(native, "available", lambda: (False, "no compiler"))
    with pytest.raises(ValueError, match="part gemm times the native kernels: no compiler"):
        bench_gemm.gemm_part(2)


def test_loading_times_both_forms_in_fresh_processes(monkeypatch):
    """A tiny BERT: the packed folder is the smaller one, and each side has a first and later loads."""
    tiny = BenchModel(
        "tiny", "transformers/bert", "classification", ((8, 0),),
        {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128},
    )  # fmt: skip
    monkeypatch.setitem(bench_loading.MODELS, "tiny", tiny)
    part = bench_loading.loading_part("tiny", 1, repeats=3)
    dense, packed = (part["rows"][side] for side in bench_loading.SIDES)
    assert 0 < packed["bytes"] < dense["bytes"]
    assert packed["repeats"] == dense["repeats"] == 3
    assert list(part["targets"].values()) == [packed["warm"]["median_ms"] <= dense["warm"]["median_ms"]]
    assert bench_loading.loading_lines(part)[3].startswith("| packed 2:4 int8 | ")
