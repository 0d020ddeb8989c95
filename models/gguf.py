"""Models stored as GGUF (llama.cpp's format): dequantized to float32 by transformers, then an ordinary dense model."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
_ELEMENTS = 1 << 18  # dequantized at a time


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
    tokenizer = read_gguf_tokenizer(file)  # before the weights: its making takes memory of its own
    import transformers as hf

    where = _where(file)
    config = hf.AutoConfig.from_pretrained(**where)
    cls = model_class(config, "causal-lm" if kind == "auto" else kind)  # the file does not say; all hold such models
    set_labels_(config, kind, num_labels)
    model = _streamed(file, cls, config) or _by_transformers(cls, config, where)
    pad_with_end_(model, tokenizer)
    return model, tokenizer


def read_gguf_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file.

    Raises:
        DenseError: the ``gguf`` package is missing.
    """
    try:
        version("gguf")
    except PackageNotFoundError:
        raise DenseError(f"{file} needs the package gguf to be read. To get it: {_INSTALL}") from None
    import transformers as hf

    return hf.AutoTokenizer.from_pretrained(**_where(file))


def _where(file: Path) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


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
    stored = {tensor.name: _Stored.of(tensor) for tensor in reader.tensors}
    del reader, field  # one object per word of the vocabulary: more than 100 MB; and the mapped file
    known = next((number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if known is None:
        return None
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    config.dtype = torch.float32
    model = build({"library": "transformers", "class": cls.__name__, "config": config.to_dict()})
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    # tied ones once; the largest first, as each is there twice for a moment
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[1].numel(), reverse=True):
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own not in stored:
            return None
        found = processor.process(
            stored[own].read(file), own, tensor_key_mapping={own: name}, parsed_parameters={"tensors": {}}
        )
        weights = torch.from_numpy(found.weights)
        if found.name != own or weights.shape != parameter.shape:
            return None
        parameter.copy_(weights)
    return model


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the file: read when it is its turn, as pages of a mapped file count as memory too."""

    offset: int
    shape: tuple[int, ...]
    dtype: Any
    kind: Any

    @classmethod
    def of(cls, tensor: Any) -> _Stored:
        return cls(int(tensor.data_offset), tensor.data.shape, tensor.data.dtype, tensor.tensor_type)

    def read(self, file: Path) -> Any:
        """As float32, dequantized some rows at a time: gguf's temporaries are several times as large as the result."""
        import gguf

        data = np.fromfile(file, self.dtype, math.prod(self.shape), offset=self.offset).reshape(self.shape)
        if data.ndim < 2:
            return gguf.dequantize(data, self.kind)
        first = gguf.dequantize(data[:1], self.kind)
        values = np.empty((len(data), *first.shape[1:]), dtype=first.dtype)
        rows = max(1, _ELEMENTS // max(1, first.size))
        for row in range(0, len(data), rows):
            values[row : row + rows] = gguf.dequantize(data[row : row + rows], self.kind)
        return values
