"""Work of one rank or of all that fails on all ranks or on none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_all_ranks(action: Callable[[], T]) -> T:
    """What ``action`` returns on this rank; the first rank's error is raised on every rank.

    ``action`` is no collective itself, or the ranks that it fails on would keep the others waiting.

    Raises:
        ValueError: or NotImplementedError or OSError, as on the first rank that failed.
        RuntimeError: where another rank failed for a reason that is not the user's.
    """
    result, error = attempt(action)
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, told_error(error))
    first = next((rank for rank, problem in enumerate(errors) if problem is not None), None)
    if first is not None:
        raise error if first == dist.get_rank() and error is not None else errors[first]
    return result  # type: ignore[return-value]


def from_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """What ``action`` returned on every rank of a group, on each of them.

    Raises:
        ValueError: or whatever the first rank that failed raised, on all of them, as
            ``on_all_ranks``.
    """
    result, error = attempt(action)
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, (result, told_error(error)), group=group)
    for rank, (_, told) in enumerate(parts):
        if told is not None:
            raise error if rank == dist.get_rank(group) and error is not None else told
    return [value for value, _ in parts]


def on_first_rank(action: Callable[[], T]) -> T:
    """What ``action`` returns on rank 0, on every rank; its error is raised on every rank.

    Raises:
        ValueError: or NotImplementedError or OSError, as on rank 0.
        RuntimeError: on other ranks, where it failed for a reason that is not the user's.
    """
    result, error = attempt(action) if dist.get_rank() == 0 else (None, None)
    shared: list[Any] = [result, told_error(error)]
    dist.broadcast_object_list(shared, src=0)
    if shared[1] is not None:
        raise error or shared[1]
    return shared[0]  # type: ignore[no-any-return]


def attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What ``action`` returned, and its error, which the caller raises on every rank."""
    try:
        return action(), None
    except Exception as error:  # raised on every rank
        return None, error


def told_error(error: Exception | None) -> Exception | None:
    """What the other ranks raise: other errors may hold what does not travel."""
    is_users = isinstance(error, (ValueError, NotImplementedError, OSError))
    is_known = type(error).__module__.split(".")[0] in ("builtins", "megatron_pg")
    if error is None or (is_users and is_known):
        return error
    return RuntimeError(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
