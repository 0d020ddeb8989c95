"""A model's forward pass as an ONNX file in which every quantized GEMM is one node that carries the module's name.

Exporters rename, transpose and merge weights, so matrices cannot be found again by their names. Instead each module is
replaced by a placeholder that writes a node ``squeezoo::Gemm(x)`` with the attribute ``name``; its bias is an ordinary
addition behind it. ``onnx_graph.py`` puts the matrix, as integers, in the place of the node.

The tracer of torch.onnx is used (``dynamo=False``): it needs no package but onnx, and exports all of our architectures
in a fraction of the other exporter's time. It fixes what Python computes from shapes, so what was written is run on a
second shape (``onnx_export.py``).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.describe import library_of
from ..models.quiet import quiet

DOMAIN, NODE = "squeezoo", "Gemm"
OPSET = 20  # Gelu is one operator since 20; the tracer knows none beyond

Batch = Mapping[str, Tensor]


def scores(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The model's own outputs by their names: ``logits``, or ``start_logits`` and ``end_logits``."""
    if library_of(model) == "timm":
        return {"logits": model(batch["pixel_values"])}
    generates: Any = getattr(model, "can_generate", None)
    options = {"use_cache": False} if generates() else {}
    output = model(**batch, **options)
    names = ("logits",) if output.get("logits") is not None else ("start_logits", "end_logits")
    return {name: output[name] for name in names}


def with_token_types(model: Any, processor: Any, batch: Batch) -> dict[str, Tensor]:
    """``batch`` with token_type_ids of zeros where the tokenizer, or without one the config, has such ids."""
    found = dict(batch)
    if "input_ids" in batch and "token_type_ids" in inspect.signature(model.forward).parameters:
        names = getattr(processor, "model_input_names", None)
        if "token_type_ids" in names if names else getattr(model.config, "type_vocab_size", 0) > 1:
            found["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return found


def axis_names(name: str, tensor: Tensor, batch: Batch) -> dict[int, str]:
    """The axes of an input or output that may have any length."""
    if name == "pixel_values" or tensor.dim() == 1 or (name == "logits" and tensor.dim() == 2):
        return {0: "batch"}
    if name == "decoder_input_ids" or (name == "logits" and "decoder_input_ids" in batch):
        return {0: "batch", 1: "decoder_sequence"}
    if "input_values" in batch:
        return {0: "batch", 1: "frames" if name == "logits" else "samples"}
    return {0: "batch", 1: "sequence"}


def mark_(model: nn.Module, shapes: Mapping[str, tuple[int, int]], tables: Collection[str]) -> None:
    """Replace modules in place: each GEMM (name -> out_features, in_features) by its placeholder, int8 ``tables`` by
    modules that the tracer takes."""
    for name in (*shapes, *tables):
        parent, _, child = name.rpartition(".")
        module: Any = model.get_submodule(name)
        fresh = _Placeholder(name, module, *shapes[name]) if name in shapes else _Table(module.q_RD, module.scale_R)
        setattr(model.get_submodule(parent), child, fresh.eval())


def write_traced(model: nn.Module, batch: Batch, outputs: Batch, file: Path) -> None:
    """Trace a marked ``model`` on ``batch`` into ``file``; ``outputs``: what `scores` gave for ``batch``.

    Raises:
        RuntimeError, ValueError, TypeError, ...: whatever the tracer cannot follow.
    """
    axes = {name: axis_names(name, tensor, batch) for name, tensor in (*batch.items(), *outputs.items())}
    with torch.no_grad(), warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")  # of values that the tracer fixes: the second shape shows whether they matter
        torch.onnx.export(
            _Scores(model, list(batch)).eval(),
            tuple(batch.values()),
            str(file),
            input_names=list(batch),
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=OPSET,
            custom_opsets={DOMAIN: 1},
            dynamo=False,
        )


class _Scores(nn.Module):
    """`scores` of tensors by position, as the tracer calls it."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(scores(self.model, dict(zip(self.names, tensors, strict=True))).values())


class _Placeholder(nn.Module):
    """In the place of one linear; its values are zeros, since the tracer records operators and shapes only."""

    def __init__(self, name: str, module: nn.Module, out_features: int, in_features: int) -> None:
        super().__init__()
        self.name, self.out_features, self.in_features = name, out_features, in_features
        self.weight, self.bias = module.weight, module.bias  # the weight for code that asks for its type

    def forward(self, x: Tensor) -> Tensor:
        y = _Marked.apply(x, self.name, self.out_features, x.dim())
        return y if self.bias is None else y + self.bias


class _Table(nn.Module):
    """`Int8Embedding`, which refuses to give the state dict that the tracer asks for."""

    q_RD: Tensor
    scale_R: Tensor

    def __init__(self, q_RD: Tensor, scale_R: Tensor) -> None:
        super().__init__()
        self.register_buffer("q_RD", q_RD)
        self.register_buffer("scale_R", scale_R)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.q_RD).float() * F.embedding(ids, self.scale_R[:, None])


class _Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, out_features: int, rank: int) -> Tensor:
        return x.new_zeros(*x.shape[:-1], out_features)

    @staticmethod
    def symbolic(g: Any, x: Any, name: str, out_features: int, rank: int) -> Any:
        y = g.op(f"{DOMAIN}::{NODE}", x, name_s=name, rank_i=rank)
        sizes = x.type().sizes()
        if sizes is not None:
            y.setType(x.type().with_sizes([*sizes[:-1], out_features]))
        return g.op("Identity", y)  # the tracer warns of each last node whose domain is not ONNX's own
