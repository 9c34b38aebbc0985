"""Work that every rank does for itself and that fails on all of them or on none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def on_all_ranks(action: Callable[[], T]) -> T:
    """What ``action`` returns on this rank; the first rank's error is raised on every rank.

    ``action`` is no collective itself, or the ranks that it fails on would keep the others waiting.

    Raises:
        ValueError: as the user's error of any rank (its kind where it is another).
        RuntimeError: where another rank failed for a reason that is not the user's.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as problem:  # raised below, on every rank
        error = problem
    errors: list[Any] = [None] * dist.get_world_size()
    # Not the error itself: it may hold what does not travel.
    dist.all_gather_object(errors, None if error is None else (type(error).__name__, str(error)))
    first = next((rank for rank, problem in enumerate(errors) if problem is not None), None)
    if first is None:
        return result  # type: ignore[return-value]
    kind, message = errors[first]
    if first == dist.get_rank() and error is not None:
        raise error
    kinds = {"ValueError": ValueError, "NotImplementedError": NotImplementedError}
    if kind in kinds:
        raise kinds[kind](message)
    raise RuntimeError(f"rank {first}: {kind}: {message}")
