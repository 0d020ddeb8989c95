"""Recordings as waveforms: FLAC and WAV by soundfile, one channel, resampled where the model wants another rate.

Legend: T values of a waveform.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import DataError
from .task import Row

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Header:
    """What a file says of itself: ``rate`` in Hz, ``values`` per channel."""

    rate: int
    values: int


def _source(audio: Path | bytes) -> Any:
    return io.BytesIO(audio) if isinstance(audio, bytes) else str(audio)


def _name(row: Row) -> str:
    """``file:line of the transcript (file of the recording)``."""
    return row["where"] if isinstance(row["audio"], bytes) else f"{row['where']} ({row['audio']})"


def soundfile() -> Any:
    """The library of that name. Raises ValueError with the command that installs it."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the wheel without its C library
        raise ValueError(f"recordings are read with soundfile ({error}): pip install soundfile") from error
    return soundfile


def read_header(row: Row, rate: int | None = None) -> Header:
    """Rate and length of a row's recording, without decoding it.

    Args:
        rate: what the recording must have; None takes any.

    Raises:
        DataError: not a readable sound file, several channels, no sound, another rate. ValueError: no soundfile.
    """
    library = soundfile()
    try:
        info = library.info(_source(row["audio"]))
    except library.SoundFileError as error:
        raise DataError(f"{_name(row)}: not a readable FLAC or WAV file ({error})") from error
    _check_riff(row)
    if info.channels != 1:
        raise DataError(f"{_name(row)}: expected one channel, found {info.channels}: mix the recording down first")
    if rate is not None and info.samplerate != rate:
        raise DataError(f"{_name(row)}: expected {rate} Hz as in the official corpus, found {info.samplerate} Hz")
    if info.frames < 1:
        raise DataError(f"{_name(row)}: the recording holds no sound")
    return Header(int(info.samplerate), int(info.frames))


def _check_riff(row: Row) -> None:
    """A WAV file says in its first bytes how long it is; the library would take a shorter one as it is."""
    audio = row["audio"]
    if isinstance(audio, bytes):
        start, found = audio[:8], len(audio)
    else:
        with open(audio, "rb") as file:
            start = file.read(8)
        found = audio.stat().st_size
    told = int.from_bytes(start[4:8], "little")
    if start[:4] == b"RIFF" and told not in (0, 0xFFFFFFFF) and found < told + 8:  # these two: written to a pipe
        raise DataError(f"{_name(row)}: the file ends after {found:,} of {told + 8:,} bytes; copy it again")


def read_waveform(row: Row, header: Header, rate: int) -> np.ndarray:
    """The recording, -1 to 1, float32 [T], at ``rate``; see `resampled_length`.

    Another rate is converted by SciPy's polyphase filter (``resample_poly``, its default Kaiser window).

    Raises:
        DataError: a file that ends early or does not decode.
    """
    library = soundfile()
    try:
        values_T, _ = library.read(_source(row["audio"]), dtype="float32")
    except library.SoundFileError as error:
        raise DataError(f"{_name(row)}: the recording does not decode ({error}); copy it again") from error
    if len(values_T) != header.values:
        raise DataError(
            f"{_name(row)}: the recording ends after {len(values_T):,} of {header.values:,} values; copy it again"
        )
    if header.rate == rate:
        return values_T
    from scipy.signal import resample_poly

    common = gcd(header.rate, rate)
    resampled: np.ndarray = resample_poly(values_T, rate // common, header.rate // common).astype("float32")
    return resampled


def resampled_length(header: Header, rate: int) -> int:
    """Number of values that `read_waveform` gives."""
    return -(-header.values * rate // header.rate)
