"""The parts of a `Card`: plain records, complete or not constructible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..eval.task import Score

if TYPE_CHECKING:
    from ..compress.plan import Plan

RESULTS = "results.json"


@dataclass(frozen=True)
class Base:
    """The dense model: its name here, its Hub id and revision where it has them, and the licence of its weights.

    ``library`` is ``transformers`` or ``timm``; ``adapter`` names the record in ``models/``.
    """

    name: str
    hub_id: str | None
    revision: str | None
    licence: str
    library: str
    adapter: str


@dataclass(frozen=True)
class RecipeNote:
    """Which recipe, and the citation of the system it rebuilds."""

    name: str
    source: str


@dataclass(frozen=True)
class PlanSummary:
    """What was done to how many GEMMs. Empty ``patterns`` means nothing pruned, empty ``*_bits`` nothing quantized.

    ``accelerated`` counts the GEMMs whose shape a hardware 2:4 kernel takes; ``attention`` is the N:M of the maps.
    """

    gemms: int
    roles: tuple[str, ...]
    patterns: tuple[str, ...]
    weight_bits: tuple[int, ...]
    input_bits: tuple[int, ...]
    accelerated: int
    attention: str | None = None

    @classmethod
    def of(cls, plan: Plan) -> PlanSummary:
        """Summary of a plan, in the order of its GEMMs."""

        def distinct(values: Any) -> tuple[Any, ...]:
            return tuple(dict.fromkeys(value for value in values if value is not None))

        return cls(
            gemms=len(plan.gemms),
            roles=distinct(g.role for g in plan.gemms),
            patterns=distinct(g.sparsity for g in plan.gemms),
            weight_bits=distinct(g.weight_bits for g in plan.gemms),
            input_bits=distinct(g.input_bits for g in plan.gemms),
            accelerated=sum(g.accelerated for g in plan.gemms),
            attention=" and ".join(distinct(a.sparsity for a in plan.attention)) or None,
        )


@dataclass(frozen=True)
class Breakdown:
    """Where the bytes of the compressed files are; ``other`` is all but packed GEMMs: embeddings, config, tokenizer."""

    values: int
    indices: int
    scales: int
    other: int


@dataclass(frozen=True)
class Size:
    """Bytes and counts.

    Args:
        paper_dense_fp16_bytes, paper_bytes: the papers' count: GEMM weights of the blocks and the final projection
            only, indices counted, scales not (Yu et al. 2023, Table 1).
        true_dense_bytes, true_bytes: files on disk, without results.json, README.md and plots.
        true_dense_dtype: number format of the dense files, e.g. ``float32``.
        breakdown: sums to ``true_bytes``.
        parameters, nonzeros: of the compressed model, zeros counted and not counted.
    """

    paper_dense_fp16_bytes: int
    paper_bytes: int
    true_dense_bytes: int
    true_dense_dtype: str
    true_bytes: int
    breakdown: Breakdown
    parameters: int
    nonzeros: int


@dataclass(frozen=True)
class StorageForm:
    """All matrices of one form in the weight file, together.

    Args:
        form: ``2:4`` or another N:M, ``bitmap`` (unstructured zeros left out), ``dense``, ``table`` (embeddings).
        number: ``int8``, ``int4``, ``float16``, ...
        count: of matrices. weights: zeros included. bytes: of values, indices and bitmaps. scale_bytes: beside them.
        note: what a reader should know, e.g. that zeros are stored; may be empty.
    """

    form: str
    number: str
    count: int
    weights: int
    bytes: int
    scale_bytes: int
    note: str

    @property
    def bits(self) -> float:
        """Stored bits per weight of the dense matrix, scales left out (ALGORITHMS F counts so)."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class ScoreRow:
    """One score of one variant: ``dense``, ``compressed`` (what the card publishes), or another one to compare with."""

    variant: str
    score: Score


@dataclass(frozen=True)
class Stage:
    """One stage as it ran; None where a field does not apply (pruning has no learning rate)."""

    name: str
    epochs: float | None
    steps: int | None
    batch: int | None
    learning_rate: float | None
    seconds: float


@dataclass(frozen=True)
class Training:
    """How the weights came to be: ``samples`` training rows, ``seconds`` for all stages together, on ``device``."""

    seed: int
    samples: int
    seconds: float
    device: str
    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], seed: int, device: str) -> Training:
        """From the ``training`` records of a checkpoint's manifest, one per stage; ``device`` names the hardware."""

        def stage(record: Mapping[str, Any]) -> Stage:
            steps = record.get("steps")
            return Stage(
                name=record["stage"],
                epochs=record.get("epochs"),
                steps=None if steps is None else int(steps),
                batch=record.get("batch_size"),
                learning_rate=record.get("learning_rate"),
                seconds=record["seconds"],
            )

        stages = tuple(stage(record) for record in records)
        samples = max((record.get("samples", 0) for record in records), default=0)
        return cls(seed, samples, round(sum(s.seconds for s in stages), 1), device, stages)


@dataclass(frozen=True)
class Data:
    """The data behind one task of ``scores``.

    Args:
        task: the task's name, e.g. ``glue/sst2``. name: for people, e.g. ``SST-2``.
        pipeline: the Hub's task id, e.g. ``text-classification``.
        hub_id, config: the Hub dataset that holds the same rows, or None.
        image: (channels, height, width) that the model reads, None for text.
        example: one text, or one pair of texts, to try the model with; empty for images.
        licence: of the rows. note: citation and what else a user of the weights must know.
    """

    task: str
    name: str
    pipeline: str
    hub_id: str | None
    config: str | None
    image: tuple[int, int, int] | None
    example: tuple[str, ...]
    licence: str
    note: str


@dataclass(frozen=True)
class Published:
    """One number as printed in a paper; never mixed with measured ones. ``note``: typos, other splits, other models."""

    source: str
    metric: str
    dense: float | None
    compressed: float | None
    note: str
