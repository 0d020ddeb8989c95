"""Tiny models of fairseq itself, its files and its loader, for the tests beside this file."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import standins
import torch
from torch import Tensor

VOCABULARY = 40


def fairseq_bart(head: tuple[str, int] | None = None) -> tuple[Any, Namespace]:
    """fairseq's BARTModel of `standins.BART_ARGS`, and all its arguments."""
    from fairseq.data import Dictionary
    from fairseq.models.bart import BARTModel
    from fairseq.models.bart.model import bart_base_architecture

    dictionary = Dictionary()
    for index in range(VOCABULARY - len(dictionary)):
        dictionary.add_symbol(f"s{index}")
    args = Namespace(**standins.BART_ARGS)
    bart_base_architecture(args)

    def make() -> Any:
        model = BARTModel.build_model(args, SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary))
        if head is not None:
            model.register_classification_head(head[0], num_classes=head[1])
        return model

    return standins.shaken(make), args


def fairseq_wav2vec2(mode: str = "default", norm_first: bool = False, width: int = 16) -> tuple[Any, dict[str, Any]]:
    """fairseq's Wav2Vec2Model with its pre-training modules, and its config as fairseq stores it."""
    from fairseq.models.wav2vec.wav2vec2 import Wav2Vec2Config, Wav2Vec2Model
    from omegaconf import OmegaConf

    _, args = standins.wav2vec2(mode, norm_first, width)
    defaults = OmegaConf.to_container(OmegaConf.structured(Wav2Vec2Config), enum_to_str=True)
    config = {**defaults, "_name": "wav2vec2", "final_dim": 8, "quantize_targets": True, "latent_vars": 4, **args}
    return standins.shaken(lambda: Wav2Vec2Model.build_model(OmegaConf.create(config))), config


def fairseq_ctc(**options: Any) -> tuple[Any, dict[str, Any], Any]:
    """fairseq's Wav2VecCtc, its config, its dictionary."""
    from fairseq.data import Dictionary
    from fairseq.models.wav2vec.wav2vec2_asr import Wav2Vec2CtcConfig, Wav2VecCtc
    from omegaconf import OmegaConf

    _, inner = fairseq_wav2vec2(**options)
    dictionary = Dictionary()
    for symbol in standins.SYMBOLS[4:]:
        dictionary.add_symbol(symbol)
    normalize = inner["extractor_mode"] == "layer_norm"
    w2v_args = {"model": inner, "task": audio_task(normalize), "criterion": None, "lr_scheduler": None}
    defaults = OmegaConf.to_container(OmegaConf.structured(Wav2Vec2CtcConfig), enum_to_str=True)
    own = {"w2v_path": "", "data": "", "ddp_backend": "legacy_ddp", "normalize": normalize, "w2v_args": w2v_args}
    config = {**defaults, **own, "_name": "wav2vec_ctc", "apply_mask": True}
    task = SimpleNamespace(target_dictionary=dictionary)
    return standins.shaken(lambda: Wav2VecCtc.build_model(OmegaConf.create(config), task), seed=1), config, dictionary


def audio_task(normalize: bool) -> dict[str, Any]:
    return {"_name": "audio_pretraining", "data": "", "normalize": normalize, "sample_rate": 16000}


def data_folder(folder: Path) -> Path:
    """Where fairseq's tasks find their dictionaries: BART's, to which the task adds <mask>, and the letters of CTC."""
    (folder / "dict.txt").write_text("".join(f"s{i} 1\n" for i in range(VOCABULARY - 5)))
    (folder / "dict.ltr.txt").write_text("".join(f"{symbol} 1\n" for symbol in standins.SYMBOLS[4:]))
    return folder


def fairseq_loads(path: Path, strict: bool = True) -> Any:
    """The model of a file by fairseq's own loader, which needs Namespace to be allowed since torch 2.6."""
    from fairseq import checkpoint_utils

    overrides = {"data": str(data_folder(path.parent))}
    with torch.serialization.safe_globals([Namespace]):
        return checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides, strict=strict)[0][0].eval()


def audio() -> tuple[Tensor, Tensor]:
    """Two waveforms [2, 600], the second padded, and what is padding."""
    waves = torch.randn(2, 600, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(2, 600, dtype=torch.bool)
    padding[1, 400:] = True
    return waves.masked_fill(padding, 0), padding


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
