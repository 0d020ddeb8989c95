"""What turns text, images or sound into a model's inputs: tokenizers, image processors, audio processors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .errors import LIBRARY_ERRORS, DenseError, brief
from .quiet import quiet
from .torchvision_guard import ensure_torchvision_importable

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def load_processor(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer, image processor or audio processor of a dense or compressed model folder; None where it has none.

    A folder for speech recognition holds a feature extractor and a tokenizer, which come back as one processor
    (``processor.feature_extractor``, ``processor.tokenizer``). A ``.gguf`` file holds its tokenizer itself.

    Raises:
        DenseError: no such folder, or files in it that transformers cannot read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DenseError(f"no folder {folder}: expected one with a tokenizer, an image processor or an audio processor")
    ensure_torchvision_importable()
    from .gguf import gguf_file, read_gguf_tokenizer

    if (gguf := gguf_file(folder)) is not None:
        with quiet():
            return read_gguf_tokenizer(gguf)
    import transformers as hf

    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    if _reads_sound(folder):
        kind: Any = hf.AutoProcessor if has_tokenizer else hf.AutoFeatureExtractor
    elif has_tokenizer:
        kind = hf.AutoTokenizer
    elif (folder / "preprocessor_config.json").is_file():
        kind = hf.AutoImageProcessor
    else:
        return None
    try:
        with quiet():
            return kind.from_pretrained(folder, trust_remote_code=False)
    except (*LIBRARY_ERRORS, OSError, KeyError) as error:
        raise DenseError(f"the processor files in {folder} do not load: {brief(error)}") from error


def pad_with_end_(model: Any, processor: Any) -> None:
    """Give a tokenizer without a padding token its end-of-sequence token, and the model's config the same id.

    GPT-2 and Llama were trained without padding, but batches need it, and their sequence classifiers read the last
    token that is not padding.
    """
    if getattr(processor, "eos_token", None) is not None and processor.pad_token is None:
        processor.pad_token = processor.eos_token
    end = getattr(model.config, "eos_token_id", None)
    if getattr(model.config, "pad_token_id", None) is None and isinstance(end, int) and hasattr(model, "score"):
        model.config.pad_token_id = end


def _reads_sound(folder: Path) -> bool:
    for name in _PROCESSOR_FILES:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and ("feature_extractor_type" in content or "feature_extractor" in content):
            return True
    return False
