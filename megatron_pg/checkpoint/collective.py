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
        ValueError: or NotImplementedError or OSError, as on the first rank that failed.
        RuntimeError: where another rank failed for a reason that is not the user's.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as problem:  # raised below, on every rank
        error = problem
    told: Exception | None = error
    is_users = isinstance(error, (ValueError, NotImplementedError, OSError))
    is_known = type(error).__module__.split(".")[0] in ("builtins", "megatron_pg")
    if error is not None and not (is_users and is_known):
        # Others may hold what does not travel.
        told = RuntimeError(f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, told)
    first = next((rank for rank, problem in enumerate(errors) if problem is not None), None)
    if first is not None:
        raise error if first == dist.get_rank() and error is not None else errors[first]
    return result  # type: ignore[return-value]
