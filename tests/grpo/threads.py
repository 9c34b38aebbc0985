"""Replicas of the model as threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class ThreadReplica:
    """One of several replicas of one rank each (see ``grpo.Replicas``)."""

    num_ranks, leads = 1, True

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(board)
        self._board, self._barrier = board, barrier

    def gather(self, action: Callable[[], T]) -> list[T]:
        try:
            answer: Any = (action(), None)
        except ValueError as error:
            answer = (None, error)
        answers = self._tell(answer)
        for _, error in answers:
            if error is not None:
                raise error
        return [value for value, _ in answers]

    def exchange(self, parts: Sequence[bytes]) -> list[bytes]:
        assert parts[self.rank] == b"", "what stays needs no message"
        return [sent[self.rank] for sent in self._tell(list(parts))]

    def share(self, action: Callable[[], T]) -> T:
        return action()

    def from_last_stage(self, values: Tensor | None, count: int) -> Tensor:
        assert values is not None and len(values) == count
        return values

    def _tell(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait()
        found = list(self._board)
        self._barrier.wait()
        return found


def on_replicas(size: int, action: Callable[[ThreadReplica], T]) -> list[T | Exception]:
    """What ``action`` returns, or raises, on each of ``size`` replicas."""
    board, barrier = [None] * size, threading.Barrier(size, timeout=30)
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = action(ThreadReplica(rank, board, barrier))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
