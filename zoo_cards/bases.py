"""Where the dense weights of published models come from: Hub id and licence, by the name they were loaded under."""

from __future__ import annotations

from .parts import Base

# name: (Hub id, licence of the weights)
_KNOWN: dict[str, tuple[str | None, str]] = {
    "minilm-l6": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
}


def describe_base(name: str, revision: str | None, library: str, adapter: str) -> Base:
    """The dense model behind a card.

    ``timm/<architecture>`` starts from random weights, so its weights are the training's own (Apache-2.0, as this
    package). Of any other unknown name the licence is the one its owner gives it.
    """
    hub_id, licence = _KNOWN.get(name, (None, "apache-2.0" if name.startswith("timm/") else "as its owner states"))
    return Base(name=name, hub_id=hub_id, revision=revision, licence=licence, library=library, adapter=adapter)
