"""Models stored as GGUF (llama.cpp's format): dequantized to float32 by transformers, then an ordinary dense model."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
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
    tokenizer = hf.AutoTokenizer.from_pretrained(**where)  # before the weights: its making takes memory of its own
    model = _streamed(file, cls, config) or _by_transformers(cls, config, where)
    pad_with_end_(model, tokenizer)
    return model, tokenizer


def _by_transformers(cls: Any, config: Any, where: dict[str, Any]) -> nn.Module:
    """Every architecture that transformers reads, and new heads; it holds the weights twice for a while."""
    loaded = cls.from_pretrained(**where, config=config, dtype=torch.float32)
    description = describe(loaded)
    description["config"].pop("quantization_config", None)  # the weights are plain now
    model = build(description)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()  # type: ignore[operator]
    return model


@torch.no_grad()
def _streamed(file: Path, cls: Any, config: Any) -> nn.Module | None:
    """The model, its weights dequantized one by one into their places, so that memory holds them once.

    Names are gguf's own table, the order of rows transformers' own rule. None where these two do not say all: weights
    that a file joins or splits, a new head.
    """
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    reader = gguf.GGUFReader(file)
    field = reader.fields["general.architecture"]
    architecture = bytes(field.parts[field.data[0]]).decode()
    stored = {tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    del reader, field  # one object per word of the vocabulary: more than 100 MB
    known = next((number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if known is None:
        return None
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    config.dtype = torch.float32
    model = build({"library": "transformers", "class": cls.__name__, "config": config.to_dict()})
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    for name, parameter in model.named_parameters():  # tied ones once
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own not in stored:
            return None
        found = processor.process(
            gguf.dequantize(*stored.pop(own)), own, tensor_key_mapping={own: name}, parsed_parameters={"tensors": {}}
        )
        weights = torch.from_numpy(np.require(found.weights, requirements="W"))  # what is no block is the file itself
        if found.name != own or weights.shape != parameter.shape:
            return None
        parameter.copy_(weights)
    return model
