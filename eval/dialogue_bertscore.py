"""BERTScore of replies (Zhang et al. 2020) with a local encoder, by the library bert-score: F1 without rescaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .task import Setting

_UNBOUNDED = 10**9  # transformers says some 10^30 where a tokenizer does not know its longest text


@dataclass(frozen=True)
class BertScorer:
    """An encoder that is loaded and has scored a pair: what follows the long part of an evaluation cannot fail.

    Args:
        library: a ``bert_score.BERTScorer``. batch_size: pairs at once.
    """

    library: Any
    batch_size: int

    @classmethod
    def of(cls, settings: dict[str, Setting], device: str, batch_size: int) -> BertScorer | None:
        """The scorer that ``bertscore_model`` and ``bertscore_layer`` ask for, None where the first is empty.

        The settings become the folder's name, the layer that was taken and the library's version.

        Raises:
            ValueError: the library is not installed, the folder or the layer is missing, or they do not work together.
        """
        source = str(settings["bertscore_model"])
        if not source:
            return None
        folder, layer = Path(source).expanduser(), int(settings["bertscore_layer"])
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"setting bertscore_model: expected a folder with an encoder (config.json), found {source!r}"
            )
        library = _import_bert_score()
        layer = layer or library.utils.model2layers.get(folder.name, 0)
        if layer < 1:
            raise ValueError(
                f"bert-score knows no layer for a model named {folder.name!r}: give it, bertscore_layer=9 for BERT-base"
            )
        try:
            scorer = cls(library.BERTScorer(model_type=str(folder), num_layers=layer, device=device), batch_size)
            tokenizer = scorer.library._tokenizer
            if tokenizer.model_max_length > _UNBOUNDED:
                raise ValueError("its tokenizer does not say its longest text: write model_max_length into "
                                 "tokenizer_config.json")  # fmt: skip
            (same,) = scorer.f1(["a test ."], ["a test ."])
        except Exception as error:  # the library asserts, transformers raises what it likes
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"setting bertscore_model: bert-score cannot use layer {layer} of {source!r}: {reason}"
            ) from error
        if not math.isclose(same, 1, abs_tol=1e-3):
            raise ValueError(f"setting bertscore_model: {source!r} gives a text and itself an F1 of {same}, not 1")
        settings.update(
            bertscore_model=folder.resolve().name, bertscore_layer=layer, bertscore=f"bert-score {library.__version__}"
        )
        return scorer

    def f1(self, texts: Sequence[str], references: Sequence[str]) -> list[float]:
        """F1 of each pair. A pair with an empty side has 0, as in the library, which is not asked: under transformers 5
        it fails on them (``sent_encode`` calls a method that tokenizers no longer have)."""
        values = [0.0] * len(texts)
        asked = [i for i, pair in enumerate(zip(texts, references, strict=True)) if all(text.strip() for text in pair)]
        if asked:
            *_, found = self.library.score(
                [texts[i] for i in asked], [references[i] for i in asked], batch_size=self.batch_size
            )
            for index, value in zip(asked, found.tolist(), strict=True):
                values[index] = float(value)
        return values


def _import_bert_score() -> Any:
    from ..models.torchvision_guard import ensure_torchvision_importable

    ensure_torchvision_importable()
    try:
        import bert_score
        import bert_score.utils
    except ImportError as error:
        raise ValueError(
            "setting bertscore_model needs the library bert-score: pip install bert-score, or leave the setting empty"
        ) from error
    return bert_score
