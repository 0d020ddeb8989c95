"""A dense model as JSON, and the model without its weights from that JSON: what a checkpoint needs to rebuild it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .errors import DenseError
from .kinds import class_named
from .torchvision_guard import ensure_torchvision_importable


def library_of(model: nn.Module) -> str:
    """``transformers`` or ``timm``.

    Raises:
        DenseError: the model is of neither library.
    """
    if isinstance(getattr(getattr(model, "config", None), "model_type", None), str):
        return "transformers"
    if hasattr(model, "pretrained_cfg") and hasattr(model, "num_classes"):
        return "timm"
    raise DenseError(
        f"expected a transformers model (with config.model_type) or a timm model (with pretrained_cfg and "
        f"num_classes), found {type(model).__module__}.{type(model).__qualname__}"
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """``{"library", "class", "config"}``, plain JSON without weights and without paths, from which `build` rebuilds; of
    a model that generates text also ``generation``, how it does that.

    For timm, ``config`` holds ``architecture``, ``num_classes``, ``model_args`` and ``pretrained_cfg``; the arguments
    are those that `timm_model_args` finds, and what they give is compared with the model.

    Raises:
        DenseError: unknown library, arguments that JSON cannot hold, or arguments that do not give this model.
    """
    library = library_of(model)
    if library == "transformers":
        config = json.loads(model.config.to_json_string(use_diff=False))  # type: ignore[union-attr, operator]
        for key in ("_name_or_path", "transformers_version"):
            config.pop(key, None)
        config["architectures"] = [type(model).__name__]
    else:
        config = _describe_timm(model)
    description = {"library": library, "class": type(model).__name__, "config": config}
    if library == "transformers" and model.can_generate():  # type: ignore[operator]
        generation = json.loads(model.generation_config.to_json_string(use_diff=True))  # type: ignore[union-attr, operator]
        description["generation"] = {key: value for key, value in generation.items() if key != "transformers_version"}
    if library == "timm":
        _check_shapes(model, description)
    return description


def build(description: Mapping[str, Any]) -> nn.Module:
    """The model of a `describe` result, in evaluation mode, float32, on the CPU, parameters uninitialised.

    Buffers that no state dict holds (BERT's position ids) have their real values, tied parameters are tied. No random
    initialisation runs and no parameter's memory is touched (BERT-base: less than 0.1 s); load a complete state dict
    before use, or replace the modules whose parameters it lacks.

    Raises:
        DenseError: the description is not one, or names a class or architecture that is not installed.
    """
    make, tie = _maker(description)
    model = _with_empty_parameters(make)
    if "generation" in description:
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_dict(description["generation"])  # type: ignore[assignment]
    _materialize_(model)
    if tie:
        model.tie_weights()  # type: ignore[operator]
    return model.eval()


def timm_model_args(model: nn.Module) -> dict[str, Any]:
    """The keyword arguments that ``timm.create_model`` needs to make this model again.

    timm 1.0.31 keeps them on the model (``_model_args``); older ones do not, so `load_dense` writes them to the
    attribute ``squeezoo_model_args``, which survives ``deepcopy``.
    """
    args = {**getattr(model, "_model_args", {}), **getattr(model, "squeezoo_model_args", {})}
    args["num_classes"] = model.num_classes
    return args


def _describe_timm(model: nn.Module) -> dict[str, Any]:
    args = timm_model_args(model)
    try:
        args = json.loads(json.dumps(args))
    except TypeError as error:
        raise DenseError(
            f"the model was made with arguments that JSON cannot hold: {args}. Give names instead of classes, e.g. "
            f"act_layer='gelu'. ({error})"
        ) from None
    stored: Any = model.pretrained_cfg
    source = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
    pretrained_cfg = {key: value for key, value in stored.items() if key not in source and value is not None}
    return {
        "architecture": pretrained_cfg["architecture"],
        "num_classes": args["num_classes"],
        "model_args": args,
        "pretrained_cfg": json.loads(json.dumps(pretrained_cfg)),
    }


def _maker(description: Mapping[str, Any]) -> tuple[Callable[[], nn.Module], bool]:
    """A function that makes the described module tree, and whether its parameters must be tied afterwards."""
    ensure_torchvision_importable()
    try:
        library, class_name, config = description["library"], description["class"], description["config"]
    except (KeyError, TypeError):
        raise DenseError(f"a model description has the keys library, class, config; found {description!r}") from None
    if library == "transformers":
        model_class = class_named(class_name, config.get("model_type"))
        config_class: Any = model_class.config_class
        made_config = config_class.from_dict(config)
        return lambda: model_class(made_config), True
    if library == "timm":
        import timm

        architecture = config["architecture"]
        if not timm.is_model(architecture):
            raise DenseError(f"timm {timm.__version__} has no architecture {architecture!r}")

        def make() -> nn.Module:
            model: Any = timm.create_model(
                architecture, pretrained_cfg=dict(config["pretrained_cfg"]), **config["model_args"]
            )
            model.squeezoo_model_args = dict(config["model_args"])
            return model

        return make, False
    raise DenseError(f"unknown library {library!r} in a model description: known are transformers and timm")


def _with_empty_parameters(make: Callable[[], nn.Module]) -> nn.Module:
    """``make()`` with its parameters on the meta device, where initialising costs nothing, and its buffers real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make()


def _materialize_(model: nn.Module) -> None:
    """Give meta parameters memory on the CPU, uninitialised."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            real = torch.empty_like(parameter, device="cpu")
            setattr(module, name, nn.Parameter(real, requires_grad=parameter.requires_grad))


def _check_shapes(model: nn.Module, description: Mapping[str, Any]) -> None:
    """The description must give the model's shapes and lengths. What was attached to the model may differ."""
    described = _with_empty_parameters(_maker(description)[0])
    shapes = {name: tuple(parameter.shape) for name, parameter in described.named_parameters()}
    lengths = {name: len(module) for name, module in described.named_modules() if isinstance(module, nn.Sequential)}
    differing = [
        f"{name} is {tuple(parameter.shape)}, described {shapes[name]}"
        for name, parameter in model.named_parameters()
        if shapes.get(name, parameter.shape) != parameter.shape
    ]
    differing += [
        f"{name} has {len(module)} modules, described {lengths[name]}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential) and lengths.get(name, len(module)) != len(module)
    ]
    if differing:
        raise DenseError(
            f"the {description['class']} cannot be rebuilt from its architecture name and {timm_model_args(model)}: "
            f"{differing[0]}. Set model.squeezoo_model_args to the keyword arguments given to timm.create_model."
        )
