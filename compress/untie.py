"""Give a final projection that shares its matrix with the token embedding a matrix of its own (ALGORITHMS A.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..models.linear import stored_weight, tied_to_embedding


def untie_(model: nn.Module, name: str) -> int:
    """Copy the tied matrix of the module ``name``, in place. Returns the bytes that the model has grown by, 0 if the
    module had a matrix of its own already.

    A transformers model is told so in its configuration (``tie_word_embeddings = False``), which
    `models.dense.describe` writes down: a model built from that description is untied, and nothing ties it again. Other
    tied tables (BART's encoder and decoder embeddings) stay one parameter; a rebuilt model has them as separate
    parameters of equal values.

    Raises:
        AttributeError: there is no such module.
    """
    module = model.get_submodule(name)
    if not tied_to_embedding(model, module):
        return 0
    weight = stored_weight(module)
    assert isinstance(weight, Tensor)
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for config in _configs(model):
        config.tie_word_embeddings = False
    for part_name, part in model.named_modules():
        # transformers keeps the names of what it ties: {target: source}
        keys = getattr(part, "all_tied_weights_keys", None)
        if isinstance(keys, dict):
            own = f"{name}.weight".removeprefix(f"{part_name}." if part_name else "")
            for target in [target for target, source in keys.items() if own in (target, source)]:
                del keys[target]
    return weight.numel() * weight.element_size()


def _configs(model: nn.Module) -> list[Any]:
    """The configuration and, where it nests one, that of the text model; only those that say that they tie."""
    config: Any = getattr(model, "config", None)
    nested = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = [config] if nested is None or nested is config else [config, nested]
    return [entry for entry in found if getattr(entry, "tie_word_embeddings", False)]
