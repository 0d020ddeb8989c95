"""The models that ``make bench-cpu`` and ``make bench-gpu`` time: shapes of the papers with random weights, squeezed in
one shot in the process. Speed depends on shapes and formats, not on what was learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .compress.attach import attach_, magnitude_masks_
from .compress.calibrate import calibrate_
from .compress.checkpoint import Resolved, assemble
from .compress.pack import pack, without_tied
from .compress.plan import Plan, make_plan
from .compress.recipe import Recipe
from .models.dense import build, describe, load_dense
from .models.kinds import Kind

RECIPE: dict[str, Any] = {
    "name": "bench-int8",
    "description": "2:4 by magnitude and static int8 in every GEMM of the blocks; nothing is trained",
    "source": "make bench-cpu, make bench-gpu",
    "rules": [
        {
            "roles": ["block"],
            "sparsity": "2:4",
            "weight": {"method": "lsq", "bits": 8},
            "input": {"method": "lsq", "bits": 8},
        }
    ],
    "stages": [{"stage": "prune", "method": "magnitude"}, {"stage": "calibrate", "batches": 2}],
    "storage": {"other": "float32"},
}


@dataclass(frozen=True)
class BenchModel:
    """One model of the benchmark.

    Args:
        source, kind, args: as ``load_dense`` takes them.
        sizes: tokens of a sequence, or (tokens read, tokens written); samples of a waveform; of an image one 0.
    """

    name: str
    source: str
    kind: Kind
    sizes: tuple[tuple[int, int], ...]
    args: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "tokens"

    @property
    def recipe(self) -> Recipe:
        """`RECIPE`; where a model writes text also for its vocabulary projection, as GPUSQ-TLM has it: half the work of
        OPT-125M."""
        if self.kind not in ("causal-lm", "seq2seq-lm"):
            return Recipe.parse(RECIPE, where="the benchmark's recipe")
        rules = [{**RECIPE["rules"][0], "roles": ["block", "final"]}]
        wider = {**RECIPE, "name": "bench-int8-final", "rules": rules, "untie_final_projection": True}
        return Recipe.parse(wider, where="the benchmark's recipe")

    def dense(self) -> nn.Module:
        """The dense float32 model, always the same weights."""
        return load_dense(self.source, kind=self.kind, model_args=self.args).model

    def label(self, size: tuple[int, int]) -> str:
        """How a size is called in tables."""
        if self.unit == "pixels":
            return "224x224"
        if self.unit == "samples":
            return f"{size[0] / 16_000:g} s"
        return str(size[0]) if not size[1] else f"{size[0]}->{size[1]}"


def _bert(width: int, blocks: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads, "intermediate_size": 4 * width
    }  # fmt: skip


def _opt(width: int, blocks: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width, "word_embed_proj_dim": width, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "ffn_dim": 4 * width,
    }  # fmt: skip


_BART = {
    "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12,
    "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
}  # fmt: skip
_SENTENCES = ((128, 0), (384, 0))

MODELS: dict[str, BenchModel] = {
    model.name: model
    for model in (
        BenchModel("minilm-l6", "transformers/bert", "classification", _SENTENCES, _bert(384, 6, 12)),
        BenchModel("bert-base", "transformers/bert", "classification", _SENTENCES, _bert(768, 12, 12)),
        BenchModel("bert-large", "transformers/bert", "classification", _SENTENCES, _bert(1024, 24, 16)),
        BenchModel("opt-125m", "transformers/opt", "causal-lm", ((2048, 0),), _opt(768, 12, 12)),
        BenchModel("opt-1.3b", "transformers/opt", "causal-lm", ((2048, 0),), _opt(2048, 24, 32)),
        BenchModel("bart-base", "transformers/bart", "seq2seq-lm", ((1024, 60),), _BART),
        BenchModel("vit-b16", "transformers/vit", "classification", ((197, 0),), {"num_labels": 1000}, "pixels"),
        BenchModel("wav2vec2-base", "transformers/wav2vec2", "ctc", ((160_000, 0),), {}, "samples"),
    )
}


def make_inputs(model: nn.Module, batch: int, size: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Random full-length rows for a model of `MODELS`, which are all of transformers: nothing is padded, so that no
    padding flatters a result."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    main: Any = model.main_input_name
    if main == "pixel_values":
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    if main == "input_values":
        return {"input_values": torch.randn((batch, size[0]), generator=generator)}
    first = 5  # above every special token
    input_ids = torch.randint(first, config.vocab_size, (batch, size[0]), generator=generator)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(first, config.vocab_size, (batch, size[1]), generator=generator)
    return inputs


@dataclass(frozen=True)
class Squeezed:
    """A squeezed model as packed tensors: each backend is built from the same ones."""

    description: dict[str, Any]
    tensors: dict[str, Tensor]
    plan: Plan

    def build(self, backend: Resolved, device: str = "cpu") -> nn.Module:
        """The model as ``load`` gives it, with the built-in choice of kernels."""
        return assemble(self.description, self.tensors, self.plan, backend, device)


def squeeze(model: nn.Module, samples: list[dict[str, Tensor]], recipe: Recipe | None = None) -> Squeezed:
    """Prune and quantize ``model``, which is used up, by `RECIPE` without another, calibrated on ``samples``."""
    recipe = recipe or Recipe.parse(RECIPE, where="the benchmark's recipe")
    plan = make_plan(model, recipe)
    attach_(model, plan)
    magnitude_masks_(model)
    calibrate_(model, samples)
    description = describe(model)
    return Squeezed(description, without_tied(pack(model, plan, recipe.storage), build(description), plan), plan)


def samples_of(model: nn.Module, size: tuple[int, int], count: int = 2) -> list[dict[str, Tensor]]:
    """Calibration batches of one row each."""
    return [make_inputs(model, 1, size, seed=1 + index) for index in range(count)]


def chosen(names: str | None) -> Iterator[BenchModel]:
    """The models of a comma-separated list, all without one.

    Raises:
        ValueError: an unknown name.
    """
    for name in names.split(",") if names else MODELS:
        if name not in MODELS:
            raise ValueError(f"unknown model {name!r}; allowed: {', '.join(MODELS)}")
        yield MODELS[name]
