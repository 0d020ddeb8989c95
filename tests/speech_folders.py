"""Small recordings in the official LibriSpeech layout, and tiny random CTC models with their processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from squeezoo.eval.speech_vocabulary import LETTERS, with_vocabulary
from tiny import ROWS

TEXTS = {
    "84-121123-0000": "HE COULD WAIT NO LONGER",
    "84-121123-0001": "IT'S LATE",
    "84-121550-0000": "STUFF IT INTO YOU",
    "174-50561-0000": "NO",
    "174-50561-0001": "THE SAUCE WAS THICK",
}


def sound(seconds: float, seed: int = 0, rate: int = 16_000) -> np.ndarray:
    """Noise under a slow tone, so that rows differ and frames are not all alike."""
    t = np.arange(round(seconds * rate)) / rate
    noise = np.random.RandomState(seed).standard_normal(len(t))
    return (0.3 * np.sin(2 * np.pi * (200 + 100 * seed) * t) + 0.05 * noise).astype(np.float32)


def librispeech(folder: Path, split: str = "test-clean", texts: Mapping[str, str] = TEXTS) -> Path:
    """``folder/LibriSpeech/split`` with one recording of 0.55 to 0.7 s per text, long enough for its letters.

    Returns:
        The split's folder.
    """
    root = folder / "LibriSpeech" / split
    for number, (name, text) in enumerate(texts.items()):
        speaker, chapter, _ = name.split("-")
        place = root / speaker / chapter
        place.mkdir(parents=True, exist_ok=True)
        soundfile.write(place / f"{name}.flac", sound(0.55 + 0.05 * (number % 4), number), 16_000)
        with open(place / f"{speaker}-{chapter}.trans.txt", "a", encoding="utf-8") as file:
            file.write(f"{name} {text}\n")
    return root


def ctc_model(masked: bool) -> tuple[Any, Any]:
    """A tiny Wav2Vec2ForCTC with a frame every 20 ms and its processor; ``masked`` is the kind that reads attention
    masks (layer norm), the other normalises over time (group norm). The weights are large enough to write words."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    config = {
        **ROWS["wav2vec2_stable" if masked else "wav2vec2"].config,
        "vocab_size": len(LETTERS), "conv_stride": (160, 2), "initializer_range": 0.3,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Wav2Vec2ForCTC(Wav2Vec2Config(**config)).eval()
    return model, with_vocabulary(Wav2Vec2FeatureExtractor(return_attention_mask=masked))
