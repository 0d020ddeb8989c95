"""The usual alphabet of English CTC models, for a speech model that comes without a tokenizer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# blank, sentence marks, unknown, word delimiter, then the letters by their frequency in LibriSpeech: the order of the
# vocabulary that wav2vec 2.0 (Baevski et al. 2020) was fine-tuned with, in transformers' form
LETTERS: tuple[str, ...] = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")


def with_vocabulary(processor: Any, symbols: Sequence[str] = LETTERS) -> Any:
    """A speech model's processor with a CTC tokenizer, so that it can be fine-tuned on transcripts.

    Args:
        processor: a processor that has a tokenizer is returned as it is; a feature extractor gets one.
        symbols: the model needs a head of as many (``load_dense(kind="ctc", num_labels=len(symbols))``). They must
            hold ``<pad>`` (the blank), ``<unk>`` and ``|`` (between words).

    Raises:
        ValueError: no feature extractor, or symbols missing.
    """
    if hasattr(processor, "tokenizer") and hasattr(processor, "feature_extractor"):
        return processor
    if not hasattr(processor, "sampling_rate"):
        raise ValueError(
            f"expected a speech model's feature extractor, found {type(processor).__name__}: save its "
            "preprocessor_config.json in the model's folder"
        )
    absent = {"<pad>", "<unk>", "|"} - set(symbols)
    if absent or len(set(symbols)) != len(symbols):
        raise ValueError(f"expected different symbols with <pad>, <unk> and |, missing are {sorted(absent)}")
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2Processor

    with tempfile.TemporaryDirectory() as folder:  # the class reads its vocabulary from a file
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps({symbol: index for index, symbol in enumerate(symbols)}), encoding="utf-8")
        tokenizer = Wav2Vec2CTCTokenizer(str(path))
    return Wav2Vec2Processor(feature_extractor=processor, tokenizer=tokenizer)
