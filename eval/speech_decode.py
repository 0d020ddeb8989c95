"""From the scores of a CTC head to text: greedily, or by beam search with a language model.

Legend: T frames, V symbols of the head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .task import Setting

if TYPE_CHECKING:
    import torch

# pyctcdecode 0.5.0 asks for a NumPy below 2 but runs on later ones; without --no-deps pip would put an old one in
INSTALL = "pip install --no-deps pyctcdecode pygtrie kenlm"
SETTINGS: dict[str, Setting] = {"beam_width": 1, "language_model": "", "lm_weight": 0.5, "word_bonus": 1.5}


@dataclass(frozen=True)
class Alphabet:
    """The symbols of a CTC head.

    Args:
        blank: index of the blank.
        symbols: text of each index: one space for the word delimiter, None for the blank and for special tokens, which
            write nothing.
    """

    blank: int
    symbols: tuple[str | None, ...]

    @classmethod
    def of(cls, tokenizer: Any, width: int | None = None) -> Alphabet:
        """The alphabet of a transformers CTC tokenizer; its padding token is the blank.

        Args:
            width: V of the model.

        Raises:
            ValueError: no CTC tokenizer, or symbols that the head does not have.
        """
        delimiter = getattr(tokenizer, "word_delimiter_token", None)
        if delimiter is None or tokenizer.pad_token_id is None:
            raise ValueError(
                f"speech recognition needs the model's CTC tokenizer (Wav2Vec2CTCTokenizer), with a word delimiter and "
                f"a padding token for the blank; found {type(tokenizer).__name__}: save the whole processor in the "
                "model's folder (processor.save_pretrained)"
            )
        ids: dict[str, int] = tokenizer.get_vocab()
        silent = set(tokenizer.all_special_tokens) - {delimiter}
        texts = {index: " " if text == delimiter else text for text, index in ids.items() if text not in silent}
        size = 1 + max(texts.keys() | {tokenizer.pad_token_id})
        if width is not None and size > width:
            raise ValueError(f"the tokenizer has symbols up to index {size - 1}, the model a head for {width}")
        return cls(tokenizer.pad_token_id, tuple(texts.get(index) for index in range(max(size, width or 0))))

    def encode(self, text: str) -> list[int]:
        """The indices of a text's characters, each in the case that the alphabet has.

        Raises:
            ValueError: characters that it does not have, all of them named.
        """
        known = {symbol: index for index, symbol in enumerate(self.symbols) if symbol is not None}
        found = [next((known[c] for c in (char, char.upper(), char.lower()) if c in known), None) for char in text]
        unknown = sorted({char for char, index in zip(text, found, strict=True) if index is None})
        if unknown:
            raise ValueError(f"the model's alphabet has no symbol for {', '.join(map(repr, unknown))}")
        return [index for index in found if index is not None]

    def greedy(self, scores_TV: torch.Tensor) -> str:
        """The best symbol of each frame, repetitions joined, then blanks dropped (Graves et al. 2006, section 3.2)."""
        best = scores_TV.argmax(-1).unique_consecutive().tolist()
        return "".join(self.symbols[index] or "" for index in best if index != self.blank)


Decoder = Callable[["torch.Tensor"], str]


def decoder_for(alphabet: Alphabet, settings: Mapping[str, Setting]) -> tuple[Decoder, dict[str, Setting]]:
    """How frames become text by a task's settings, and what of it a score must record.

    Args:
        settings: ``beam_width``: 1 decodes greedily; more is beam search by pyctcdecode (100 is its own default).
            ``language_model``: path of a word n-gram model (``.arpa``, or KenLM's binary), or empty. ``lm_weight`` and
            ``word_bonus``: pyctcdecode's alpha and beta.

    Raises:
        ValueError: a language model without beam search, or one that does not exist or does not load; pyctcdecode (or
            KenLM for a language model) is not installed.
    """
    width, model = int(settings["beam_width"]), str(settings["language_model"])
    if width < 1:
        raise ValueError(f"beam_width must be at least 1, found {width}")
    if width == 1:
        if model:
            raise ValueError("greedy decoding asks no language model: set beam_width to more than 1, for example 100")
        return alphabet.greedy, {"decoder": "greedy"}
    build, version = _pyctcdecode(bool(model))
    told: dict[str, Setting] = {"decoder": f"pyctcdecode {version}", "beam_width": width}
    arguments: dict[str, Any] = {}
    if model:
        path = Path(model).expanduser()
        if not path.is_file():
            raise ValueError(f"the language model {model!r} does not exist: give the path of an .arpa or KenLM file")
        arguments = {
            "kenlm_model_path": str(path), "alpha": float(settings["lm_weight"]), "beta": float(settings["word_bonus"])
        }  # fmt: skip
        told["language_model"] = f"{path.name} sha256:{_digest(path)}"
        told |= {name: settings[name] for name in ("lm_weight", "word_bonus")}
    columns = [index for index, symbol in enumerate(alphabet.symbols) if symbol is not None or index == alphabet.blank]
    try:
        search = build(_labels(alphabet, columns), **arguments)
    except (OSError, ValueError) as error:
        raise ValueError(f"the language model {model!r} and the model's alphabet make no decoder: {error}") from error

    def beam(scores_TV: torch.Tensor) -> str:
        text: str = search.decode(scores_TV[:, columns].double().numpy(), beam_width=width)
        return text

    return beam, told


def _labels(alphabet: Alphabet, columns: Sequence[int]) -> list[str]:
    """What pyctcdecode calls each column: the blank is empty, the word delimiter a space."""
    return ["" if index == alphabet.blank else alphabet.symbols[index] or "" for index in columns]


def _pyctcdecode(with_model: bool) -> tuple[Any, str]:
    from importlib.metadata import version

    try:
        from pyctcdecode import build_ctcdecoder

        if with_model:
            import kenlm  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"beam search needs pyctcdecode, and a language model KenLM ({error}): {INSTALL}, or decode greedily with "
            "beam_width 1"
        ) from error
    return build_ctcdecoder, version("pyctcdecode")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
