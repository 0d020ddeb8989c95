"""What a recipe does to each role: sparsity patterns and quantizers, as records that a user's YAML is parsed into."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..models.adapter import BLOCK_ROLES, ROLES
from .masks import Pattern

Bits = Annotated[int, Field(ge=2, le=8)]


class Record(BaseModel):
    """Base of every record of a recipe: frozen; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Lsq(Record):
    """Symmetric with a learned scale (LSQ; GPUSQ-TLM stage 2): weights per output channel, inputs per tensor."""

    method: Literal["lsq"] = "lsq"
    bits: Bits = 8


class Absmax(Record):
    """Weights only: symmetric, per output channel, scale = max|w| / Qp of the current weight; nothing is learned."""

    method: Literal["absmax"]
    bits: Bits = 8


class Sawb(Record):
    """Weights only: statistics-aware clip value (SAWB; Deep Compression). ``gradient: plus`` is SAWB+.

    ``levels: zero-aligned`` has 2^k - 1 levels with an exact zero, which sparsity needs; ``full-range`` has 2^k and no
    zero. ``fit: own`` takes our own coefficients where none are published.
    """

    method: Literal["sawb"]
    bits: Bits = 8
    gradient: Literal["plus", "clipped"] = "plus"
    levels: Literal["zero-aligned", "full-range"] = "zero-aligned"
    fit: Literal["published", "own"] = "published"
    granularity: Literal["tensor", "channel"] = "tensor"


class MinMax(Record):
    """Inputs only: asymmetric, zero-aligned, range of the batch while training, its running mean in inference."""

    method: Literal["minmax"]
    bits: Bits = 8
    momentum: float = Field(0.1, gt=0, le=1)


class Pact(Record):
    """Inputs only: two learned clip values (two-sided PACT); ``plus`` adds PACT+'s gradient inside the range.

    ``low`` and ``high`` are the fractions of values by rank that initialise the clip values.
    """

    method: Literal["pact"]
    bits: Bits = 4
    plus: bool = False
    low: float = Field(0.01, ge=0, lt=0.5)
    high: float = Field(0.99, gt=0.5, le=1)


class Q8Bert(Record):
    """Symmetric per tensor: max|w| of the current weight; for inputs a running mean of max|x| (Q8BERT), or, when
    ``dynamic``, max|x| of each call."""

    method: Literal["q8bert"]
    bits: Bits = 8
    decay: float = Field(0.9999, ge=0, lt=1)
    dynamic: bool = False


class Dynamic(Record):
    """Post-training dynamic quantization: weights max|w| / 127.5 per tensor, inputs by the range of each call."""

    method: Literal["dynamic"]
    bits: Literal[8] = 8


def _without_method(data: Any) -> Any:
    """``{bits: 8}`` means LSQ, the default; a discriminated union needs to be told."""
    return {"method": "lsq", **data} if isinstance(data, dict) and "method" not in data else data


WeightQuantizer = Annotated[Lsq | Absmax | Sawb | Q8Bert | Dynamic, Field(discriminator="method")]
InputQuantizer = Annotated[Lsq | MinMax | Pact | Q8Bert | Dynamic, Field(discriminator="method")]
MapQuantizer = Annotated[Lsq | MinMax | Pact, Field(discriminator="method")]


class Rule(Record):
    """What is done to the GEMMs of some roles. ``block`` in ``roles`` stands for every GEMM inside the blocks.

    ``sparsity``: ``N:M``, or an unstructured share of zeros such as ``50%``.
    """

    roles: tuple[str, ...] = Field(min_length=1)
    sparsity: str | None = None
    weight: WeightQuantizer | None = None
    input: InputQuantizer | None = None
    skip_blocks: tuple[int, ...] = ()

    @field_validator("roles")
    @classmethod
    def _known_roles(cls, roles: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [role for role in roles if role not in (*ROLES, "block")]
        if unknown:
            raise ValueError(f"unknown role {unknown[0]!r}; allowed: block, {', '.join(ROLES)}")
        return tuple(dict.fromkeys(r for role in roles for r in (BLOCK_ROLES if role == "block" else (role,))))

    @field_validator("sparsity", mode="before")
    @classmethod
    def _valid_sparsity(cls, text: Any) -> str | None:
        # Before pydantic's own check: YAML reads an unquoted 2:4 as the number 124, and the parser says so.
        return None if text is None else str(parse_sparsity(text))

    @field_validator("weight", "input", mode="before")
    @classmethod
    def _default_method(cls, data: Any) -> Any:
        return _without_method(data)

    @model_validator(mode="after")
    def _consistent(self) -> Rule:
        if self.input is not None and self.weight is None:
            raise ValueError("input is quantized but weight is not; an integer GEMM needs both: add `weight:`")
        if isinstance(self.weight, Dynamic) != isinstance(self.input, Dynamic):
            raise ValueError("dynamic quantization is of weight and input together: write `method: dynamic` for both")
        if self.sparsity and isinstance(self.weight, Sawb) and self.weight.levels == "full-range":
            raise ValueError("full-range SAWB has no zero level, so pruned weights could not stay zero: zero-aligned")
        return self


class AttentionRule(Record):
    """What is done to attention maps: N of M probabilities kept per group of keys (GPUSQ-TLM's GEMM-MHA variant), and
    quantizers of the inputs of both products, Q K^T and P V."""

    sparsity: str | None = None
    renormalize: bool = False
    q: MapQuantizer | None = None
    k: MapQuantizer | None = None
    p: MapQuantizer | None = None
    v: MapQuantizer | None = None
    kinds: tuple[Literal["self", "cross"], ...] = Field(("self", "cross"), min_length=1)
    skip_blocks: tuple[int, ...] = ()

    @field_validator("sparsity", mode="before")
    @classmethod
    def _valid_pattern(cls, text: Any) -> str | None:
        return None if text is None else str(Pattern.parse(text))

    @field_validator("q", "k", "p", "v", mode="before")
    @classmethod
    def _default_method(cls, data: Any) -> Any:
        return _without_method(data)

    @model_validator(mode="after")
    def _does_something(self) -> AttentionRule:
        if self.sparsity is None and not any((self.q, self.k, self.p, self.v)):
            raise ValueError("neither sparsity nor a quantizer: leave `attention` out, or add `sparsity: '2:4'`")
        return self

    @property
    def quantized(self) -> bool:
        return any((self.q, self.k, self.p, self.v))


class EmbeddingRule(Record):
    """Embedding tables: int8 with one scale per row (``absmax``, storage only), or as Q8BERT trains them."""

    method: Literal["absmax", "q8bert"] = "absmax"
    bits: Literal[8] = 8


class Unstructured(Record):
    """A share of zeros without structure. ``str()`` gives the form of recipes, such as ``50%``."""

    zeros: float = Field(gt=0, lt=1)

    def __str__(self) -> str:
        return f"{self.zeros * 100:g}%"


def parse_sparsity(text: Any) -> Pattern | Unstructured:
    """``N:M`` or a share of zeros such as ``70%``.

    Raises:
        ValueError: neither; the message says what is allowed.
    """
    if isinstance(text, str) and text.strip().endswith("%"):
        try:
            return Unstructured(zeros=float(text.strip()[:-1]) / 100)
        except ValueError:
            raise ValueError(f"expected a share of zeros between 0% and 100%, found {text!r}") from None
    return Pattern.parse(text)
