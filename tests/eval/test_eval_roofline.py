"""The roofline model against hand-derived vectors, its fit against known factors, and what it says about plans."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from squeezoo.compress.plan import make_plan
from squeezoo.compress.recipe import Recipe
from squeezoo.eval.hardware import HARDWARE, IDEAL, PLACEHOLDER, Efficiency, Hardware, get_hardware
from squeezoo.eval.roofline import (
    BYTES,
    GemmWork,
    Prediction,
    amdahl_speedup,
    count_tokens,
    int4_fraction,
    predict_gemm,
    predict_model,
    storage_ratio,
)
from squeezoo.eval.roofline_fit import TimedGemm, fit_efficiency, fit_hardware, measure_gemms, this_cpu
from squeezoo.eval.speed import Speed
from squeezoo.roofline_cpu import int8_kernels
from tiny import make

VECTOR = json.loads((Path(__file__).parents[1] / "vectors" / "hardware_model.json").read_text(encoding="utf-8"))
A100, H200 = get_hardware("A100-SXM-80GB"), get_hardware("H200-SXM")


def _gemm(**changes: Any) -> dict[str, Any]:
    gemm = {
        "name": "encoder.layer.0.ffn", "role": "ffn_up", "block": 0, "shape": (3072, 768), "sparsity": "2:4",
        "weight": {"method": "lsq", "bits": 8}, "input": {"method": "lsq", "bits": 8}, "accelerated": True,
    }  # fmt: skip
    return gemm | changes


@pytest.mark.parametrize("model", ["bert", "wav2vec2", "vit"])
def test_amdahl_reproduces_deep_compression(model: str) -> None:
    """vectors/hardware_model.json; the published figures (ALGORITHMS H.1) are these, rounded."""
    row = VECTOR["amdahl"][model]
    assert amdahl_speedup(row["f_int8"]) == pytest.approx(row["speedup_int8"], rel=1e-6)
    assert int4_fraction(row["f_int8"]) == pytest.approx(row["f_int4_predicted"], rel=1e-6)
    assert amdahl_speedup(int4_fraction(row["f_int8"])) == pytest.approx(row["speedup_int4"], rel=1e-6)
    assert amdahl_speedup(row["f_int8"]) == pytest.approx(row["int4_over_int8_dense"], rel=1e-6)
    published = {"bert": (1.4, 1.25), "wav2vec2": (1.35, 1.22), "vit": (1.34, 1.21)}[model]
    found = amdahl_speedup(row["f_int8"]), amdahl_speedup(int4_fraction(row["f_int8"]))
    assert found == pytest.approx(published, abs=0.01)


@pytest.mark.parametrize("row", VECTOR["roofline"], ids=lambda r: f"{r['gpu']}-{r['M']}-{r['mode']}")
def test_roofline_reproduces_the_vector(row: dict[str, Any]) -> None:
    """vectors/hardware_model.json: efficiency 1, no overhead, int8 GEMMs write 2-byte outputs."""
    kind, _, sparsity = row["mode"].partition("_")
    work = GemmWork(row["M"], row["K"], row["N"], kind, kind, kind, "fp16", bool(sparsity), sparsity or None)
    found = predict_gemm(work, get_hardware(row["gpu"]), efficiency=IDEAL)
    assert (work.flops, work.bytes) == (row["flops"], row["bytes"])
    assert found.compute_s * 1e6 == pytest.approx(row["t_compute_us"], rel=1e-6)
    assert found.memory_s * 1e6 == pytest.approx(row["t_memory_us"], rel=1e-6)
    assert found.seconds * 1e6 == pytest.approx(row["t_us"], rel=1e-6)
    assert found.bound == row["bound"]


def test_storage_ratios_of_the_table() -> None:
    """ALGORITHMS F: 0.5625 of FP16, 0.625 of INT8, 0.75 of INT4; H.2 uses the first two."""
    assert [storage_ratio("2:4", bits) for bits in (16, 8, 4)] == [0.5625, 0.625, 0.75]
    assert storage_ratio(None, 8) == 1


def test_ridges_of_the_table() -> None:
    """ALGORITHMS H.2: H200 has its ridge at 206 flop per byte in FP16, 412 in INT8, twice that with 2:4."""
    ridges = [H200.rate(kind, sparse) / H200.bandwidth for kind in ("fp16", "int8") for sparse in (False, True)]
    assert [round(ridge) for ridge in ridges] == [206, 412, 412, 825]
    assert A100.rate("int4", sparse=True) == 2496e12
    assert all(h.rate("fp16") == pytest.approx(h.rate("int8") / 2, rel=1e-3) for h in HARDWARE.values())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096), st.sampled_from(sorted(HARDWARE)))
def test_a_time_is_never_below_either_bound(m: int, k: int, n: int, name: str) -> None:
    """By definition of the maximum; 2:4 never predicts more than twice the speed."""
    dense = predict_gemm(GemmWork(m, k, n, "fp16", "fp16", "fp16", "fp16"), get_hardware(name))
    sparse = predict_gemm(GemmWork(m, k, n, "fp16", "fp16", "fp16", "fp16", True, "2:4"), get_hardware(name))
    assert dense.seconds >= max(dense.compute_s, dense.memory_s) + PLACEHOLDER.overhead_s
    assert 1 <= dense.seconds / sparse.seconds <= 2


def test_a_real_plan_is_predicted_and_says_model() -> None:
    """A tiny BERT under gpusq-gemm-int8 and, uncompressed, under no rule at all: then dense equals compressed."""
    plan = make_plan(make("bert"), Recipe.load("gpusq-gemm-int8")).to_dict()
    found = predict_model(json.loads(json.dumps(plan))["gemms"], count_tokens(8, 128, final=1), H200)
    assert str(found).startswith("model (placeholder efficiency): H200-SXM, 1024 tokens, GEMMs only")
    assert found.to_dict()["kind"] == "model"
    assert not isinstance(found, Speed)
    assert [g.work.m for g in found.dense if g.name == "classifier"] == [8]
    assert len(found.dense) == len(plan["gemms"]) == 13
    bare = [g | {"sparsity": None, "weight": None, "input": None} for g in plan["gemms"]]
    assert predict_model(bare, 1024, H200).speedup == 1
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_runs_on_what() -> None:
    """ALGORITHMS H.2: Hopper has no INT4 rate, so INT4 there runs as INT8; a GEMM that no kernel takes runs dense."""
    int4 = _gemm(weight={"method": "sawb", "bits": 4}, input={"method": "pact", "bits": 4})

    def work(gemm: dict[str, Any], hardware: Hardware = H200, **how: Any) -> GemmWork:
        return predict_model([gemm], 64, hardware, **how).compressed[0].work

    assert (work(int4).compute, work(int4).weight, work(int4).input) == ("int8", "int8", "int8")
    assert (work(int4, A100).compute, work(int4, A100).weight) == ("int4", "int4")
    assert (work(_gemm()).sparse, work(_gemm()).output) == (True, "fp16")
    assert not work(_gemm(accelerated=False)).sparse
    assert work(_gemm(accelerated=False)).sparsity is None
    assert not work(_gemm(sparsity="70%")).sparse
    only_weights = work(_gemm(input=None, sparsity=None))
    assert (only_weights.compute, only_weights.weight, only_weights.input) == ("fp16", "int8", "fp16")
    cpu = Hardware("a CPU", {"fp32": 1e11}, 1e10, None, None, (), "test")
    assert work(_gemm(), cpu, dense_format="fp32") == work(_gemm(weight=None, input=None), cpu, dense_format="fp32")


def test_2_4_gains_nothing_when_activations_bound_the_memory() -> None:
    """ALGORITHMS H.2: a GEMM of many rows and few inputs moves its activations, which 2:4 does not shrink."""
    thin = _gemm(shape=(64, 64), weight=None, input=None)
    assert predict_model([thin], 100_000, H200, efficiency=IDEAL).speedup == pytest.approx(1, abs=0.01)


def test_the_rest_of_the_model_limits_the_gain() -> None:
    """Amdahl (H.1): GEMMs at twice the speed and as much time outside them give 1 / (0.5 + 0.25) = 4/3."""
    gemms = [_gemm(weight=None, input=None, shape=(4096, 4096))]
    only = predict_model(gemms, 100_000, H200, efficiency=IDEAL)
    whole = predict_model(gemms, 100_000, H200, efficiency=IDEAL, other_s=only.dense_s)
    assert only.speedup == pytest.approx(2)
    assert whole.speedup == pytest.approx(amdahl_speedup(0.5)) == pytest.approx(4 / 3)
    assert "whole model" in str(whole)


def test_tokens_of_an_encoder_decoder() -> None:
    """2 rows of 100 tokens in, 10 out: the encoder and cross-attention's keys see 200, the decoder and the head 20."""
    plan = make_plan(make("bart"), Recipe.load("gpusq-gemm-int8")).to_dict()
    found = predict_model(plan["gemms"], count_tokens(2, 100, target=10), H200)
    rows = {(g["name"].split(".")[1], g["role"]): d.work.m for g, d in zip(plan["gemms"], found.dense, strict=True)}
    assert rows["encoder", "q"] == rows["decoder", "cross_k"] == rows["decoder", "cross_v"] == 200
    assert rows["decoder", "q"] == rows["decoder", "cross_q"] == rows["decoder", "ffn_up"] == 20


@pytest.mark.parametrize(("compute", "memory", "overhead"), [(0.62, 0.71, 4e-6), (0.9, 0.3, 0.0), (0.05, 0.9, 1e-5)])
def test_the_fit_finds_the_factors_that_made_the_times(compute: float, memory: float, overhead: float) -> None:
    """Times from the model itself with known factors, on both sides of the ridge, 1 % of noise on some."""
    truth = Efficiency(compute, memory, overhead, 0)
    timed = []
    for i, m in enumerate((1, 4, 16, 64, 256, 1024, 4096, 16384)):
        for k, n in ((768, 768), (4096, 4096), (768, 3072)):
            work = GemmWork(m, k, n, "fp16", "fp16", "fp16", "fp16")
            timed.append(TimedGemm(work, predict_gemm(work, A100, efficiency=truth).seconds * (1 + 0.01 * (i % 3 - 1))))
    found = fit_efficiency(timed, A100.rate("fp16"), A100.bandwidth)
    assert found.fitted
    assert found.measurements == 24
    assert (found.compute, found.memory) == pytest.approx((compute, memory), rel=0.03)
    assert found.overhead_s == pytest.approx(overhead, abs=3e-7)


def test_what_no_measurement_tells_stays_a_placeholder() -> None:
    """Only large GEMMs, all bound by compute: nothing is learned of the bandwidth, and the prediction says so."""
    truth = Efficiency(0.6, 1.0, 0.0, 0)
    works = [GemmWork(8192, 4096, n, "fp16", "fp16", "fp16", "fp16") for n in (4096, 8192, 16384)]
    timed = [TimedGemm(w, predict_gemm(w, A100, efficiency=truth).seconds) for w in works]
    fitted = fit_hardware(A100, {"fp16": timed})
    found = fitted.efficiency("fp16")
    assert found.guessed == ("memory",)
    assert found.memory == PLACEHOLDER.memory
    assert found.compute == pytest.approx(0.6, rel=1e-3)
    assert not found.fitted
    assert fitted.efficiency("int8") == PLACEHOLDER
    assert "placeholder" in str(predict_model([_gemm()], 64, fitted))
    with pytest.raises(ValueError, match="at least three"):
        fit_efficiency(timed[:2], A100.rate("fp16"), A100.bandwidth)


def test_a_fitted_hardware_survives_json_and_is_called_fitted() -> None:
    """fp16 dense and sparse were fitted: a float model's prediction rests on measurements, an int8 one does not."""
    known = replace(PLACEHOLDER, measurements=5, guessed=())
    fitted = A100.with_efficiencies(**{"fp16": known, "fp16_2:4": known})
    again = Hardware.from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert again == fitted
    floats = predict_model([_gemm(weight=None, input=None)], 64, again)
    assert floats.fitted
    assert str(floats).startswith("model (fitted efficiency)")
    assert not predict_model([_gemm()], 64, again).fitted


SHAPES = ((1, 256, 256), (64, 256, 256), (128, 256, 512), (4, 512, 512))


def test_this_cpu_is_measured() -> None:
    """Its own GEMMs, times of the right order: the fit's error is bounded loosely, since the machine may be busy."""
    cpu = this_cpu(repeats=3, shapes=SHAPES)
    assert "thread" in cpu.name
    assert cpu.rates["fp32"] > 1e7
    assert cpu.efficiency("fp32").measurements == 4
    assert len(measure_gemms(SHAPES[:1], repeats=1)["fp32"]) == 1
    prediction = predict_model([_gemm(weight=None, input=None)], 8, cpu, dense_format="fp32")
    assert prediction.speedup == 1
    assert prediction.dense_s > 0
    assert predict_model([_gemm()], 8, cpu, dense_format="fp32").speedup == 1  # no int8 kernel, no rate


class _Clock:
    """Time that passes only in the GEMMs below, and a nanosecond whenever somebody looks."""

    def __init__(self) -> None:
        self.now, self.share = 0.0, 1.0

    def process_time(self) -> float:
        return self.share * self.now

    def perf_counter(self) -> float:
        self.now += 1e-9
        return self.now

    def gemm(self, rate: float) -> Any:
        """Kernels of so many operations a second."""

        def make(m: int, k: int, n_out: int) -> Any:
            def call() -> None:
                self.now += 2 * m * k * n_out / rate

            return call

        return make


def test_kernels_of_the_runtime_have_the_speed_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of known speed on a clock of their own: int8 4 times as fast as float32, 2:4 6 times. A prediction of a
    GEMM between the measured sizes finds both, and says that all of it but the memory's share was measured."""
    clock = _Clock()
    monkeypatch.setattr("squeezoo.eval.roofline_fit.time", clock)
    monkeypatch.setattr("squeezoo.eval.roofline_fit.float32_gemm", clock.gemm(1e11))
    cpu = this_cpu({"int8": clock.gemm(4e11), "int8_2:4": clock.gemm(6e11)}, repeats=3, shapes=SHAPES)
    assert cpu.sparse == ("int8",)
    assert cpu.rates == pytest.approx({"fp32": 1e11, "int8": 4e11}, rel=1e-3)
    dense = predict_model([_gemm(sparsity=None)], 384, cpu, dense_format="fp32")
    sparse = predict_model([_gemm()], 384, cpu, dense_format="fp32")
    assert (dense.speedup, sparse.speedup) == pytest.approx((4, 6), rel=0.01)
    assert set(sparse.efficiencies) == {"fp32", "int8_2:4"}
    assert "int8_2:4 measured on 4 GEMMs: compute 0.75, overhead 0.0 us, guessed: memory 0.80" in sparse.factors()
    assert str(sparse).startswith("model (")
    assert "busy" not in cpu.source
    clock.share = 0.4
    assert "a busy machine, which left 40% of a core" in this_cpu(repeats=1, shapes=SHAPES).source
    with pytest.raises(ValueError, match="int4_2:4 needs its dense kind too, int4"):
        this_cpu({"int4_2:4": clock.gemm(1e11)})


def test_factors_say_what_is_measured_and_what_is_guessed() -> None:
    """In words and as data."""
    assert PLACEHOLDER.told() == "guessed: compute 0.70, memory 0.80, overhead 3.0 us"
    known = replace(PLACEHOLDER, measurements=5, guessed=("memory",))
    assert known.told() == "measured on 5 GEMMs: compute 0.70, overhead 3.0 us, guessed: memory 0.80"
    data = predict_model([_gemm()], 64, A100.with_efficiencies(fp16=known)).to_dict()["factors"]
    assert data["fp16"]["guessed"] == ("memory",)
    assert data["int8_2:4"]["measurements"] == 0


def test_the_runtimes_own_kernels_are_timed() -> None:
    """A real int8 plan on this machine: its kernels have a rate of their own, whatever it is."""
    kernels = int8_kernels()
    assert set(kernels) in (set(), {"int8"}, {"int8", "int8_2:4"})
    cpu = this_cpu(kernels, repeats=3, shapes=SHAPES)
    assert set(cpu.rates) == {"fp32", *(kind for kind in kernels if "_" not in kind)}
    found = predict_model([_gemm()], 64, cpu, dense_format="fp32")
    assert (found.speedup == 1) == (not kernels)
    kinds = {"fp32"} if not kernels else {"fp32", "int8_2:4" if "int8_2:4" in kernels else "int8"}
    assert set(found.efficiencies) == kinds


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_hardware("H100"), "did you mean 'H100"),
        (lambda: predict_model([], 8, H200), "got none"),
        (lambda: predict_model([_gemm()], 8, H200, dense_format="fp8"), "one of fp32"),
        (lambda: predict_model([_gemm()], 0, H200), "at least one row"),
        (lambda: H200.rate("int4"), "unknown number format 'int4'"),
        (lambda: amdahl_speedup(1.5), "share of 0 to 1"),
        (lambda: TimedGemm(GemmWork(1, 1, 1, "fp16", "fp16", "fp16", "fp16"), 0.0), "positive seconds"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    """Each breaks a documented condition."""
    with pytest.raises(ValueError, match=message):
        call()


def test_a_prediction_is_not_a_speed() -> None:
    """DESIGN 3: another type, so that a model's number cannot enter a table of measurements."""
    assert not issubclass(Prediction, Speed)
    with pytest.raises(ValueError, match="Speed: missing keys"):
        Speed.from_dict(predict_model([_gemm()], 64, H200).to_dict())
    assert set(BYTES) == {"fp32", "fp16", "int8", "int4"}
