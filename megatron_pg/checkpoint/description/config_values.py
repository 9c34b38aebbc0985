"""Values of a ``config.json``: present, of their type, and within what a model can have."""

from __future__ import annotations

import json
from typing import Any

_REQUIRED = object()
MAX_SIZE = 2**31 - 1


class ConfigValues:
    """Reads values, keeps what is wrong with them, and knows which keys nobody asked for.

    Args:
        config: an object of the file.
        where: names the file in the error.

    Attributes:
        problems: values that no model has; the file is wrong.
        refused: settings under which Megatron-Core would build another model.
        known: keys that were asked for.
    """

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.config = config
        self.where = where
        self.problems: list[str] = []
        self.refused: list[str] = []
        self.known: set[str] = set()

    def size(self, key: str, high: int = MAX_SIZE, default: Any = _REQUIRED, low: int = 1) -> Any:
        """A whole number from ``low`` to ``high``; ``default`` where the file has none, or null."""
        return self._read(key, default, low, high, f"a whole number from {low} to {high}", int)

    def number(self, key: str, low: float, high: float, default: Any = _REQUIRED) -> Any:
        """A number from ``low`` to ``high``, as a float."""
        what = f"a number from {low:g} to {high:g}"
        value = self._read(key, default, low, high, what, int | float)
        return float(value) if isinstance(value, int) else value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; false where the file has null, ``default`` where it has nothing."""
        value = self.get(key, default)
        if value is not None and not isinstance(value, bool):
            self.problems.append(f"{key}={value!r} must be true or false")
        return value is True

    def section(self, key: str) -> dict[str, Any]:
        """An object; empty where the file has null or nothing."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            self.problems.append(f"{key}={value!r} must be an object")
        return value if isinstance(value, dict) else {}

    def get(self, key: str, default: Any = None) -> Any:
        """Whatever the file has."""
        self.known.add(key)
        return self.config.get(key, default)

    def require(self, *keys: str) -> None:
        """The file must name keys for which transformers has a default of its own."""
        for key in keys:
            if key not in self.config:
                self.problems.append(
                    f"key {key!r} is missing: name it, for transformers has a default of its own"
                )

    def take_as(self, key: str, older: str) -> None:
        """Read what older files call ``older`` as ``key``; a file with both says the same twice."""
        value = self.get(older)
        if value is not None:
            self.must(key, value)
            self.config = {**self.config, key: value}

    def must(self, key: str, *values: Any) -> None:
        """A key that the file has is one of ``values``, or no model is built from it."""
        value = self.get(key, values[0])
        if value not in values:
            self.refused.append(f"{key}={value!r} (must be {values[0]!r})")

    def finish(self, neutral: set[str]) -> None:
        """Raise what is wrong, or refused, or was not asked for.

        Args:
            neutral: keys that leave the logits alone; so do token ids and private keys
                ("_name_or_path"), and whatever is off.

        Raises:
            ValueError: naming the file and every value that is wrong.
            NotImplementedError: naming the file, every setting that is refused and every key that
                is unknown.
        """
        if self.problems:
            raise ValueError(f"{self.where}: " + "; ".join(self.problems) + "; correct the file")
        unknown = sorted(
            key
            for key in self.config.keys() - self.known - neutral
            if self.config[key] and not key.startswith("_") and not key.endswith("_token_id")
        )
        refused = self.refused + [
            f"unknown key {key}={json.dumps(self.config[key])[:80]}" for key in unknown
        ]
        if refused:
            advice = ". An unknown key that does not change the logits may be removed from the file"
            raise NotImplementedError(
                f"{self.where}: not supported: " + "; ".join(refused) + (advice if unknown else "")
            )

    def _read(self, key: str, default: Any, low: Any, high: Any, what: str, kinds: Any) -> Any:
        value = self.get(key)
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
