"""What a model is made of: the adapters, built in and from installed packages, and which one serves a model.

A new architecture is a file in this folder and a row in ``ADAPTERS``, or, in a package of your own, an entry point:

    [project.entry-points."squeezoo.adapters"]
    mymodel = "mypackage.adapters:MYMODEL"
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from torch import nn

from .adapter import Adapter, AttentionSite, GemmSite, Permutable, Sites, find_sites
from .bart import BART
from .bert import BERT, DISTILBERT, ROBERTA
from .errors import AdapterError
from .fairseq import FAIRSEQ_BART, FAIRSEQ_WAV2VEC2
from .gpt2 import GPT2
from .llama import LLAMA
from .megatron import MEGATRON_GPT
from .opt import OPT
from .torchvision_guard import ensure_torchvision_importable
from .vit import DINOV2, TIMM_VIT, VIT
from .wav2vec2 import WAV2VEC2

ADAPTERS: tuple[Adapter, ...] = (
    BERT, ROBERTA, DISTILBERT, OPT, GPT2, LLAMA, BART, VIT, DINOV2, TIMM_VIT, WAV2VEC2,
    FAIRSEQ_BART, FAIRSEQ_WAV2VEC2, MEGATRON_GPT,
)  # fmt: skip
ENTRY_POINT_GROUP = "squeezoo.adapters"

__all__ = [
    "ADAPTERS",
    "ENTRY_POINT_GROUP",
    "Adapter",
    "AdapterError",
    "AttentionSite",
    "GemmSite",
    "Permutable",
    "Sites",
    "adapter_for",
    "adapter_named",
    "all_adapters",
    "find_sites",
    "model_type_of",
]


def all_adapters() -> dict[str, Adapter]:
    """Every adapter by name: the built-in ones, then those that installed packages offer.

    Raises:
        AdapterError: an entry point does not load or is no `Adapter`, or two adapters share a name or a model type.
    """
    offered = [(adapter, "squeezoo") for adapter in ADAPTERS]
    offered += [(_load(point), _package(point)) for point in entry_points(group=ENTRY_POINT_GROUP)]
    adapters: dict[str, Adapter] = {}
    owners: dict[str, str] = {}
    for adapter, package in offered:
        for what in (f"name {adapter.name!r}", *(f"model type {kind!r}" for kind in adapter.model_types)):
            if what in owners:
                raise AdapterError(
                    f"two adapters have the {what}: one from package {owners[what]}, one from package {package}. "
                    f"Rename the one in {package}, or uninstall it."
                )
            owners[what] = package
        adapters[adapter.name] = adapter
    return adapters


def model_type_of(model: nn.Module) -> str:
    """``config.model_type`` of a transformers model; of any other ``<package>.<Class>``: ``timm.VisionTransformer``."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(model_type, str) and model_type:
        return model_type
    return f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}"


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter that serves the model's type. Plug-ins are imported only for a type that no built-in adapter serves.

    Raises:
        AdapterError: none does; the message names the known types and how to add one.
    """
    model_type = model_type_of(model)
    built_in = next((adapter for adapter in ADAPTERS if model_type in adapter.model_types), None)
    if built_in is not None:
        return built_in
    known = {kind: adapter for adapter in all_adapters().values() for kind in adapter.model_types}
    if model_type not in known:
        raise AdapterError(
            f"no adapter for model type {model_type!r}. Known: {', '.join(known)}. To add one, write its Adapter (some "
            f"20 lines, see models/bert.py) into a file in models/ with a row in models/__init__.py, or into a package "
            f"of your own with an entry point in the group {ENTRY_POINT_GROUP!r}."
        )
    return known[model_type]


def adapter_named(name: str) -> Adapter:
    """The adapter of that name. Plug-ins are imported only for a name that no built-in adapter has.

    Raises:
        AdapterError: there is none; the message names the known ones.
    """
    built_in = next((adapter for adapter in ADAPTERS if adapter.name == name), None)
    if built_in is not None:
        return built_in
    known = all_adapters()
    if name not in known:
        raise AdapterError(
            f"no adapter is named {name!r}. Known: {', '.join(known)}. A checkpoint of a plug-in's architecture needs "
            f"the package that has the plug-in."
        )
    return known[name]


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "unknown"


def _load(point: EntryPoint) -> Adapter:
    where = f"entry point `{point.name} = {point.value}` of package {_package(point)} (group {ENTRY_POINT_GROUP})"
    ensure_torchvision_importable()  # a plug-in may import transformers, as its own models do
    try:
        adapter = point.load()
    except Exception as error:  # another package's code: anything may come, and it must be named
        raise AdapterError(
            f"{where} does not load: {type(error).__name__}: {error}. Repair or uninstall {_package(point)}."
        ) from error
    if not isinstance(adapter, Adapter):
        raise AdapterError(f"{where} is a {type(adapter).__name__}, expected a squeezoo.models.Adapter record.")
    return adapter
