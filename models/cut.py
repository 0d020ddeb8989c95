"""A smaller student: a model of the same class with only the first blocks, their weights and everything around them.

The cut is made in the model's description (its config), from which the student is built, so that block indices, caches
and the saved config.json are right; the weights then go over by name. Patient distillation starts from such a student
(Sun et al. 2019, section 3; ALGORITHMS E.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from . import adapter_for, find_sites
from .describe import build, describe
from .errors import LIBRARY_ERRORS, DenseError, brief
from .record import ONE_KIND

# Fields that say how many blocks of a kind there are, as the libraries spell them; the first that the config has.
_DEPTH = {
    ONE_KIND: ("num_hidden_layers", "depth"),
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}

# Which blocks a backbone hands out (DINOv2); left out, it is the last one.
_STAGES = ("stage_names", "out_features", "out_indices")


def cut_student(model: nn.Module, blocks: int) -> nn.Module:
    """A model of the same class with the first ``blocks`` blocks of ``model``; encoder-decoders keep the first
    ``blocks`` of the encoder and of the decoder.

    Args:
        model: dense, of an architecture with an adapter. It is not changed and shares no memory with the student.
        blocks: from 1 to the number of blocks.

    Returns:
        In evaluation mode, of the model's dtypes, on its device; `describe`, `save_dense` and `load_dense` work on it.

    Raises:
        DenseError: fewer blocks than asked for, a model with compression attached, an architecture whose config does
            not tell the depth by one number.
    """
    kinds = _blocks_by_kind(model)
    shortest = min(kinds.values())
    if not 1 <= blocks <= shortest:
        found = " and ".join(_count(count, kind) for kind, count in kinds.items())
        raise DenseError(f"a student of {blocks} blocks cannot be cut from {found}: expected 1 to {shortest}")
    if any(parametrize.is_parametrized(gemm.module) for gemm in find_sites(model, adapter_for(model)).gemms):
        raise DenseError("the model has compression attached: cut the student from the dense model")
    description = describe(model)
    student = _built(_shortened(model, description, kinds, blocks), type(model).__name__)
    _copy_weights_(student, model)
    if _blocks_by_kind(student) != dict.fromkeys(kinds, blocks):
        raise DenseError(f"the config of {type(model).__name__} does not tell its depth alone: it cannot be cut")
    if hasattr(model, "generation_config"):
        student.generation_config = deepcopy(model.generation_config)
    return student.eval()


def _blocks_by_kind(model: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for block in find_sites(model, adapter_for(model)).blocks:
        counts[block.kind] = counts.get(block.kind, 0) + 1
    return counts


def _count(blocks: int, kind: str) -> str:
    return f"{blocks} blocks" if kind == ONE_KIND else f"{blocks} {kind} blocks"


def _shortened(
    model: nn.Module, description: Mapping[str, Any], kinds: Mapping[str, int], blocks: int
) -> dict[str, Any]:
    """The description with every depth set to ``blocks``, and lists with an entry per block cut to it."""
    config = dict(description["config"])
    if description["library"] == "timm":
        config["model_args"] = {**config["model_args"], "depth": blocks}
        return {**description, "config": config}
    renamed = getattr(type(model.config), "attribute_map", {})
    for kind, count in kinds.items():
        fields = _DEPTH.get(kind, ())
        if kind != "decoder":
            fields = (renamed.get("num_hidden_layers", "num_hidden_layers"), *fields)
        field = next((field for field in fields if config.get(field) == count), None)
        if field is None:
            raise DenseError(
                f"{type(model).__name__} has {_count(count, kind)} and its config no field that says so (looked for "
                f"{', '.join(dict.fromkeys(fields)) or 'none'}): it cannot be cut"
            )
        config[field] = blocks
        for name, value in config.items():
            if "layer" in name and isinstance(value, list) and len(value) == count:
                config[name] = value[:blocks]
    for name in _STAGES:
        config.pop(name, None)
    return {**description, "config": config}


def _built(description: Mapping[str, Any], name: str) -> nn.Module:
    try:
        return build(description)
    except DenseError:
        raise
    except LIBRARY_ERRORS as error:
        raise DenseError(f"{name} cannot be made with fewer blocks: {brief(error)}") from error


def _copy_weights_(student: Any, model: nn.Module) -> None:
    """Give the student the tensors of the same names, exactly, and the model's dtypes, device and attention kernel."""
    source = dict(model.state_dict())
    wanted = student.state_dict()
    different = [
        f"{name} {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name not in source or source[name].shape != tensor.shape
    ]
    if different:
        raise DenseError(
            f"{type(model).__name__} with fewer blocks has other tensors than its first blocks, such as "
            f"{different[0]}: it cannot be cut"
        )
    student.load_state_dict({name: source[name].detach().clone() for name in wanted}, assign=True)
    if hasattr(student, "tie_weights"):
        student.tie_weights()
    kernel = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if kernel is not None:
        student.set_attn_implementation(kernel)
