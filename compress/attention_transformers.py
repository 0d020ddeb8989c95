"""transformers' door: one attention implementation for all of its models, registered when it is first needed.

Registered under one name twice: as an attention function, and as a mask function, without which transformers would
leave out the masks. The model's configurations are set to that name; modules without a compressor go on computing what
their own ``eager`` function does. The setting is not saved in config.json. Checked with transformers 5.23.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .attention_hooks import AttentionDoorError, Door
from .attention_map import ATTENTION_MAP, AttentionMapCompressor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMPLEMENTATION = "squeezoo"
_BEFORE = "_squeezoo_attention_before"
_FIRST_KEY = "squeezoo_first_key"
# Arguments that change the map in ways that sparse_attention does not know.
_UNKNOWN = ("softcap", "s_aux", "sinks", "indices", "block_indices", "cache")


def door_transformers(module: nn.Module) -> Door | None:
    """The door of every transformers attention module that calls the ``AttentionInterface``, None for other modules."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names or not hasattr(module, "config"):
        return None
    return Door("transformers", lambda _: None, lambda _: None, routed=True)


def routed_models(model: nn.Module, attentions: Iterable[nn.Module]) -> list[PreTrainedModel]:
    """The outermost transformers models that hold these attention modules, checked to be ready for `route_`.

    Raises:
        AttentionDoorError: an attention module outside of any, or a model that cannot change its implementation.
    """
    wanted = {id(module) for module in attentions}
    if not wanted:
        return []
    found = _outermost(model)
    outside = wanted - {id(module) for inner in found for module in inner.modules()}
    if outside:
        name = next(name for name, module in model.named_modules() if id(module) in outside)
        raise AttentionDoorError(
            f"{name}: this attention module stands outside of any transformers model, so nothing sets its "
            "implementation and its masks; attach to a PreTrainedModel that holds it"
        )
    found = [inner for inner in found if any(id(module) in wanted for module in inner.modules())]
    for inner in found:
        if not inner._can_set_attn_implementation():
            raise AttentionDoorError(
                f"{type(inner).__name__} cannot change its attention implementation: transformers finds no call of "
                "the AttentionInterface in its source"
            )
        if getattr(inner.config, "output_attentions", False):
            raise AttentionDoorError(
                f"{type(inner).__name__}: config.output_attentions is True, which transformers allows for its eager "
                "implementation only; set it to False and pass output_attentions=True to the call instead"
            )
    return found


def route_(models: Iterable[PreTrainedModel]) -> None:
    """Switch whole models to our implementation, sub-models and their configurations included."""
    _register()
    for model in models:
        if hasattr(model, _BEFORE):
            continue  # attached before, other maps of it
        before = {name: inner.config._attn_implementation for name, inner in _inner(model)}
        setattr(model, _BEFORE, before)
        model.set_attn_implementation(IMPLEMENTATION)


def unroute_(model: nn.Module) -> None:
    """Put every implementation back that `route_` changed in ``model``."""
    for outer in _outermost(model):
        before: dict[str, str] | None = outer.__dict__.pop(_BEFORE, None)
        if before is None:
            continue
        outer.set_attn_implementation(before[""])
        for name, inner in _inner(outer):
            if inner.config._attn_implementation != before[name]:
                inner.set_attn_implementation(before[name])


def _outermost(model: nn.Module) -> list[PreTrainedModel]:
    import sys

    if "transformers.modeling_utils" not in sys.modules:
        return []  # then no module of the model can be one of its
    from transformers.modeling_utils import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return [model]
    return [inner for child in model.children() for inner in _outermost(child)]


def _inner(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    from transformers.modeling_utils import PreTrainedModel

    return [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]


def _register() -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _mask(**kwargs: Any) -> Tensor | None:
    """transformers' own eager mask. Where a sliding cache has dropped keys it also says how many, for the groups."""
    from transformers.masking_utils import eager_mask

    mask: Tensor | None = eager_mask(**kwargs)
    dropped = kwargs.get("kv_offset", 0)  # an int, or a tensor for static caches
    if mask is not None and not (isinstance(dropped, int) and dropped == 0):
        setattr(mask, _FIRST_KEY, int(dropped))
    return mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function that transformers' attention modules call: [B, H, Q, D] -> [B, Q, H, D] and the probabilities."""
    compressor = module._modules.get(ATTENTION_MAP)
    if not isinstance(compressor, AttentionMapCompressor) or compressor.idle:
        eager = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
        return eager(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    for name in _UNKNOWN:
        if kwargs.get(name) is not None:
            raise AttentionDoorError(f"{type(module).__name__} passes {name!r} to its attention, which N:M maps lack")
    first_key = getattr(attention_mask, _FIRST_KEY, 0)
    mask, bias = attention_mask, kwargs.get("position_bias")
    if bias is not None:
        mask = bias if mask is None else mask + bias
    out, probs = compressor(query, key, value, mask, scaling, dropout, first_key)
    return out.transpose(1, 2).contiguous(), probs
