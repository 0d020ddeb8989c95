"""Models with random weights, by architecture name: to train from scratch, and to measure sizes nobody has trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .errors import LIBRARY_ERRORS, DenseError, brief, nearest
from .folders import seeded
from .kinds import TIMM_KINDS, model_class, set_labels_
from .quiet import quiet
from .torchvision_guard import ensure_torchvision_importable

# Keys of timm's pretrained_cfg that tell where weights come from.
_ORIGIN = {
    "tag",
    "license",
    "url",
    "file",
    "hf_hub_id",
    "hf_hub_filename",
    "origin_url",
    "paper_name",
    "paper_ids",
    "notes",
}


def fresh_timm(
    architecture: str, kind: str, num_labels: int | None, model_args: Mapping[str, Any], seed: int
) -> nn.Module:
    """A timm model made with ``timm.create_model(architecture, **model_args)``, weights drawn from ``seed``.

    Raises:
        DenseError: no such architecture, arguments that it does not take, a kind that timm does not have.
    """
    ensure_torchvision_importable()
    import timm

    if kind not in TIMM_KINDS:
        raise DenseError(f"timm's models classify images: kind is one of {', '.join(TIMM_KINDS)}, found {kind!r}")
    if not timm.is_model(architecture):
        raise DenseError(
            f"timm {timm.__version__} has no architecture {architecture!r}. Nearest: "
            f"{nearest(architecture, timm.list_models())}. Pretrained weights of the Hub are named with their tag, "
            f"timm/<architecture>.<tag>."
        )
    args = dict(model_args)
    wanted = 0 if kind == "base" else num_labels
    if wanted is not None and args.setdefault("num_classes", wanted) != wanted:
        raise DenseError(f"model_args say num_classes={args['num_classes']}, the call asks for {wanted}: say it once")
    try:
        with seeded(seed):
            model: Any = timm.create_model(architecture, pretrained=False, **args)
    except LIBRARY_ERRORS as error:
        raise DenseError(f"timm cannot make {architecture} with model_args {args}: {brief(error)}") from error
    model.squeezoo_model_args = args
    # Random weights come from no training set, so the model must not carry the name and licence of one.
    model.pretrained_cfg = {key: value for key, value in model.pretrained_cfg.items() if key not in _ORIGIN}
    return model.eval()


def fresh_transformers(
    model_type: str, kind: str, num_labels: int | None, model_args: Mapping[str, Any], seed: int
) -> nn.Module:
    """A transformers model of ``config.model_type``, its config made from ``model_args``, weights drawn from ``seed``.

    Raises:
        DenseError: no such model type, arguments that its config does not have, or no such head for it.
    """
    ensure_torchvision_importable()
    import transformers as hf

    if model_type not in hf.CONFIG_MAPPING:
        raise DenseError(
            f"transformers {hf.__version__} has no model type {model_type!r}. Nearest: "
            f"{nearest(model_type, hf.CONFIG_MAPPING.keys())}"
        )
    config_class = hf.CONFIG_MAPPING[model_type]
    known = {*config_class().to_dict(), *config_class.attribute_map, "num_labels"}
    if unknown := sorted(set(model_args) - known):
        raise DenseError(
            f"the config of {model_type!r} has no {unknown[0]!r}. Nearest: {nearest(unknown[0], sorted(known))}"
        )
    try:
        with seeded(seed), quiet():
            config = config_class(**model_args)
            cls = model_class(config, "base" if kind == "auto" else kind)
            set_labels_(config, kind, num_labels)
            return cls(config).eval()
    except DenseError:
        raise
    except LIBRARY_ERRORS as error:
        raise DenseError(f"transformers cannot make {model_type} with {dict(model_args)}: {brief(error)}") from error
