"""Which model a paper's name stands for: the very one of a card, or another one of its family."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Protocol, TypeVar

from .parts import Base


class _OfModel(Protocol):
    @property
    def model(self) -> str:
        """The paper's name for it."""


Published = TypeVar("Published", bound=_OfModel)

# the paper's name of a model: what its weights are called here, and the adapters of its family
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "BERT-base": (r"(^|/)bert-base", ("bert",)),
    "BERT-large": (r"(^|/)bert-large", ("bert",)),
    "DistilBERT": (r"(^|/)distilbert", ("distilbert",)),
    "TinyBERT": (r"(^|/)tinybert", ("bert",)),
    "PKD-BERT": (r"(^|/)pkd-bert", ("bert",)),
    "BART": (r"(^|/)bart-large", ("bart", "fairseq_bart")),
    "Wav2vec2": (r"(^|/)wav2vec2-large", ("wav2vec2", "fairseq_wav2vec2")),
    "ViT-base/16": (r"vit[_-]base[_-]patch16", ("vit", "timm_vit")),
    "GPT-2 small": (r"(^|/)gpt2$", ("gpt2",)),
}
_SIZES = {"OPT": ("opt",), "GPT": ("megatron_gpt",), "GPT3": ("megatron_gpt",)}


def is_same_model(published: str, base: Base) -> bool:
    """Whether a card's dense model is the one that a paper calls ``published``, as far as its name tells."""
    pattern = _known(published)[0]
    return any(re.search(pattern, name, re.IGNORECASE) for name in (base.name, base.hub_id or ""))


def in_family(published: str, base: Base) -> bool:
    """Whether one adapter serves both."""
    return base.adapter in _known(published)[1]


def of_nearest_model(found: Iterable[Published], base: Base) -> tuple[Published, ...]:
    """Those of the very model of a card; without any, those of others of its family."""
    everything = tuple(found)
    same = tuple(one for one in everything if is_same_model(one.model, base))
    return same or tuple(one for one in everything if in_family(one.model, base))


def _known(model: str) -> tuple[str, tuple[str, ...]]:
    if model in MODELS:
        return MODELS[model]
    family, _, size = model.partition("-")
    return rf"(^|/){family}-{re.escape(size)}", _SIZES[family]
