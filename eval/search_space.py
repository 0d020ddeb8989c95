"""A search space as a user's YAML file, and the list of trials that it stands for: the same list in every worker.

Example::

    learning_rate: [1.0e-5, 2.4e-5, 5.0e-5]          # values to choose from
    rho: {low: 4.0e-4, high: 1.0e-2, log: true}      # a range, for random search only
    seed: {low: 0, high: 9, integer: true}
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator, model_validator

Method = Literal["grid", "random"]
Settings = dict[str, Any]


class SearchSpaceError(ValueError):
    """A search space that cannot be read, or that does not go with the kind of search."""


class Range(BaseModel):
    """Every number from ``low`` to ``high``, both included; ``log``: even in the logarithm."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float
    high: float
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low must be below high, found {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range starts above 0, found {self.low}")
        if self.integer and not (self.low.is_integer() and self.high.is_integer()):
            raise ValueError(f"an integer range has integer ends, found {self.low} and {self.high}")
        return self

    def draw(self, generator: np.random.RandomState) -> float | int:
        """One value; floats are rounded to four digits, so that a table shows what was run."""
        if self.integer and not self.log:
            return int(generator.randint(int(self.low), int(self.high) + 1))
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = float(generator.uniform(*ends))
        value = math.exp(value) if self.log else value
        value = min(max(float(f"{value:.4g}"), self.low), self.high)
        return round(value) if self.integer else value


class Choices(BaseModel):
    """The values listed, each at most once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    values: tuple[str | int | float | bool, ...]

    @field_validator("values", mode="before")
    @classmethod
    def _numbers(cls, values: Any) -> Any:
        # YAML 1.1 takes 1e-5 for a text: it wants 1.0e-5
        return tuple(_number(value) if isinstance(value, str) else value for value in values)

    @model_validator(mode="after")
    def _different(self) -> Choices:
        if not self.values or len({repr(value) for value in self.values}) != len(self.values):
            raise ValueError(f"expected at least one value, and none twice, found {list(self.values)}")
        return self


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


class SearchSpace(BaseModel):
    """What a sweep varies: setting -> values or a range."""

    model_config = ConfigDict(frozen=True)

    settings: dict[str, Choices | Range]

    @classmethod
    def load(cls, path: str | Path) -> SearchSpace:
        """Read a YAML file.

        Raises:
            SearchSpaceError: no such file, no YAML, or a setting that is neither a list nor a range; it names the key.
        """
        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SearchSpaceError(f"search space {path} cannot be read: {error}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SearchSpaceError(f"{path} is not readable as YAML: {error}") from error
        return cls.parse(data, where=str(path))

    @classmethod
    def parse(cls, data: Any, where: str = "search space") -> SearchSpace:
        """From plain data: ``{"learning_rate": [1e-5, 3e-5], "rho": {"low": 1e-4, "high": 1e-2, "log": True}}``.

        Raises:
            SearchSpaceError: see `load`.
        """
        if not isinstance(data, Mapping) or not data:
            raise SearchSpaceError(
                f"{where}: expected `setting: [values]` or `setting: {{low:, high:}}`, found {data!r}"
            )
        settings: dict[str, Choices | Range] = {}
        for name, value in data.items():
            try:
                if isinstance(value, list | tuple):
                    settings[str(name)] = Choices(values=tuple(value))
                else:
                    settings[str(name)] = TypeAdapter(Range).validate_python(value)
            except ValidationError as error:
                fault = error.errors()[0]
                key = ".".join([str(name), *(str(part) for part in fault["loc"] if part != "values")])
                message = fault["msg"].removeprefix("Value error, ")
                raise SearchSpaceError(
                    f"{where}, {key}: {message}; write a list of values, or {{low: 1.0e-5, high: 1.0e-3, log: true}}"
                ) from error
        return cls(settings=settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data as `parse` takes it: what a report calls its search space."""
        return {
            name: list(found.values) if isinstance(found, Choices) else found.model_dump()
            for name, found in self.settings.items()
        }

    def trials(self, method: Method, count: int | None = None, seed: int = 0) -> list[Settings]:
        """The settings of every trial: all combinations, or ``count`` independent draws from ``seed``.

        Raises:
            SearchSpaceError: a grid over a range or with a count, a random search without one.
        """
        if method == "grid":
            return self._grid(count)
        if method != "random":
            raise SearchSpaceError(f"a search is grid or random, found {method!r}")
        if count is None or count < 1:
            raise SearchSpaceError(f"a random search needs the number of trials (at least 1), found {count!r}")
        generator = np.random.RandomState(seed)  # its stream is frozen by NumPy: the same trials over versions
        drawn = []
        for _ in range(count):
            drawn.append(
                {
                    name: found.values[generator.randint(len(found.values))]
                    if isinstance(found, Choices)
                    else found.draw(generator)
                    for name, found in self.settings.items()
                }
            )
        return drawn

    def _grid(self, count: int | None) -> list[Settings]:
        ranges = [name for name, found in self.settings.items() if isinstance(found, Range)]
        if ranges:
            raise SearchSpaceError(
                f"a grid needs lists of values, {ranges[0]} is a range: list them, or search randomly"
            )
        columns = [found.values for found in self.settings.values() if isinstance(found, Choices)]
        points = [dict(zip(self.settings, values, strict=True)) for values in itertools.product(*columns)]
        if count is not None and count != len(points):
            raise SearchSpaceError(f"this grid has {len(points)} points, found trials={count}: leave the number out")
        return points
