"""A realistic card, built in memory; no number in it is a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from squeezoo.eval.speed import Speed, Timing
from squeezoo.eval.task import Score
from squeezoo.zoo_cards.card import (
    Base,
    Breakdown,
    Card,
    PlanSummary,
    Published,
    RecipeNote,
    ScoreRow,
    Size,
    Stage,
    Training,
)
from squeezoo.zoo_cards.datasets import describe_task

LIBRARIES = {"squeezoo": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}


def make_score(value: float, **changes: Any) -> Score:
    fields: dict[str, Any] = dict(
        task="glue/sst2", task_version=1, split="dev", metric="accuracy", value=value, samples=872, complete=True,
        higher_is_better=True, libraries=LIBRARIES, seed=0, settings={"max_length": 128},
    )  # fmt: skip
    return Score(**{**fields, **changes})


def make_speed(dense_ms: float, compressed_ms: float, **changes: Any) -> Speed:
    ratio = dense_ms / compressed_ms
    fields: dict[str, Any] = dict(
        device="Test CPU (2 threads)", backend="cpu-int8 (oneDNN)", dtype="float32", batch=8, sequence=128,
        image_size=None, repeats=30, threads=2, dense=make_timing(dense_ms), compressed=make_timing(compressed_ms),
        speedup_spread=(0.95 * ratio, 1.05 * ratio), libraries=LIBRARIES,
    )  # fmt: skip
    return Speed(**{**fields, **changes})


def make_timing(median: float) -> Timing:
    return Timing(median_ms=median, p10_ms=0.98 * median, p90_ms=1.04 * median, min_ms=0.97 * median)


def make_card(**changes: Any) -> Card:
    fields: dict[str, Any] = dict(
        name="minilm-l6.sst2.gpusq-gemm-int8",
        base=Base(
            name="all-MiniLM-L6-v2", hub_id="sentence-transformers/all-MiniLM-L6-v2", revision="0.1.0",
            licence="Apache-2.0", library="transformers", adapter="bert",
        ),
        recipe=RecipeNote("gpusq-gemm-int8", "Yu, Chen, Gan 2023, Findings of ACL, 2023.findings-acl.15, section 3"),
        plan=PlanSummary(
            gemms=37, roles=("q", "k", "v", "attn_out", "ffn_up", "ffn_down", "final"), patterns=("2:4",),
            weight_bits=(8,), input_bits=(8,), accelerated=36,
        ),
        size=Size(
            paper_dense_fp16_bytes=21_233_664, paper_bytes=6_635_520, true_dense_bytes=91_600_000,
            true_dense_dtype="float32", true_bytes=31_900_000,
            breakdown=Breakdown(values=5_308_416, indices=1_327_104, scales=50_000, other=25_214_480),
            parameters=22_713_986, nonzeros=17_405_570,
        ),
        scores=(
            ScoreRow("dense", make_score(0.9174)), ScoreRow("asp-2-4", make_score(0.9060)),
            ScoreRow("compressed", make_score(0.9140)),
        ),
        speeds=(make_speed(120.0, 52.0), make_speed(14.0, 7.0, batch=1)),
        data=(describe_task("glue/sst2"),),
        training=Training(
            seed=0, samples=67_349, seconds=12_000.0, device="Test CPU",
            stages=(
                Stage("prune", None, None, None, None, 0.4), Stage("finetune", 3.0, 12_630, 16, 2.4e-5, 6000.0),
                Stage("calibrate", None, None, None, None, 4.0), Stage("finetune", 3.0, 12_630, 16, 2.4e-5, 5995.6),
            ),
        ),
        commands=("squeezoo compress runs/dense --recipe gpusq-gemm-int8 --task glue/sst2 --out runs/small",),
        limits=("English film reviews only.",),
        published=(Published("Yu et al. 2023, Table 1", "SST-2 accuracy, BERT-base", 93.5, 95.3, "GLUE test server"),),
        weights="reproducible", date="2026-01-31", squeezoo="0.1.0", code="0123abc",
    )  # fmt: skip
    return Card(**{**fields, **changes})


@pytest.fixture
def card() -> Card:
    return make_card()


@pytest.fixture
def new_card() -> Callable[..., Card]:
    """`make_card(**changes)`."""
    return make_card


@pytest.fixture
def new_score() -> Callable[..., Score]:
    """`make_score(value, **changes)`: SST-2 dev accuracy unless changed."""
    return make_score


@pytest.fixture
def new_speed() -> Callable[..., Speed]:
    """`make_speed(dense_ms, compressed_ms, **changes)`."""
    return make_speed
