"""The backbone of a model: everything but its head."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..models import adapter_for, find_sites


def backbone(model: nn.Module) -> nn.Module:
    """What transformers calls the base model; models of other libraries are one module and come back whole."""
    base = getattr(model, "base_model", None)
    return base if isinstance(base, nn.Module) else model


def backbone_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the backbone, each once; where the library knows no base model, all but the final projection's.

    A matrix shared by backbone and head (tied embeddings) belongs to the backbone.
    """
    base = backbone(model)
    if base is not model:
        yield from base.parameters()
        return
    final = find_sites(model, adapter_for(model)).final
    head = set() if final is None else {id(parameter) for parameter in final.module.parameters()}
    yield from (parameter for parameter in model.parameters() if id(parameter) not in head)
