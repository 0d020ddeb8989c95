"""Timing of generation: the cached steps compute what a full forward computes, the order of calls, and the record."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from squeezoo.eval.decode_speed import Decoder, DecodeSpeed, benchmark_decode
from squeezoo.eval.speed import Timing, make_batch
from tiny import make

GENERATORS = ["gpt2", "llama", "opt", "bart"]
TIMING = Timing(2.0, 1.5, 3.0, 1.0)
GOOD: dict[str, Any] = {
    "device": "NVIDIA H200", "backend": "pytorch", "dtype": "float32", "batch": 4, "prompt": 128, "new_tokens": 32,
    "repeats": 20, "threads": 2, "dense_prefill": TIMING, "compressed_prefill": Timing(1.0, 0.9, 1.2, 0.8),
    "dense_token": TIMING, "compressed_token": TIMING, "prefill_spread": (1.5, 2.5), "token_spread": (0.9, 1.1),
    "libraries": {"torch": "2.13.0"},
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATORS)
def test_cached_steps_equal_a_full_forward(name: str) -> None:
    """The scores after prompt and tokens, step by step with the cache, are those of one forward without a cache: so
    what is timed is generation, and nothing is left out."""
    model: Any = make(name).eval()
    inputs = make_batch(model, 2, 7)
    tokens_BT = torch.randint(4, 100, (2, 4), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(model, inputs, tokens_BT)
    with torch.inference_mode():
        found = [decoder.prefill(), *(decoder.step(index) for index in range(3))]
        if model.config.is_encoder_decoder:
            whole = model(**inputs, decoder_input_ids=tokens_BT, use_cache=False).logits
            expected = [whole[:, index] for index in range(4)]
        else:
            ids = torch.cat([inputs["input_ids"], tokens_BT[:, :3]], dim=1)
            whole = model(input_ids=ids, use_cache=False).logits
            expected = [whole[:, 6 + index] for index in range(4)]
        again = decoder.prefill()
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, step=step: f"step {step}: {text}")
    torch.testing.assert_close(again, found[0])  # a new cache, nothing of the old text


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_the_record_says_what_was_run(name: str) -> None:
    """Real timings of a model against itself; they survive JSON, and throughput is rows over time."""
    model = make(name)
    speed = benchmark_decode(model, model, batch=2, prompt=5, new_tokens=3, warmup=1, progress=False)
    assert (speed.batch, speed.prompt, speed.new_tokens, speed.repeats) == (2, 5, 3, 20)
    assert (speed.dtype, speed.backend, speed.threads) == ("float32", "pytorch", torch.get_num_threads())
    assert speed.tokens_per_second[0] == pytest.approx(2000 / speed.dense_token.median_ms)
    assert DecodeSpeed.from_dict(json.loads(json.dumps(speed.to_dict()))) == speed


def test_the_two_models_take_turns() -> None:
    """One shape check and one warm-up round, then A B, B A, ...: a prefill of 5 tokens and 2 single tokens each."""
    models = make("gpt2"), make("gpt2")
    calls: list[tuple[str, int]] = []
    for name, model in zip("ab", models, strict=True):
        model.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.append((name, kwargs["input_ids"].shape[1])), with_kwargs=True
        )
    benchmark_decode(*models, batch=1, prompt=5, new_tokens=2, warmup=1, progress=False)
    assert calls[:2] == [("a", 5), ("b", 5)]
    assert "".join(name for name, length in calls[2:] if length == 5) == "ab" + "abba" * 10
    assert [length for _, length in calls[2:]] == [5, 1, 1] * 42


@pytest.mark.parametrize("field", list(GOOD))
def test_every_field_is_needed(field: str) -> None:
    with pytest.raises(TypeError, match=field):
        DecodeSpeed(**{name: value for name, value in GOOD.items() if name != field})


@pytest.mark.parametrize(
    ("field", "value"),
    [("device", ""), ("batch", 0), ("prompt", None), ("new_tokens", 0), ("repeats", 19), ("dense_token", 2.0),
     ("token_spread", (2, 1)), ("libraries", {})],
)  # fmt: skip
def test_bad_values_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"DecodeSpeed|libraries"):
        DecodeSpeed(**{**GOOD, field: value})


def test_ratios_of_medians() -> None:
    """2 ms over 1 ms; four rows in 2 ms are 2000 tokens a second."""
    speed = DecodeSpeed(**GOOD)
    assert (speed.prefill_speedup, speed.token_speedup, speed.tokens_per_second) == (2, 1, (2000, 2000))


def test_what_cannot_be_timed_is_refused() -> None:
    """No generator, more tokens than the tiny model's 64 positions, too few repeats."""
    with pytest.raises(ValueError, match="writes no text"):
        benchmark_decode(make("bert"), make("bert"), batch=1, prompt=4)
    gpt2 = make("gpt2")
    with pytest.raises(ValueError, match="64 positions, 40 \\+ 30 tokens need 70"):
        benchmark_decode(gpt2, gpt2, batch=1, prompt=40, new_tokens=30)
    with pytest.raises(ValueError, match="at least 20"):
        benchmark_decode(gpt2, gpt2, batch=1, prompt=4, repeats=3)
    with pytest.raises(ValueError, match="new_tokens"):
        benchmark_decode(gpt2, gpt2, batch=1, prompt=4, new_tokens=0)


@pytest.mark.gpu
def test_generation_on_a_gpu() -> None:
    """CUDA events; the device is the GPU's name."""
    model = make("gpt2")
    speed = benchmark_decode(model, model, batch=2, prompt=5, new_tokens=3, device="cuda", progress=False)
    assert speed.device == torch.cuda.get_device_name()
