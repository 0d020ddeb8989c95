"""Speed records and interleaved timing of real models."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from squeezoo.eval.speed import Speed, Timing, backend_of, benchmark, make_batch
from tiny import TIMM_ARGS, make
from torch import nn

TIMING = Timing(median_ms=2.0, p10_ms=1.5, p90_ms=3.0, min_ms=1.0)
GOOD: dict[str, Any] = {
    "device": "AMD EPYC 9554 (2 threads)",
    "backend": "Int8Linear",
    "dtype": "float32",
    "batch": 8,
    "sequence": 128,
    "image_size": None,
    "repeats": 30,
    "threads": 2,
    "dense": TIMING,
    "compressed": Timing(median_ms=1.0, p10_ms=0.9, p90_ms=1.2, min_ms=0.8),
    "speedup_spread": (1.5, 2.5),
    "libraries": {"torch": "2.13.0"},
}


def _vit(depth: int) -> nn.Module:
    import timm

    return timm.create_model("vit_tiny_patch16_224", **{**TIMM_ARGS, "depth": depth}).eval()


def test_timing_of_samples() -> None:
    """By hand: of 1..11 the median is 6, the 10th percentile 2, the 90th 10 (linear interpolation)."""
    assert Timing.of([float(i) for i in range(11, 0, -1)]) == Timing(6.0, 2.0, 10.0, 1.0)


@pytest.mark.parametrize(
    "values", [(2, 1.5, 3, float("nan")), (2, 1.5, 3, 0), (1, 1.5, 3, 1), (2, 1.5, 1.9, 1), (2, 1.5, float("inf"), 1)]
)
def test_timing_refuses_what_cannot_be_measured(values: tuple[float, ...]) -> None:
    """Not positive, not finite, or out of order."""
    with pytest.raises(ValueError, match="Timing needs"):
        Timing(*values)


@pytest.mark.parametrize("field", list(GOOD))
def test_speed_needs_every_field(field: str) -> None:
    """No condition of a measurement has a default."""
    with pytest.raises(TypeError, match=field):
        Speed(**{name: value for name, value in GOOD.items() if name != field})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", ""),
        ("backend", None),
        ("dtype", " "),
        ("batch", 0),
        ("sequence", None),
        ("sequence", 0),
        ("image_size", (8, 8)),
        ("repeats", 19),
        ("threads", 0),
        ("dense", 2.0),
        ("compressed", None),
        ("speedup_spread", (2.5, 1.5)),
        ("speedup_spread", (0.0, 1.5)),
        ("libraries", {}),
    ],
)
def test_speed_refuses_bad_values(field: str, value: Any) -> None:
    """Each value breaks the documented range of its field (a median needs at least 20 repeats)."""
    with pytest.raises(ValueError, match=r"Speed|libraries"):
        Speed(**{**GOOD, field: value})


def test_speed_survives_json_and_divides_medians() -> None:
    """2 ms over 1 ms is 2.0 times; text and image conditions both round-trip through JSON."""
    speed = Speed(**GOOD)
    assert speed.speedup == 2.0
    for record in (speed, Speed(**{**GOOD, "sequence": None, "image_size": (8, 9)})):
        assert Speed.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    with pytest.raises(ValueError, match="latency"):
        Speed.from_dict({**speed.to_dict(), "latency": 1})


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads waiting for each other on a busy machine would drown what these tests compare."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_fewer_blocks_are_faster() -> None:
    """8 blocks against 1 block of the same width: the shallow one wins by far, and loses by far when swapped."""
    deep, shallow = _vit(8), _vit(1)
    batch = make_batch(deep, 4)
    speed = benchmark(deep, shallow, batch, repeats=20, warmup=2)
    assert speed.speedup > 2
    assert speed.speedup_spread[1] > 2
    assert speed.dense.median_ms > speed.compressed.median_ms
    assert (speed.batch, speed.sequence, speed.image_size) == (4, None, (8, 8))
    assert (speed.backend, speed.dtype, speed.repeats) == ("pytorch", "float32", 20)
    assert speed.threads == torch.get_num_threads()
    assert speed.device.endswith("(1 thread)")
    assert benchmark(shallow, deep, batch, repeats=20, warmup=2).speedup < 0.5


@pytest.mark.usefixtures("one_thread")
def test_calls_are_interleaved() -> None:
    """One shape check and two warm-up rounds in order, then A B, B A, A B, ...; the garbage collector is off only while
    timing, and the modes of the models are restored."""
    a, b = make("bert"), make("bert").train()
    calls: list[tuple[str, bool, bool]] = []
    for name, model in (("a", a), ("b", b)):
        model.register_forward_pre_hook(
            lambda module, _, name=name: calls.append((name, gc.isenabled(), module.training))
        )
    benchmark(a, b, make_batch(a, 1, 4), repeats=20, warmup=2, backend="same")
    assert "".join(name for name, _, _ in calls) == "ab" * 3 + "abba" * 10
    assert [enabled for _, enabled, _ in calls] == [True] * 6 + [False] * 40
    assert not any(training for _, _, training in calls)
    assert gc.isenabled()
    assert (a.training, b.training) == (False, True)


def test_refuses_too_few_repeats_and_different_outputs() -> None:
    """19 repeats are below the documented 20; models with 3 and 5 classes do not compute the same thing."""
    model, other = make("timm_vit"), make("timm_vit")
    with pytest.raises(ValueError, match="at least 20"):
        benchmark(model, model, make_batch(model, 1), repeats=19)
    other.head = nn.Linear(32, 5)
    with pytest.raises(ValueError, match=r"dense \(1, 3\), compressed \(1, 5\)"):
        benchmark(model, other, make_batch(model, 1))


def test_make_batch_fits_the_model() -> None:
    """Shapes by definition; the same seed gives the same batch; no padding; too long or no length is refused."""
    bert = make("bert")
    batch = make_batch(bert, 3, 17)
    assert batch["input_ids"].shape == (3, 17)
    assert bool(batch["attention_mask"].all())
    assert torch.equal(batch["input_ids"], make_batch(bert, 3, 17)["input_ids"])
    assert not torch.equal(batch["input_ids"], make_batch(bert, 3, 17, seed=1)["input_ids"])
    assert make_batch(make("timm_vit"), 5)["pixel_values"].shape == (5, 1, 8, 8)
    for length in (None, 65):
        with pytest.raises(ValueError, match="1 to 64 tokens"):
            make_batch(bert, 1, length)


def test_speech_is_timed_by_seconds() -> None:
    """Half a second at 400 values a second is 200 values; the record names the seconds and nothing else."""
    model = make("wav2vec2")
    batch = make_batch(model, 2, audio_seconds=0.5, sampling_rate=400)
    assert batch["input_values"].shape == (2, 200)
    speed = benchmark(model, model, batch, repeats=20, warmup=1, sampling_rate=400, progress=False)
    assert (speed.audio_seconds, speed.sequence, speed.image_size, speed.batch) == (0.5, None, None, 2)
    assert Speed.from_dict(json.loads(json.dumps(speed.to_dict()))) == speed
    with pytest.raises(ValueError, match="audio_seconds above 0"):
        make_batch(model, 2, 128)


def test_throughput_and_old_records() -> None:
    """8 rows in 2 ms are 4000 a second; a record written before there was speech has no audio_seconds."""
    speed = Speed(**GOOD)
    assert speed.rows_per_second == (4000, 8000)
    old = {name: value for name, value in speed.to_dict().items() if name != "audio_seconds"}
    assert Speed.from_dict(old) == speed
    for value in (0, float("nan"), "1"):
        with pytest.raises(ValueError, match="audio_seconds"):
            Speed(**{**GOOD, "sequence": None, "audio_seconds": value})


def test_backend_names_this_packages_modules() -> None:
    """A model with one module class of the package inside names it; a plain one is pytorch."""
    model = make("timm_vit")
    assert backend_of(model) == "pytorch"
    model.head = type("Int8Linear", (nn.Linear,), {"__module__": "squeezoo.compress.runtime.cpu"})(32, 3)
    assert backend_of(model) == "Int8Linear"


@pytest.mark.gpu
def test_cuda_events() -> None:
    """On a GPU the device is its name and the shallow model is still the faster one."""
    deep, shallow = _vit(12), _vit(1)
    speed = benchmark(deep, shallow, make_batch(deep, 4), repeats=20, device="cuda")
    assert speed.device == torch.cuda.get_device_name()
    assert speed.speedup > 2
