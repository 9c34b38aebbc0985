"""Errors of one rank are raised on all; ranks are threads."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from megatron_pg.parallel import collective, on_all_ranks, on_first_rank

NUM_RANKS = 3
Together = Callable[[Callable[[], Any]], Any]


class Threads:
    """In place of ``torch.distributed``: objects travel between threads as between processes."""

    def __init__(self) -> None:
        self.own = threading.local()
        self.barrier = threading.Barrier(NUM_RANKS, timeout=20)
        self.sent: list[bytes] = [b""] * NUM_RANKS

    def get_rank(self) -> int:
        return self.own.rank

    def get_world_size(self) -> int:
        return NUM_RANKS

    def all_gather_object(self, gathered: list[Any], value: Any) -> None:
        self.sent[self.own.rank] = pickle.dumps(value)
        self.barrier.wait()
        gathered[:] = map(pickle.loads, self.sent)
        self.barrier.wait()

    def broadcast_object_list(self, values: list[Any], src: int) -> None:
        gathered: list[Any] = [None] * NUM_RANKS
        self.all_gather_object(gathered, values)
        values[:] = gathered[src]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    monkeypatch.setattr(collective, "dist", Threads())
    return collective.dist  # type: ignore[return-value]


def outcomes(threads: Threads, together: Together, action: Callable[[int], Any]) -> list[Any]:
    """What every rank gets: a value, or an error."""

    def run(rank: int) -> Any:
        threads.own.rank = rank
        try:
            return together(lambda: action(rank))
        except Exception as error:
            return error

    with ThreadPoolExecutor(NUM_RANKS) as pool:
        return list(pool.map(run, range(NUM_RANKS)))


def failing(on: tuple[int, ...], error: Exception) -> Callable[[int], int]:
    def action(rank: int) -> int:
        if rank in on:
            raise type(error)(*error.args, rank)
        return rank

    return action


def test_values(threads: Threads) -> None:
    assert outcomes(threads, on_all_ranks, lambda rank: rank) == [0, 1, 2]
    assert outcomes(threads, on_first_rank, lambda rank: rank + 7) == [7, 7, 7]


@pytest.mark.parametrize("kind", [ValueError, NotImplementedError, OSError])
@pytest.mark.parametrize(
    ("together", "on", "first"),
    [(on_all_ranks, (1, 2), 1), (on_all_ranks, (2,), 2), (on_first_rank, (0, 1), 0)],
)
def test_the_users_errors_are_the_same_everywhere(
    threads: Threads,
    together: Together,
    on: tuple[int, ...],
    first: int,
    kind: type[Exception],
) -> None:
    found = outcomes(threads, together, failing(on, kind("of rank")))
    # The first rank that fails is told of, and every other one of its error.
    assert [(type(error), error.args[-1]) for error in found] == [(kind, first)] * NUM_RANKS


@pytest.mark.parametrize(("together", "rank"), [(on_all_ranks, 1), (on_first_rank, 0)])
def test_other_errors_are_told_in_words(threads: Threads, together: Together, rank: int) -> None:
    """They may hold what does not travel, as this one holds a lock."""
    found = outcomes(threads, together, failing((rank,), KeyError(threading.Lock())))
    assert type(found[rank]) is KeyError
    others = [error for at, error in enumerate(found) if at != rank]
    assert [type(error) for error in others] == [RuntimeError] * 2
    assert all(str(error).startswith(f"rank {rank}: KeyError") for error in others)


def test_first_rank_alone_works(threads: Threads) -> None:
    seen: list[int] = []
    outcomes(threads, on_first_rank, seen.append)
    assert seen == [0]
