"""What `squeezoo bench` measured, as terminal tables; None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from rich.table import Table

from .eval.decode_speed import DecodeSpeed
from .eval.loading import Loading, Memory
from .eval.ratio import speed_up
from .eval.speed import Speed
from .eval.task import Score
from .eval.throughput import Throughput


def speeds(found: Sequence[Speed]) -> Table:
    """Latency of whole calls."""
    table = Table("batch", "length", "dense ms", "compressed ms", "speed-up", "p10-p90")
    for speed in found:
        low, high = speed.speedup_spread
        length = f"{speed.audio_seconds:g} s" if speed.audio_seconds else str(speed.sequence or speed.image_size)
        table.add_row(
            str(speed.batch), length, f"{speed.dense.median_ms:.2f}", f"{speed.compressed.median_ms:.2f}",
            speed_up(speed.speedup), f"{low:.2f}-{high:.2f}",
        )  # fmt: skip
    return table


def decoding(found: Sequence[DecodeSpeed]) -> Table | None:
    """Latency of the prompt and of each further token."""
    if not found:
        return None
    table = Table("batch", "prompt", "new tokens", "what", "dense ms", "compressed ms", "speed-up", "p10-p90")
    for speed in found:
        parts = (
            ("prompt", speed.dense_prefill, speed.compressed_prefill, speed.prefill_spread),
            ("per token", speed.dense_token, speed.compressed_token, speed.token_spread),
        )
        for what, dense, compressed, (low, high) in parts:
            table.add_row(
                str(speed.batch), str(speed.prompt), str(speed.new_tokens), what, f"{dense.median_ms:.2f}",
                f"{compressed.median_ms:.2f}", speed_up(dense.median_ms / compressed.median_ms),
                f"{low:.2f}-{high:.2f}",
            )  # fmt: skip
    return table


def loading(found: Sequence[Loading | Memory]) -> Table | None:
    """Seconds from the call to the model, and the memory of a process that runs it."""
    if not found:
        return None
    table = Table("source", "backend or loader", "what", "value")
    for part in found:
        if isinstance(part, Loading):
            loader = part.loader.rpartition(":")[2]
            table.add_row(part.source, loader, "first load", f"{part.first_seconds:.2f} s")
            table.add_row(part.source, loader, "later loads, median", f"{part.warm.median_ms / 1000:.2f} s")
        else:
            table.add_row(part.source, part.backend, "tensors", f"{part.tensors / 1e6:.1f} MB")
            table.add_row(
                part.source, part.backend, f"peak of the process at batch {part.batch}",
                f"{part.run_peak / 1e6:.1f} MB, {part.baseline / 1e6:.1f} MB of it the libraries",
            )  # fmt: skip
    return table


def throughput_line(one: Throughput) -> str:
    """A whole evaluation against its forward passes alone."""
    rows = f"{one.samples:,} rows{'' if one.complete else ' (sample)'}"
    return (
        f"{one.task} {one.split}, {rows} in {one.batches} batches on {one.device}: "
        f"forward passes alone {median(one.bare_seconds):.2f} s, evaluation {median(one.evaluate_seconds):.2f} s; "
        f"{one.share:.1%} of their rate (median of {len(one.shares)} rounds, {min(one.shares):.1%} to "
        f"{max(one.shares):.1%}), {one.best_share:.1%} with the fastest of each"
    )


def glue_means_line(scores: Sequence[Score]) -> str | None:
    """Both means, labelled, where a model was scored on more than one GLUE task."""
    from .eval.glue import GLUE, glue_means

    if len({score.task for score in scores} & {task.name for task in GLUE}) < 2:
        return None
    means = glue_means(scores)
    geometric = "none (a score is negative)" if means.geometric is None else f"{means.geometric:.4f}"
    note = "" if means.complete else " (samples)"
    return f"mean over {', '.join(means.tasks)}{note}: arithmetic {means.arithmetic:.4f}, geometric {geometric}"
