"""A record's JSON, read key by key: what is missing or of the wrong type is refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import RecordError

_MOST_INTEGER = 2**63 - 1  # what a column of a table holds
_MOST_NUMBER = 1e200  # what still can be squared, or scaled to a chart


@dataclass(frozen=True)
class Fields:
    """A JSON object of a record; `where` leads to it, with a trailing dot."""

    path: Path
    where: str
    value: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """Return what stands under a key."""
        if key not in self.value:
            raise RecordError(f"{self.path} lacks {self.where}{key}")
        return self.value[key]

    def text(self, key: str) -> str:
        """Return a text that is not empty."""
        value = self.get(key)
        return value if isinstance(value, str) and value else self._refuse(key, value, "a text")

    def integer(self, key: str, least: int = 0) -> int:
        """Return a whole number of at least `least` that 63 bits hold."""
        value = self.get(key)
        fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST_INTEGER
        return int(value) if fits else self._refuse(key, value, f"a whole number from {least} to 2^63 - 1")

    def number(self, key: str) -> float:
        """Return a finite number, of at most 1e200 either way."""
        value = self.get(key)
        fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST_NUMBER
        return float(value) if fits else self._refuse(key, value, "a finite number of at most 1e200")

    def positive(self, key: str) -> float:
        """Return a finite number above 0."""
        value = self.number(key)
        return value if value > 0 else float(self._refuse(key, value, "above 0"))

    def number_or_none(self, key: str, least: float = -math.inf) -> float | None:
        """Return a finite number of at least `least`, or None where null or NaN stands."""
        value = self.get(key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        number = self.number(key)
        return number if number >= least else float(self._refuse(key, value, f"at least {least:g}, or null"))

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Return an object."""
        value = self.get(key)
        return value if isinstance(value, dict) else self._refuse(key, value, "an object")

    def fields(self, key: str) -> Fields:
        """Return an object to read key by key."""
        return Fields(self.path, f"{self.where}{key}.", self.mapping(key))

    def rows(self, key: str) -> Iterator[Fields]:
        """Yield the objects of a list that is not empty."""
        rows = self.get(key)
        if not isinstance(rows, list) or not rows:
            self._refuse(key, rows, "a list that is not empty")
        for index, row in enumerate(rows):
            name = f"{self.where}{key}[{index}]"
            if not isinstance(row, dict):
                raise RecordError(f"{self.path}: {name} is {row!r}, no object")
            yield Fields(self.path, f"{name}.", row)

    def others(self, known: Sequence[str]) -> dict[str, Any]:
        """Return what stands under keys that are not `known`."""
        return {key: value for key, value in self.value.items() if key not in known}

    def _refuse(self, key: str, value: Any, allowed: str) -> Any:
        raise RecordError(f"{self.path}: {self.where}{key} is {value!r}; it must be {allowed}")
