"""Many rows in little memory."""

from __future__ import annotations

import pickle
from array import array
from typing import Any


class RowStore:
    """Rows with their places, each encoded: a million of them in the size of their text.

    As objects they would take several times as much, on every rank.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])

    def append(self, place: str, row: dict[str, Any]) -> None:
        """Keep a row and where it stands."""
        self._bytes += pickle.dumps((place, row), protocol=5)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> tuple[str, dict[str, Any]]:
        # Nothing but what ``append`` wrote is ever unpickled.
        with memoryview(self._bytes) as content:
            found: tuple[str, dict[str, Any]] = pickle.loads(
                content[self._ends[number] : self._ends[number + 1]]
            )
        return found
