"""JSON data to frozen records, strictly: every key must be there, none may be unknown, every value has its type."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def record_from(cls: type[Record], data: Any, place: str = "") -> Record:
    """Build the dataclass ``cls`` from a JSON object, nested records and tuples included.

    Defaults are not used: what was written must be complete. A nested record with a ``from_dict`` of its own reads
    itself. ``place`` is the path of ``data`` inside the file, for messages.

    Raises:
        ValueError: names the place (``scores[0].score``), what was expected and what was found.
    """
    what = place or cls.__name__
    if not isinstance(data, Mapping):
        raise ValueError(f"{what}: expected an object with the fields of {cls.__name__}, found {data!r}")
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    missing = [key for key in known if key not in data]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), missing, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(known)}"
            raise ValueError(f"{what}: unknown key {key!r}; {hint}")
    if missing:
        raise ValueError(f"{what}: missing {', '.join(missing)}")
    kinds = get_type_hints(cls)
    return cls(**{key: _value(kinds[key], data[key], f"{place}.{key}" if place else key) for key in known})


def plain(record: Any) -> Any:
    """The inverse of `record_from`: records, mappings and tuples as JSON data; a record's own ``to_dict`` is used."""
    if hasattr(record, "to_dict"):
        return plain(record.to_dict())
    if is_dataclass(record) and not isinstance(record, type):
        return {field.name: plain(getattr(record, field.name)) for field in fields(record)}
    if isinstance(record, Mapping):
        return {str(key): plain(value) for key, value in record.items()}
    return [plain(value) for value in record] if isinstance(record, list | tuple) else record


def _value(kind: Any, data: Any, place: str) -> Any:
    """``data`` as a value of the annotation ``kind``: the few forms that records here use."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (a for a in arguments if a is not type(None))
        return None if data is None else _value(inner, data, place)
    if origin is Literal:
        if data not in arguments:
            raise ValueError(f"{place}: expected one of {', '.join(map(repr, arguments))}, found {data!r}")
        return data
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise ValueError(f"{place}: expected a list, found {data!r}")
        kinds = [arguments[0]] * len(data) if arguments[-1] is ... else list(arguments)
        if len(kinds) != len(data):
            raise ValueError(f"{place}: expected {len(kinds)} values, found {len(data)}")
        return tuple(_value(k, value, f"{place}[{i}]") for i, (k, value) in enumerate(zip(kinds, data)))
    if origin is Mapping:
        if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
            raise ValueError(f"{place}: expected an object, found {data!r}")
        return {key: _value(arguments[1], value, f"{place}.{key}") for key, value in data.items()}
    if kind is Any:
        return data
    if is_dataclass(kind):
        if hasattr(kind, "from_dict"):
            try:
                return kind.from_dict(data)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{place}: {error}") from error
        return record_from(kind, data, place)  # type: ignore[arg-type]
    whole_float = kind is float and isinstance(data, int)
    if isinstance(data, bool) != (kind is bool) or not (isinstance(data, kind) or whole_float):
        raise ValueError(f"{place}: expected {kind.__name__}, found {data!r}")
    return float(data) if kind is float else data
