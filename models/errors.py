"""The errors of this room, and what their messages are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version


class AdapterError(ValueError):
    """An adapter does not describe the model it was given, or no adapter does. Nothing was changed."""


class DenseError(ValueError):
    """A dense model cannot be found, loaded, described or saved. Nothing was changed or written."""


# What transformers, timm and torch raise for configurations and weights that they cannot use.
LIBRARY_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError)


def brief(error: Exception) -> str:
    """An exception of another library in one line: its class and the first two lines of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2]) or 'no message'}"


def nearest(pattern: str, names: Iterable[str], count: int = 3) -> str:
    """The names most like ``pattern``, for an error message: ``a, b, c``, or a plain statement that there are none."""
    # Read the regular expression as a name: any number is 0, groups lose their marks.
    plain = re.sub(r"\\d\+|\(\?(?:P<\w+>|:)", lambda m: "0" if m.group().startswith("\\") else "", pattern)
    plain = re.sub(r"\\(.)|[()?^$]", lambda m: m.group(1) or "", plain)
    close = get_close_matches(plain, list(dict.fromkeys(names)), n=count, cutoff=0.3)
    return ", ".join(close) if close else "no similar name"


def library_note(requirement: str) -> str:
    """``transformers 5.23.0 is installed, the names were checked against transformers>=5.10,<6``."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    name = match.group() if match else requirement
    try:
        installed = f"{name} {version(name)} is installed"
    except PackageNotFoundError:
        installed = f"{name} is not installed"
    return f"{installed}, the names were checked against {requirement}"


def matches_nothing(adapter: str, library: str, lost: Iterable[tuple[str, str, Iterable[str]]]) -> AdapterError:
    """The error for patterns that no module name fits: (kind, pattern, names it was tried on) of each of them."""
    each = [
        f"the {kind} pattern {pattern!r} matches no module, nearest names: {nearest(pattern, names)}"
        for kind, pattern, names in lost
    ]
    return AdapterError(f"adapter {adapter!r}: {'; '.join(each)}. {library_note(library)}.")
