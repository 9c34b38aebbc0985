"""A result that a thread works on while its owner does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """What ``action`` returns, called on a thread that keeps no process alive.

    Args:
        action: called once, at once.
    """

    def __init__(self, action: Callable[[], T]) -> None:
        self._future: Future[T] = Future()
        threading.Thread(target=self._run, args=(action,), daemon=True).start()

    def wait(self, seconds: float | None = None) -> None:
        """Until it is there, or so long; what went wrong is for ``result``."""
        wait([self._future], timeout=seconds)

    def result(self) -> T:
        """What ``action`` returned, or raise what it raised."""
        return self._future.result()

    def _run(self, action: Callable[[], T]) -> None:
        try:
            self._future.set_result(action())
        except BaseException as error:  # raised by result
            self._future.set_exception(error)
