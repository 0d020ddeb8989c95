"""The stages of a recipe, in the order in which a recipe lists them, as records that a user's YAML is parsed into."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .rules import AttentionRule, InputQuantizer, Record, WeightQuantizer


class Prune(Record):
    """Masks from weights alone (``magnitude``), from weights and calibration data, block by block (``wanda``,
    ``sparsegpt``), or from the zeros of the model handed in (``inherit``). N:M attention maps switch on here too.

    Args:
        scope: unstructured sparsity only: threshold per GEMM (``layer``) or over all of them (``global``).
        samples: calibration samples, in the fixed shuffled order of the training data.
        block_size, damping: SparseGPT's column block and the share of the mean diagonal added to its Hessian.
        quantize: SparseGPT only: round each column to the rule's weight quantizer before its error is spread.
        offload: wanda and sparsegpt, on a CPU: weights that are not being pruned wait in a temporary file beside the
            output, so that memory does not grow with depth while data passes. The result is the same.
    """

    stage: Literal["prune"]
    method: Literal["magnitude", "wanda", "sparsegpt", "inherit"] = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    samples: int = Field(128, ge=1)
    block_size: int = Field(128, ge=1)
    damping: float = Field(0.01, gt=0)
    quantize: bool = False
    offload: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Prune:
        if self.scope == "global" and self.method != "magnitude":
            raise ValueError(f"scope: a global threshold is for magnitude; {self.method} ranks inside a GEMM")
        if self.quantize and self.method != "sparsegpt":
            raise ValueError(f"quantize: only sparsegpt spreads the error of rounding, not {self.method}")
        if self.offload and self.method not in ("wanda", "sparsegpt"):
            raise ValueError(f"offload: only wanda and sparsegpt go block by block, not {self.method}")
        return self


class Calibrate(Record):
    """Initialise the quantizers and switch them on (GPUSQ-TLM's PTQ step; PACT's percentiles).

    ``percentile`` None takes the maximum of |x| over ``batches`` batches, else that percentile of |x|. ``weight``,
    ``input`` and ``attention`` stand in for the rules' quantizers until the next calibrate stage: so one recipe goes
    from INT8 to INT4. The last calibrate stage names none. ``reextract_mask`` makes the masks anew from the weights by
    then, by magnitude; else those of the prune stage are inherited (Deep Compression's sparse INT4; ALGORITHMS E.2).
    """

    stage: Literal["calibrate"]
    batches: int = Field(10, ge=1)
    percentile: float | None = Field(None, gt=0, lt=100)
    reextract_mask: bool = False
    weight: WeightQuantizer | None = None
    input: InputQuantizer | None = None
    attention: AttentionRule | None = None

    @property
    def temporary(self) -> bool:
        """Whether it stands in for quantizers of the rules."""
        return any((self.weight, self.input, self.attention))


class Distill(Record):
    """Mixed distillation of GPUSQ-TLM: ``hard * CE + soft * KL + feature * MSE`` (equations 4-8; factors of Table 5).

    ``teacher``: ``dense`` is the model handed in, ``previous`` the model as the last fine-tuning stage left it.
    Plain knowledge distillation is ``feature: 0``.

    Args:
        blocks: ``all`` compares block by block; numbers are teacher blocks, 1-based, compared with the student's blocks
            1, 2, ...
        project: learned linear maps from the student's width to the teacher's, where these differ.
        cache: keep the teacher's outputs of every sample on disk instead of running it at each step.
    """

    method: Literal["mixed"] = "mixed"
    teacher: Literal["dense", "previous"]
    hard: float = Field(1.0, ge=0)
    soft: float = Field(10.0, ge=0)
    feature: float = Field(1.0, ge=0)
    temperature: float = Field(2.0, gt=0)
    kl_t_squared: bool = False
    features: tuple[Literal["attn_out", "block_out"], ...] = ("attn_out", "block_out")
    blocks: Literal["all"] | tuple[int, ...] = "all"
    project: bool = False
    cache: bool = False
    labels: bool = True


class Patient(Record):
    """Patient distillation (PKD; Sun et al. 2019): ``(1 - alpha) CE + alpha T^2 KL + beta L_PT``.

    Args:
        blocks: teacher blocks, 1-based, compared with the student's blocks 1, 2, ...; ``skip`` takes every
            (teacher / student)-th, leaving out the last, which the output loss covers.
        token: ``first`` compares one state of each row, [CLS] or in causal models the last real token, ``all`` that of
            every real token (token tasks).
        kl_reduction: ``elementwise`` divides by the number of classes too, as the public code does.
        cache: keep the teacher's outputs of every sample on disk instead of running it at each step.
    """

    method: Literal["patient"]
    teacher: Literal["dense"] = "dense"
    alpha: float = Field(0.5, ge=0, le=1)
    temperature: float = Field(10.0, gt=0)
    beta: float = Field(100.0, ge=0)
    blocks: Literal["skip"] | tuple[int, ...] = "skip"
    token: Literal["first", "all"] = "first"
    kl_reduction: Literal["batch", "elementwise"] = "batch"
    cache: bool = False


class Fixed(Record):
    """Masks stay as the prune stage made them (ASP)."""

    method: Literal["fixed"] = "fixed"


class SrSte(Record):
    """Masks follow |W| at every step; pruned weights get the straight-through gradient plus ``decay * W`` (SR-STE).

    ``decoupled`` applies the decay to the weights after the optimizer's step instead of to the gradient.
    """

    method: Literal["sr_ste"]
    decay: float = Field(2e-4, ge=0)
    decoupled: bool = False


class Admm(Record):
    """ADMM (NxMTransformer): ``rho / 2 * ||W - Z + U||^2`` in the loss, Z and U updated every iteration.

    Args:
        rho: penalty. decoupled: apply it to the weights after the optimizer's step instead (AdamW style).
        steps: optimizer steps per iteration; None: one epoch below 20,000 samples, else max(80, total // 50).
        masked_epochs: epochs after the final hard pruning, under the fixed mask; counted inside ``epochs``.
    """

    method: Literal["admm"]
    rho: float = Field(1e-3, ge=0)
    decoupled: bool = False
    steps: int | None = Field(None, ge=1)
    masked_epochs: float = Field(0.0, ge=0)


class Iterative(Record):
    """Iterative magnitude pruning with rewinding (IMP; BERT lottery tickets), one global threshold.

    Args:
        step: share of the original weights pruned at each event, until the rule's target. interval: steps between two.
        start_from: what the next stage starts from: ``trained`` weights, or the first ones ``rewound`` under the mask.
    """

    method: Literal["iterative"]
    step: float = Field(0.1, gt=0, lt=1)
    interval: int = Field(5000, ge=1)
    start_from: Literal["trained", "rewound"] = "trained"

    def events(self, zeros: float) -> int:
        """Number of prune events until a share ``zeros`` of the weights is pruned.

        Raises:
            ValueError: that is no whole number of steps; the message names the nearest shares that are.
        """
        count = zeros / self.step
        if round(count) >= 1 and abs(count - round(count)) < 1e-6:
            return round(count)
        near = [k * self.step for k in (math.floor(count), math.ceil(count)) if 0 < k * self.step < 1]
        raise ValueError(
            f"policy iterative prunes {self.step:.4g} of the weights at each event, and {zeros:.4g} is no multiple of "
            f"that: write sparsity {' or '.join(f'{share * 100:.4g}%' for share in near)}, or another step"
        )


class Dropout(Record):
    """Every dropout module goes linearly from ``start`` to ``end`` over ``steps`` steps (Deep Compression)."""

    start: float = Field(0.35, ge=0, lt=1)
    end: float = Field(0.20, ge=0, lt=1)
    steps: int = Field(10_000, ge=1)


DistillRecord = Annotated[Distill | Patient, Field(discriminator="method")]
Policy = Annotated[Fixed | SrSte | Admm | Iterative, Field(discriminator="method")]


class Finetune(Record):
    """Training with whatever is attached by then: masks moved by ``policy``, quantizers active once calibrated.

    ``epochs``, or, for runs on a corpus, optimizer ``steps``; the ``iterative`` policy knows its own number.
    ``precision: bfloat16`` runs the GEMMs in bfloat16 (autocast); weights, scales, optimizer and losses stay float32.
    ``stop_at_loss`` ends the stage early, once the running loss is at most this: GPUSQ-TLM's thresholds of both loops,
    which it does not print; 0 leaves the end to the epochs.
    """

    stage: Literal["finetune"]
    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(16, ge=1)
    warmup: float = Field(0.1, ge=0, lt=1)
    warmup_steps: int | None = Field(None, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    stop_at_loss: float = Field(0.0, ge=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    precision: Literal["float32", "bfloat16"] = "float32"
    policy: Policy = Fixed()
    dropout: Dropout | None = None
    distill: DistillRecord | None = None

    @field_validator("distill", mode="before")
    @classmethod
    def _default_distillation(cls, data: Any) -> Any:
        return {"method": "mixed", **data} if isinstance(data, dict) and "method" not in data else data

    @field_validator("policy", mode="before")
    @classmethod
    def _policy_by_name(cls, data: Any) -> Any:
        return {"method": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _consistent(self) -> Finetune:
        given = [name for name in ("epochs", "steps") if getattr(self, name) is not None]
        if isinstance(self.policy, Iterative):
            if given:
                raise ValueError(f"{given[0]}: the iterative policy trains `interval` steps per event; leave it out")
        elif len(given) != 1:
            raise ValueError(f"expected either epochs or steps, found {' and '.join(given) or 'neither'}")
        if isinstance(self.policy, Admm) and self.policy.masked_epochs >= (
            self.epochs or self.policy.masked_epochs + 1
        ):
            raise ValueError("policy.masked_epochs counts inside epochs and must be smaller")
        if self.stop_at_loss and isinstance(self.policy, Admm | Iterative):
            raise ValueError(f"stop_at_loss: policy {self.policy.method} needs all its steps; leave it out")
        return self


Stage = Annotated[Prune | Calibrate | Finetune, Field(discriminator="stage")]


class Storage(Record):
    """Number formats on disk. ``values``: kept weights of pruned GEMMs that are not quantized; ``other``: matrices that
    no rule touches (embeddings, heads); vectors (biases, LayerNorm) are always float32."""

    values: Literal["float16", "float32"] = "float16"
    other: Literal["float16", "float32"] = "float16"


class Student(Record):
    """A smaller student: the first ``blocks`` blocks, of the model handed in or of its pre-trained ancestor.

    PKD (Sun et al. 2019; thesis section 3) starts from the first blocks of the *pre-trained* model.
    """

    blocks: int = Field(ge=1)
    weights: Literal["teacher", "pretrained"] = "pretrained"
