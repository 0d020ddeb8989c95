"""Speed of generation: the prompt at once (prefill), then token by token with the cache of keys and values.

Legend: B rows, L tokens of the prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .environment import device_name, library_versions
from .fields import checked_fields, require_count, require_libraries, require_text
from .progress import progress_bar
from .runner import evaluating
from .speed import backend_of, make_batch
from .timing import (
    MIN_REPEATS,
    Clock,
    Timing,
    clock_for,
    no_garbage_collection,
    require_repeats,
    require_spread,
    spread_of,
    turns,
)

_TIMINGS = ("dense_prefill", "compressed_prefill", "dense_token", "compressed_token")


@dataclass(frozen=True)
class DecodeSpeed:
    """Latency of generation under one condition; see `Speed` for the fields of the same name.

    Args:
        prompt: tokens per row that are read at once; of an encoder-decoder, those of the encoder.
        new_tokens: tokens per row that are then written one after the other.
        dense_prefill, compressed_prefill: from the prompt to the first token's scores.
        dense_token, compressed_token: one further token for all rows: per repeat the mean over ``new_tokens``.
        prefill_spread, token_spread: 10th and 90th percentile of dense / compressed over neighbouring pairs.
    """

    device: str
    backend: str
    dtype: str
    batch: int
    prompt: int
    new_tokens: int
    repeats: int
    threads: int
    dense_prefill: Timing
    compressed_prefill: Timing
    dense_token: Timing
    compressed_token: Timing
    prefill_spread: tuple[float, float]
    token_spread: tuple[float, float]
    libraries: Mapping[str, str]

    def __post_init__(self) -> None:
        require_text(self, "device", "backend", "dtype")
        require_count(self, "batch", "prompt", "new_tokens", "repeats", "threads")
        require_libraries(self)
        require_repeats(self)
        for name in _TIMINGS:
            if not isinstance(getattr(self, name), Timing):
                raise ValueError(f"DecodeSpeed: {name} must be a Timing, got {getattr(self, name)!r}")
        require_spread(self, "prefill_spread", "token_spread")

    @property
    def prefill_speedup(self) -> float:
        return self.dense_prefill.median_ms / self.compressed_prefill.median_ms

    @property
    def token_speedup(self) -> float:
        return self.dense_token.median_ms / self.compressed_token.median_ms

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Throughput of decoding (dense, compressed): all rows together, prefill left out."""
        return 1000 * self.batch / self.dense_token.median_ms, 1000 * self.batch / self.compressed_token.median_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DecodeSpeed:
        """Build from `to_dict`'s data. Raises ValueError naming unknown or missing keys."""
        values = checked_fields(cls, data)
        for name in _TIMINGS:
            values[name] = Timing(**checked_fields(Timing, values[name]))
        return cls(**values)


class Decoder:
    """One model and its cache: ``prefill()`` reads the prompt, each ``step()`` one more token for every row.

    The tokens are given, not chosen, so that two models do the same work whatever they would have written.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor], tokens_BT: Tensor) -> None:
        writer: Any = model
        self.model, self.inputs, self.tokens_BT = writer, inputs, tokens_BT
        self.two_sided = bool(writer.config.is_encoder_decoder)
        # generate() asks for the last position's scores only, where the model can leave out the others
        lean = "logits_to_keep" in inspect.signature(writer.forward).parameters
        self.options: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if lean else {})
        self.cache: Any = None
        self.encoded: Any = None

    def prefill(self) -> Tensor:
        """Scores after the prompt [B, vocabulary]; starts a new cache."""
        if self.two_sided:
            self.encoded = self.model.get_encoder()(**self.inputs)
            self.cache = None
            return self._forward(self.tokens_BT[:, :1])
        output = self.model(**self.inputs, **self.options)
        self.cache = output.past_key_values
        scores: Tensor = output.logits[:, -1]
        return scores

    def step(self, index: int) -> Tensor:
        """Scores after token ``index`` of those given [B, vocabulary]."""
        start = index + 1 if self.two_sided else index
        return self._forward(self.tokens_BT[:, start : start + 1])

    def _forward(self, token_B1: Tensor) -> Tensor:
        if self.two_sided:
            extra = {"encoder_outputs": self.encoded, "decoder_input_ids": token_B1}
            mask = {"attention_mask": self.inputs["attention_mask"]}
        else:
            extra, mask = {"input_ids": token_B1}, {}
        output = self.model(**extra, **mask, past_key_values=self.cache, **self.options)
        self.cache = output.past_key_values
        scores: Tensor = output.logits[:, -1]
        return scores


def benchmark_decode(
    dense: nn.Module,
    compressed: nn.Module,
    *,
    batch: int,
    prompt: int,
    new_tokens: int = 32,
    backend: str | None = None,
    repeats: int = MIN_REPEATS,
    warmup: int = 2,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> DecodeSpeed:
    """Time the generation of two models, one repeat of each in turn, on random prompts of full length.

    Args:
        dense, compressed: models that generate: decoders, or encoder-decoders; moved to ``device``.
        prompt, new_tokens: tokens per row; together at most the model's positions.
        repeats: timed generations of each, at least 20. warmup: untimed ones before.

    Raises:
        ValueError: a model that writes no text, too long a text, too few repeats, or scores of different shapes.
    """
    if repeats < MIN_REPEATS:
        raise ValueError(f"repeats must be at least {MIN_REPEATS} for an honest median, got {repeats}")
    if new_tokens < 1:
        raise ValueError(f"new_tokens must be at least 1, got {new_tokens}")
    for model in (dense, compressed):
        _check(model, prompt, new_tokens)
    device = torch.device(device)
    dtype = next((p.dtype for p in dense.parameters() if p.is_floating_point()), torch.get_default_dtype())
    inputs = {name: tensor.to(device) for name, tensor in make_batch(dense, batch, prompt, seed=seed).items()}
    generator = torch.Generator().manual_seed(seed + 1)
    vocabulary: Any = dense.config.vocab_size  # type: ignore[union-attr]
    tokens_BT = torch.randint(int(vocabulary), (batch, new_tokens + 1), generator=generator).to(device)
    sides = [Decoder(model.to(device), inputs, tokens_BT) for model in (dense, compressed)]
    clock = clock_for(device)
    prefills: tuple[list[float], list[float]] = ([], [])
    tokens: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as stack:
        for side in sides:
            stack.enter_context(evaluating(side.model))
        shapes = [tuple(side.prefill().shape) for side in sides]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the models differ in their scores: dense {shapes[0]}, compressed {shapes[1]}")
        for _ in range(warmup):
            for side in sides:
                _generate(side, new_tokens, clock)
        bar = stack.enter_context(progress_bar(progress, auto_refresh=False))
        line = bar.add_task("time generation, dense and compressed", total=repeats)
        stack.enter_context(no_garbage_collection())
        for order in turns(repeats):
            for which in order:
                prefill, token = _generate(sides[which], new_tokens, clock)
                prefills[which].append(prefill)
                tokens[which].append(token)
            bar.advance(line)
            bar.refresh()
    return DecodeSpeed(
        device=device_name(device),
        backend=backend_of(compressed) if backend is None else backend,
        dtype=str(dtype).removeprefix("torch."),
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=torch.get_num_threads(),
        dense_prefill=Timing.of(prefills[0]),
        compressed_prefill=Timing.of(prefills[1]),
        dense_token=Timing.of(tokens[0]),
        compressed_token=Timing.of(tokens[1]),
        prefill_spread=spread_of(*prefills),
        token_spread=spread_of(*tokens),
        libraries=library_versions(),
    )


def _generate(side: Decoder, new_tokens: int, clock: Clock) -> tuple[float, float]:
    """Milliseconds of the prefill, and of one token in the mean."""

    def steps() -> None:
        for index in range(new_tokens):
            side.step(index)

    call: Callable[[], Any] = side.prefill
    return clock(call), clock(steps) / new_tokens


def _check(model: nn.Module, prompt: int, new_tokens: int) -> None:
    writer: Any = model
    if not (hasattr(writer, "can_generate") and writer.can_generate()):
        raise ValueError(f"{type(model).__name__} writes no text: load it with kind='causal-lm' or 'seq2seq-lm'")
    longest = getattr(writer.config, "max_position_embeddings", None)
    needed = max(prompt, new_tokens + 1) if writer.config.is_encoder_decoder else prompt + new_tokens
    if longest is not None and needed > longest:
        raise ValueError(
            f"{type(model).__name__} has {longest} positions, {prompt} + {new_tokens} tokens need {needed}"
        )
