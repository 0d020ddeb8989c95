"""Models stored as GGUF (llama.cpp's format): dequantized to float32 by transformers, then an ordinary dense model."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .describe import build, describe
from .errors import DenseError
from .kinds import model_class, set_labels_
from .processor import pad_with_end_

_INSTALL = "pip install 'gguf>=0.10'"


def gguf_file(folder: Path) -> Path | None:
    """The one GGUF file of a folder without config.json, or None.

    Raises:
        DenseError: several of them.
    """
    if (folder / "config.json").is_file():
        return None
    files = sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise DenseError(f"{folder} holds {len(files)} GGUF files ({names}): leave the one to load, alone in a folder")
    return files[0] if files else None


def read_gguf(file: Path, kind: str, num_labels: int | None) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a GGUF file; both are in the file.

    The weights are what the file's blocks say, as float32: a file of 4 bits gives a dense model of 4-bit quality.

    Raises:
        DenseError: the ``gguf`` package is missing, or transformers has no such head for the architecture.
    """
    try:
        version("gguf")
    except PackageNotFoundError:
        raise DenseError(f"{file} needs the package gguf to be read. To get it: {_INSTALL}") from None
    import transformers as hf

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = hf.AutoConfig.from_pretrained(**where)
    cls = model_class(config, "causal-lm" if kind == "auto" else kind)  # the file does not say; all hold such models
    set_labels_(config, kind, num_labels)
    loaded = cls.from_pretrained(**where, config=config, dtype=torch.float32)
    description = describe(loaded)
    description["config"].pop("quantization_config", None)  # the weights are plain now
    model = build(description)
    model.load_state_dict(loaded.state_dict())
    tokenizer = hf.AutoTokenizer.from_pretrained(**where)
    pad_with_end_(model, tokenizer)
    return model, tokenizer
