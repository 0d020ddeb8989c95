"""fairseq checkpoint <-> transformers model, for BART and Wav2Vec2, with equal outputs. fairseq itself is not needed.

checkpoint = load_fairseq_checkpoint("bart.pt")
model = to_transformers(checkpoint)                       # compress, train, evaluate this
save_fairseq_checkpoint(from_transformers(model, like=checkpoint), "smaller.pt")   # fairseq reads it
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .describe import build
from .errors import DenseError
from .fairseq_bart import bart_from_transformers, bart_to_transformers
from .fairseq_checkpoint import FairseqCheckpoint, FairseqKind, load_fairseq_checkpoint
from .fairseq_wav2vec2 import wav2vec2_from_transformers, wav2vec2_to_transformers
from .torchvision_guard import ensure_torchvision_importable

_KIND_OF: dict[str, FairseqKind] = {
    "BartForConditionalGeneration": "bart",
    "BartForSequenceClassification": "bart",
    "Wav2Vec2Model": "wav2vec2",
    "Wav2Vec2ForCTC": "wav2vec_ctc",
}
_HEADS = {
    "BartForConditionalGeneration": "seq2seq-lm",
    "BartForSequenceClassification": "classification",
    "Wav2Vec2Model": "base",
    "Wav2Vec2ForCTC": "ctc",
}


def to_transformers(checkpoint: FairseqCheckpoint) -> nn.Module:
    """The transformers model that gives the outputs of this fairseq model: evaluation mode, float32, on the CPU.

    ``bart`` becomes a `BartForConditionalGeneration`, or with a classification head a `BartForSequenceClassification`;
    ``wav2vec2`` a `Wav2Vec2Model`; ``wav2vec_ctc`` a `Wav2Vec2ForCTC` with [batch, time, symbols] logits.

    Raises:
        DenseError: a variant of the architecture that transformers does not compute, or tensors without a place.
    """
    if checkpoint.kind == "bart":
        class_name, config, tensors = bart_to_transformers(checkpoint.args, checkpoint.state)
    else:
        ctc = checkpoint.kind == "wav2vec_ctc"
        class_name, config, tensors = wav2vec2_to_transformers(checkpoint.args, checkpoint.state, ctc)
    model = build({"library": "transformers", "class": class_name, "config": config})
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
    except RuntimeError as error:
        raise DenseError(f"the fairseq tensors do not fit a transformers {class_name}: {error}") from error
    return model.eval()


def from_transformers(
    model: nn.Module, like: FairseqCheckpoint | None = None, symbols: tuple[str, ...] | None = None
) -> FairseqCheckpoint:
    """The fairseq checkpoint that gives the outputs of this transformers model; the inverse of `to_transformers`.

    Args:
        model: BART or Wav2Vec2, plain or folded; of a Squeezoo checkpoint ``load(folder, backend="dense")``.
        like: the checkpoint that ``model`` was converted from. Arguments, symbols, dtypes (where that loses nothing)
            and tensors that transformers has no place for, the modules of pre-training, are taken from it.
        symbols: output symbols of a CTC model in order, when ``like`` does not say them.

    Raises:
        DenseError: another architecture, a model still attached, or parts that fairseq has no place for.
    """
    class_name = type(model).__name__
    if class_name not in _KIND_OF:
        raise DenseError(f"{class_name} cannot become a fairseq checkpoint: expected one of {', '.join(_KIND_OF)}")
    kind = _KIND_OF[class_name]
    if like is not None and like.kind != kind:
        raise DenseError(f"{class_name} becomes a fairseq {kind}, but `like` is a {like.kind}")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_parametrized(module, "weight"):
            raise DenseError(f"the model is still attached ({name}): fold it first")
        if hasattr(module, "in_features") and "weight" not in module._parameters:
            raise DenseError(f"{name} is a {type(module).__name__} without float weights: load with backend='dense'")
    config: Any = model.config
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if kind == "bart":
        heads = () if like is None else tuple(n for n in like.state if n.startswith("classification_heads."))
        head = heads[0].split(".")[1] if heads else "squeezoo"
        args, task, tensors = bart_from_transformers(config.to_dict(), state, head)
    else:
        normalize = None if like is None else like.task.get("normalize")
        args, task, tensors = wav2vec2_from_transformers(config.to_dict(), state, normalize)
    if like is None:
        return FairseqCheckpoint(kind, args, task, tensors, symbols)
    kept = {name: t for name, t in like.state.items() if not re.search(r"\.in_proj_(weight|bias)$", name)}
    merged = kept | {name: _as_stored(tensor, kept.get(name)) for name, tensor in tensors.items()}
    return FairseqCheckpoint(kind, like.args, like.task, merged, symbols or like.symbols)


def read_fairseq(
    path: str | os.PathLike[str], kind: str = "auto", num_labels: int | None = None
) -> tuple[nn.Module, Any]:
    """(transformers model, processor) of a fairseq ``.pt`` file, for `load_dense`.

    The processor of Wav2Vec2 is made from the checkpoint: the audio's normalisation, and for CTC the symbols. A BART
    file holds no tokenizer: its processor is None; transformers' tokenizer of the same vocabulary serves it.

    Args:
        kind: ``auto``, the head that the file has; its name, to be sure of it; or ``base``, without the head.
        num_labels: size of the head, to be sure of it.

    Raises:
        DenseError: as `load_fairseq_checkpoint` and `to_transformers`, or the file has another head.
    """
    checkpoint = load_fairseq_checkpoint(path)
    model = to_transformers(checkpoint)
    processor = None if checkpoint.kind == "bart" else speech_processor(checkpoint)
    if kind == "base":
        base = getattr(model, str(model.base_model_prefix), model)
        assert isinstance(base, nn.Module)
        return base, processor
    found, config = type(model).__name__, cast(Any, model.config)
    size = {"classification": config.num_labels, "ctc": config.vocab_size}.get(_HEADS[found])
    if kind not in ("auto", _HEADS[found]) or num_labels not in (None, size):
        wanted = f"kind={kind!r}" + (f" with {num_labels} labels" if num_labels is not None else "")
        has = found + (f" with {size} labels" if size is not None else "")
        raise DenseError(
            f"{path} holds a {has}, not {wanted}: load it with kind='auto'; for a new head save that model with "
            f"save_dense and load the folder with {wanted}"
        )
    return model, processor


def speech_processor(checkpoint: FairseqCheckpoint) -> Any:
    """transformers' processor of a Wav2Vec2 checkpoint; without known symbols its feature extractor alone.

    fairseq's CTC blank is symbol 0, `<s>`; transformers calls the blank `<pad>`. So these two names change places.
    """
    ensure_torchvision_importable()
    import transformers as hf

    inner = checkpoint.args.get("w2v_args") or {}
    modes = (checkpoint.args.get("extractor_mode"), (inner.get("model") or {}).get("extractor_mode"))
    extractor = hf.Wav2Vec2FeatureExtractor(
        feature_size=1,
        sampling_rate=int(checkpoint.task.get("sample_rate") or 16_000),
        padding_value=0.0,
        do_normalize=bool(checkpoint.task.get("normalize")),
        return_attention_mask="layer_norm" in modes,
    )
    if checkpoint.symbols is None:
        return extractor
    vocabulary = {symbol: index for index, symbol in enumerate(checkpoint.symbols)} | {"<pad>": 0, "<s>": 1}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.json"
        file.write_text(json.dumps(vocabulary), encoding="utf-8")
        tokenizer = hf.Wav2Vec2CTCTokenizer(str(file), word_delimiter_token="|", do_lower_case=False)
    return hf.Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer)


def _as_stored(tensor: Tensor, stored: Tensor | None) -> Tensor:
    """``tensor`` in the dtype of ``stored`` where that changes no value (half precision files), else as it is."""
    if stored is None or stored.dtype == tensor.dtype:
        return tensor
    cast = tensor.to(stored.dtype)
    return cast if torch.equal(cast.to(tensor.dtype), tensor) else tensor
