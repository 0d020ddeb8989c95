"""What a model is loaded for: the head on top of the backbone, by transformers' own tables."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Literal, get_args

from .errors import DenseError

Kind = Literal[
    "auto", "base", "classification", "token", "question-answering", "causal-lm", "masked-lm", "seq2seq-lm", "ctc"
]
KINDS: tuple[str, ...] = get_args(Kind)
TIMM_KINDS = ("auto", "base", "classification")
WITH_LABELS = ("classification", "token", "ctc")  # kinds whose head has a size of one's own choice

# Of `classification` the first that has the architecture.
_AUTO_CLASSES = {
    "base": ("AutoModel",),
    "classification": (
        "AutoModelForSequenceClassification",
        "AutoModelForImageClassification",
        "AutoModelForAudioClassification",
    ),
    "token": ("AutoModelForTokenClassification",),
    "question-answering": ("AutoModelForQuestionAnswering",),
    "causal-lm": ("AutoModelForCausalLM",),
    "masked-lm": ("AutoModelForMaskedLM",),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM",),
    "ctc": ("AutoModelForCTC",),
}


def check_kind(kind: str, num_labels: int | None) -> None:
    """Whether kind and size of head go together.

    Raises:
        DenseError: an unknown kind, a size where there is none to choose, or a size below 1.
    """
    if kind not in KINDS:
        raise DenseError(f"kind is one of {', '.join(map(repr, KINDS))}; found {kind!r}")
    if num_labels is not None and kind not in WITH_LABELS:
        why = "has no head" if kind == "base" else "has no head of a size to choose"
        raise DenseError(f"kind={kind!r} {why}: leave out num_labels={num_labels}")
    if num_labels is not None and num_labels < 1:
        raise DenseError(f"num_labels must be at least 1, found {num_labels}")


def model_class(config: Any, kind: str) -> Any:
    """The transformers class of this kind for this config; ``auto`` takes the one that wrote it, else the backbone.

    Raises:
        DenseError: transformers has no such head for the architecture, or it would not read from left to right.
    """
    import transformers as hf

    if kind == "auto":
        if config.architectures:
            with suppress(DenseError):
                return class_named(config.architectures[0], config.model_type)
        kind = "base"
    for name in _AUTO_CLASSES[kind]:
        table = getattr(hf, name)._model_mapping
        if type(config) in table:
            one_way = getattr(config, "is_decoder", False) or config.is_encoder_decoder
            if kind == "causal-lm" and not one_way and type(config) in hf.AutoModelForMaskedLM._model_mapping:
                raise DenseError(
                    f"{config.model_type!r} reads in both directions, so it is no kind='causal-lm': load it as "
                    f"kind='masked-lm', or set is_decoder in its config.json"
                )
            found = table[type(config)]
            return found[0] if isinstance(found, tuple) else found
    possible = [name for name, tables in _AUTO_CLASSES.items() if _has(hf, tables, type(config))]
    raise DenseError(f"transformers has no {kind} model for {config.model_type!r}; it has {', '.join(possible)}")


def class_named(name: str, model_type: str | None) -> Any:
    """A model class of transformers, or one that an installed plug-in has registered with its auto classes.

    The name may come from a file, so nothing is imported by it.

    Raises:
        DenseError: there is none.
    """
    import transformers as hf

    found = getattr(hf, name, None)
    if isinstance(found, type) and issubclass(found, hf.PreTrainedModel):
        return found
    load_plugins()
    for table in (getattr(hf, auto)._model_mapping for autos in _AUTO_CLASSES.values() for auto in autos):
        for config_class, classes in table._extra_content.items():
            for registered in classes if isinstance(classes, tuple) else (classes,):
                if registered.__name__ == name and config_class.model_type == model_type:
                    return registered
    raise DenseError(
        f"transformers {hf.__version__} has no model class {name!r}, and no plug-in has registered one for the model "
        f"type {model_type!r}"
    )


def load_plugins() -> None:
    """Import the packages that offer adapters, so that they can register their model classes with transformers."""
    from . import all_adapters

    all_adapters()


def set_labels_(config: Any, kind: str, num_labels: int | None) -> bool:
    """Write the size of the head into the config; whether it differs from the stored one, so that the head is new."""
    if kind == "question-answering":
        num_labels = 2  # start and end, whatever the number of classes of an earlier head
    if num_labels is None:
        return False
    field = "vocab_size" if kind == "ctc" else "num_labels"
    differs = getattr(config, field) != num_labels
    if differs:
        setattr(config, field, num_labels)
    return differs


def _has(hf: Any, tables: tuple[str, ...], config_class: type) -> bool:
    return any(config_class in getattr(hf, name)._model_mapping for name in tables)
