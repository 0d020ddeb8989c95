"""Checks on the fields of a record: what cannot be compared cannot be constructed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any


def checked_fields(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` as keyword arguments of the record ``cls``; ValueError names every unknown or missing key."""
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
    unknown = sorted(set(data) - set(known))
    missing = [name for name, required in known.items() if required and name not in data]
    if unknown or missing:
        raise ValueError(f"{cls.__name__}: missing keys {missing}, unknown keys {unknown}; expected {list(known)}")
    return dict(data)


def require_text(record: Any, *names: str) -> None:
    """The fields ``names`` of a record hold texts with something in them, or ValueError says which does not."""
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{type(record).__name__}: {name} must be a non-empty text, got {value!r}")


def require_count(record: Any, *names: str) -> None:
    """The fields ``names`` of a record hold integers of at least 1, or ValueError says which does not."""
    for name in names:
        value = getattr(record, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(record).__name__}: {name} must be an integer of at least 1, got {value!r}")


def require_bool(record: Any, *names: str) -> None:
    """The fields ``names`` of a record hold True or False, or ValueError says which does not."""
    for name in names:
        value = getattr(record, name)
        if not isinstance(value, bool):
            raise ValueError(f"{type(record).__name__}: {name} must be True or False, got {value!r}")


def require_libraries(record: Any) -> None:
    """The field ``libraries`` of a record maps names to versions; it is replaced by a copy."""
    libraries = record.libraries
    if not isinstance(libraries, Mapping) or not libraries or not all(isinstance(v, str) for v in libraries.values()):
        raise ValueError(f"{type(record).__name__}: libraries must map names to versions, got {libraries!r}")
    object.__setattr__(record, "libraries", dict(libraries))
