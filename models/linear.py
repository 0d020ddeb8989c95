"""The two kinds of linear module, ``nn.Linear`` and transformers' ``Conv1D``, seen as one: a matrix [out, in]."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from .errors import AdapterError

# What each layout is in code, for messages.
CLASS_OF_LAYOUT = {"out_in": "nn.Linear", "in_out": "Conv1D"}


def stored_weight(module: nn.Module) -> Tensor | None:
    """The trained tensor behind ``module.weight``, without running a parametrization; None when there is none."""
    if is_parametrized(module, "weight"):
        parametrizations = module.parametrizations
        assert isinstance(parametrizations, nn.ModuleDict)
        chain = parametrizations["weight"]
        assert isinstance(chain, ParametrizationList)
        original = getattr(chain, "original", None)  # weight norm keeps original0 and original1 instead
        return original if isinstance(original, Tensor) else None
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def layout_of(module: nn.Module) -> str | None:
    """``out_in`` for a module made like ``nn.Linear``, ``in_out`` for one made like ``Conv1D``, None for any other.

    Judged by attributes, so that parallel linears of other libraries count too.
    """
    weight = stored_weight(module)
    if weight is None or weight.dim() != 2:
        return None
    if hasattr(module, "nf"):
        return "in_out"
    pairs = (("in_features", "out_features"), ("input_size", "output_size"))  # the second: Megatron's parallel linears
    return "out_in" if any(hasattr(module, i) and hasattr(module, o) for i, o in pairs) else None


def features(name: str, module: nn.Module, layout: str) -> tuple[int, int]:
    """(out_features, in_features) of a module that is said to have ``layout``.

    Raises:
        AdapterError: the module holds no matrix, or holds it the other way round.
    """
    found = layout_of(module)
    class_name = type(module).__name__.removeprefix("Parametrized")
    if found is None:
        raise AdapterError(
            f"`{name}` is a {class_name}, which is no linear: expected a module with a 2-D `weight` and in_features / "
            f"out_features (nn.Linear) or nf (Conv1D). Correct the pattern that matches it."
        )
    if found != layout:
        raise AdapterError(
            f"`{name}` is a {class_name}, which stores its weight {found.replace('_', ', ')} like "
            f"{CLASS_OF_LAYOUT[found]}, but its site says layout={layout!r}: write layout={found!r}"
        )
    weight = stored_weight(module)
    assert weight is not None
    out_features, in_features = weight.shape if layout == "out_in" else reversed(weight.shape)
    return int(out_features), int(in_features)


def tied_to_embedding(model: nn.Module, module: nn.Module) -> bool:
    """Whether the weight of ``module`` is the very parameter of an ``nn.Embedding`` of the model."""
    weight = stored_weight(module)
    embeddings = (other for other in model.modules() if isinstance(other, nn.Embedding))
    return any(stored_weight(embedding) is weight for embedding in embeddings)


def nothing_beside(child: str, children: Mapping[str, nn.Module], harmless: Collection[str]) -> bool:
    """Whether the siblings of module ``child`` are all in ``harmless`` or do nothing in evaluation mode."""
    parent = child.rpartition(".")[0]
    siblings = {name: m for name, m in children.items() if name.rpartition(".")[0] == parent and name != child}
    return all(name in harmless or isinstance(m, (nn.Dropout, nn.Identity)) for name, m in siblings.items())
