"""Values of a checkpoint's ``args``: each of its kind, or refused."""

from __future__ import annotations

from typing import Any

import torch

from ..files import NAMED_DTYPES
from .config_values import MAX_SIZE

NEED = "give the model's configuration by hf_config=DIR"
_UNSET: Any = object()


class ArgumentValues:
    """Arguments by name.

    Args:
        values: of the namespace.
        where: names the checkpoint in errors.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, name: str) -> Any:
        """Whatever is given, or None."""
        return self.values.get(name)

    def size(self, name: str, default: Any = _UNSET, high: int = MAX_SIZE) -> Any:
        """An integer from 1 to ``high``."""
        value = self._given(name, default)
        if value is not default and not (type(value) is int and 1 <= value <= high):
            self.refuse(name, value, f"an integer from 1 to {high}")
        return value

    def number(self, name: str, default: Any = _UNSET) -> Any:
        """A finite number above 0."""
        value = self._given(name, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            self.refuse(name, value, "finite and above 0")
        return float(value)

    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        value = self._given("params_dtype", torch.float32)
        if value not in list(NAMED_DTYPES.values()):
            self.refuse("params_dtype", value, f"one of {', '.join(NAMED_DTYPES)}")
        return value  # type: ignore[no-any-return]

    def refuse(self, name: str, value: Any, rule: str) -> None:
        """Raise for a value that breaks ``rule``.

        Raises:
            ValueError: naming checkpoint, argument, value and rule.
        """
        raise ValueError(
            f"{self.where}: args have {name}={str(value)[:80]!r}, which must be {rule}; {NEED}"
        )

    def _given(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _UNSET:
            raise ValueError(f"{self.where}: args have no {name}; {NEED}")
        return default
