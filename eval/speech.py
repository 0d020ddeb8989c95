"""Speech recognition by a CTC head: LibriSpeech, and folders of recordings of one's own.

Folder layout of LibriSpeech, the official one: ``DIR/LibriSpeech/SPLIT/SPEAKER/CHAPTER/`` with the recordings
``SPEAKER-CHAPTER-NUMBER.flac`` (16 kHz) and their transcripts ``SPEAKER-CHAPTER.trans.txt``; the folder may also be
named ``librispeech`` or ``librispeech-sample``, or ``DIR`` may hold the splits itself.

Layouts of ``speech-folder``: ``DIR/speech-folder/SPLIT/`` or ``DIR/SPLIT/``, and for the split ``test`` also ``DIR``
itself where it holds the transcripts. A split holds FLAC or WAV recordings of any rate and either one table ``*.tsv``
or ``*.csv`` with the columns ``path`` (relative to the table) and ``text``, or ``*.trans.txt`` as LibriSpeech has them,
in it or in folders below. Its scores record a fingerprint of the data as the setting ``data``.

Recordings of another rate than the model's are resampled (SciPy's polyphase filter) and the score says so; those of
LibriSpeech must have 16 kHz. Models whose feature extractor gives an attention mask run in padded batches; the others
(wav2vec 2.0 base) normalise over time, so padding would change their output, and they run rows of equal length only.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files
from .ahead import Ahead
from .speech_decode import SETTINGS, Alphabet, decoder_for
from .speech_features import Normal, SpeechFeatures, encode_speech, spoken
from .speech_files import TABLES, TRANSCRIPTS, chapter_rows, folder_rows, hub_rows
from .task import FinetuneDefaults, Row, Task, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .runner import Runner

RATE = 16_000
HUB = "openslr/librispeech_asr"
# split: configuration and split on the Hub, utterances of the official corpus
SPLITS: dict[str, tuple[str, str, int]] = {
    "train-clean-100": ("clean", "train.100", 28_539),
    "train-clean-360": ("clean", "train.360", 104_014),
    "train-other-500": ("other", "train.500", 148_688),
    "dev-clean": ("clean", "validation", 2_703),
    "dev-other": ("other", "validation", 2_864),
    "test-clean": ("clean", "test", 2_620),
    "test-other": ("other", "test", 2_939),
}
FOLDERS = ("LibriSpeech", "librispeech", "librispeech-sample", ".")
FOLDER_SPLITS = ("train", "validation", "test")
MAX_SECONDS = 160  # of a padded batch, that memory stays bounded; results do not depend on the batches


def upper_words(text: str) -> str:
    """Upper case, single spaces: what LibriSpeech's transcripts are already."""
    return " ".join(text.upper().split())


def plain_words(text: str) -> str:
    """Upper case, letters, digits and inner apostrophes only, single spaces; everything else separates words."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").upper()
    kept = "".join(c if c == "'" or c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text)
    return " ".join(word for word in (word.strip("'") for word in kept.split()) if word)


def librispeech_rows(split: str, data_dir: str | Path | None = None) -> Sequence[Row]:
    """One split of LibriSpeech, see `chapter_rows`.

    Raises:
        ValueError: unknown split. DataError: not found or broken.
    """
    if split not in SPLITS:
        raise ValueError("librispeech: " + nearest("split", split, SPLITS))
    folder = files.resolve_data_dir(data_dir)
    if folder is None:
        config, name, _ = SPLITS[split]
        return hub_rows("librispeech", HUB, config, name)
    tried = [f"{name}/{split}" for name in FOLDERS]
    found = next((folder / name for name in tried if (folder / name).is_dir()), None)
    if found is None:
        raise files.missing(f"librispeech, split {split},", f"in {str(folder)!r} for the folders {', '.join(tried)}")
    return chapter_rows(found)


def speech_folder_rows(split: str, data_dir: str | Path | None = None) -> Sequence[Row]:
    """One split of a folder of recordings, see `folder_rows`.

    Raises:
        ValueError: unknown split. DataError: no folder given, nothing in it, broken.
    """
    if split not in FOLDER_SPLITS:
        raise ValueError("speech-folder: " + nearest("split", split, FOLDER_SPLITS))
    folder = files.resolve_data_dir(data_dir)
    if folder is None:
        raise files.MissingDataError(
            f"speech-folder reads recordings of your own: name their folder with --data-dir DIR or "
            f"{files.DATA_VARIABLE}=DIR"
        )
    tried = [folder / "speech-folder" / split, folder / split]
    if split == "test" and any(any(folder.glob(pattern)) for pattern in (*TABLES, TRANSCRIPTS)):
        tried.append(folder)
    found = next((path for path in tried if path.is_dir()), None)
    if found is None:
        raise files.MissingDataError(
            f"speech-folder, split {split}: expected the folder {str(tried[0])!r} or {str(tried[1])!r} with recordings "
            "and their transcripts, found neither"
        )
    return folder_rows(found)


def transcribe(runner: Runner, rows: Sequence[Row], *, normal: Normal, rule: str, rate: int | None) -> list[str]:
    """What the model hears in each recording, normalised.

    Raises:
        ValueError: a model or processor that cannot do it. DataError: a broken recording.
    """
    config: Any = runner.model.config
    alphabet = Alphabet.of(getattr(runner.processor, "tokenizer", None), config.vocab_size)
    if config.pad_token_id != alphabet.blank:
        raise ValueError(f"the tokenizer's blank is {alphabet.blank}, the model's config says {config.pad_token_id}")
    decode, told = decoder_for(alphabet, runner.settings)
    features = SpeechFeatures(rows, runner.processor, rate, [{"samples": 0}] * len(rows))
    lengths = features.lengths()
    features.extra = [{"samples": length} for length in lengths]
    _check_shortest(runner.model, rows, lengths)
    for name in SETTINGS:
        runner.settings.pop(name)
    runner.settings |= {**told, "normalisation": rule, "padding": "masked" if features.masked else "none"}
    model_rate = features.extractor.sampling_rate
    others = sorted({header.rate for header in features.headers} - {model_rate})
    if others:
        runner.settings["resampled"] = f"from {', '.join(map(str, others))} to {model_rate} Hz"

    def write(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[str]:
        return [decode(scores_TV) for scores_TV in frame_scores(model, batch)]

    order = sorted(range(len(rows)), key=lambda index: lengths[index], reverse=True)
    with Ahead.of(features, runner.batch_size, runner.device, order) as ahead:
        texts = runner.map(ahead, write, max_tokens=MAX_SECONDS * model_rate)
    return [normal(text) for text in texts]


def frame_scores(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The scores of the real frames of each row, float32 [T, V] on the CPU.

    Args:
        batch: ``input_values`` [B, L], ``samples`` [B], the length of each row without padding, and perhaps
            ``attention_mask``; without one rows of different length are run apart.

    Raises:
        ValueError: scores that are not finite.
    """
    from ..models.dense import logits

    samples = batch.pop("samples").tolist()
    found: list[torch.Tensor] = []
    if "attention_mask" in batch:
        base: Any = getattr(model, "_orig_mod", model)
        scores_BTV = logits(model, batch)
        frames_BT = base._get_feature_vector_attention_mask(scores_BTV.shape[1], batch["attention_mask"])
        for scores_TV, frames in zip(scores_BTV.float().cpu(), frames_BT.sum(1).tolist(), strict=True):
            found.append(scores_TV[:frames])
    else:
        start = 0
        for length, rows in groupby(samples):  # the longest first, equal ones together
            stop = start + len(list(rows))
            found += logits(model, {"input_values": batch["input_values"][start:stop, :length]}).float().cpu()
            start = stop
    if not all(bool(scores_TV.isfinite().all()) for scores_TV in found):
        raise ValueError("the model gives NaN or infinite logits")
    return found


def _check_shortest(model: Any, rows: Sequence[Row], lengths: Sequence[int]) -> None:
    """A waveform that gives no frame would fail inside the model without a name."""
    frames = getattr(getattr(model, "_orig_mod", model), "_get_feat_extract_output_lengths", None)
    shortest = min(range(len(rows)), key=lambda index: lengths[index])
    if frames is not None and int(frames(lengths[shortest])) < 1:
        raise files.DataError(f"{rows[shortest]['where']}: a recording of {lengths[shortest]} values gives no frame")


def error_rates(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Word and character error rate over all rows together, by jiwer: edits / words (characters, spaces included) of
    the references; above 1 where more is written than was said."""
    import jiwer

    said, heard = list(references), list(predictions)
    return {"wer": float(jiwer.wer(said, heard)), "cer": float(jiwer.cer(said, heard))}


_FINETUNE = FinetuneDefaults(
    6, 3e-4, 32, 0, "Deep Compression, Wav2vec2-large on 100 h of LibriSpeech; nothing is cut",
    warmup_steps=500, optimizer="adamw", schedule="linear",
)  # fmt: skip


def _task(
    name: str, source: str, splits: tuple[str, ...], sizes: tuple[int, ...], rows: Any, normal: Normal, rule: str,
    rate: int | None,
) -> Task:  # fmt: skip
    return Task(
        name=name,
        version=1,
        source=f"{source}; metric: jiwer",
        kind="speech-recognition",
        num_labels=None,
        splits=splits,
        sizes=sizes,
        metric="wer",
        higher_is_better=False,
        rows=rows,
        encode=partial(encode_speech, normal=normal, rate=rate),
        score=error_rates,
        predict=partial(transcribe, normal=normal, rule=rule, rate=rate),
        reference=partial(spoken, normal=normal),
        settings=SETTINGS,
        finetune=_FINETUNE,
    )


def _librispeech(member: str) -> Task:
    splits = ("train-clean-100", f"dev-{member}", "train-clean-360", "train-other-500", f"test-{member}")
    return _task(
        f"librispeech/{member}", f"Panayotov et al. 2015 (LibriSpeech), test-{member}", splits,
        tuple(SPLITS[split][2] for split in splits), librispeech_rows, upper_words, "upper case, single spaces", RATE,
    )  # fmt: skip


SPEECH: tuple[Task, ...] = (
    _librispeech("clean"),
    _librispeech("other"),
    _task(
        "speech-folder", "recordings of the user's own", FOLDER_SPLITS, (0, 0, 0), speech_folder_rows, plain_words,
        "NFKC, upper case, letters, digits and inner apostrophes, single spaces", None,
    ),
)  # fmt: skip
