"""Values of a ``config.json``: present, of their type, and within what a model can have."""

from __future__ import annotations

from typing import Any

_REQUIRED = object()
MAX_SIZE = 2**31 - 1


class ConfigValues:
    """Reads values and keeps what is wrong with them, to be raised at once.

    Args:
        config: an object of the file.
        where: names the file in the error.
    """

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.config = config
        self.where = where
        self.problems: list[str] = []

    def size(self, key: str, high: int = MAX_SIZE, default: Any = _REQUIRED) -> Any:
        """A whole number from 1 to ``high``; ``default`` where the file has null or nothing."""
        return self._read(key, default, 1, high, f"a whole number from 1 to {high}", int)

    def number(self, key: str, low: float, high: float, default: Any = _REQUIRED) -> Any:
        """A number from ``low`` to ``high``, as a float."""
        what = f"a number from {low:g} to {high:g}"
        value = self._read(key, default, low, high, what, int | float)
        return float(value) if isinstance(value, int) else value

    def flag(self, key: str) -> bool:
        """True or false; false where the file has null or nothing."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            self.problems.append(f"{key}={value!r} must be true or false")
        return value is True

    def section(self, key: str) -> dict[str, Any]:
        """An object; empty where the file has null or nothing."""
        value = self.config.get(key)
        if value is not None and not isinstance(value, dict):
            self.problems.append(f"{key}={value!r} must be an object")
        return value if isinstance(value, dict) else {}

    def finish(self) -> None:
        """Raise what is wrong.

        Raises:
            ValueError: naming the file and every value.
        """
        if self.problems:
            raise ValueError(f"{self.where}: " + "; ".join(self.problems) + "; correct the file")

    def _read(self, key: str, default: Any, low: Any, high: Any, what: str, kinds: Any) -> Any:
        value = self.config.get(key)
        if value is None:
            if default is _REQUIRED:
                self.problems.append(f"key {key!r} is missing: {what}")
            return low if default is _REQUIRED else default
        # NaN is within no bounds.
        is_number = isinstance(value, kinds) and not isinstance(value, bool)
        if not (is_number and low <= value <= high):
            self.problems.append(f"{key}={value!r:.40} must be {what}")
            return low
        return value
