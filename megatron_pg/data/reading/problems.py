"""Everything that is wrong with a set of files, told at once."""

from __future__ import annotations


class Problems:
    """Collects problems and raises them together.

    Args:
        limit: problems that are written out; the rest are counted.
        what: holds them, for the message.
    """

    def __init__(self, limit: int = 20, what: str = "rollouts") -> None:
        self._limit = limit
        self._what = what
        self._lines: list[str] = []
        self.total = 0

    def add(self, where: str, message: str, field: str | None = None) -> None:
        """Note that ``message`` holds at ``where``, a file and, if any, a row of it."""
        self.total += 1
        if len(self._lines) < self._limit:
            name = f" field {field!r}" if field else ""
            self._lines.append(f"{where}:{name} {message}")

    def raise_if_any(self) -> None:
        """Raises: ValueError that lists the problems noted so far."""
        if not self.total:
            return
        lines = [f"{self.total} problem{'s' * (self.total > 1)} in the {self._what}:", *self._lines]
        if self.total > len(self._lines):
            lines.append(f"... and {self.total - len(self._lines)} more")
        raise ValueError("\n  ".join(lines))
