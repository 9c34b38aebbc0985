"""When a request that failed is made again."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

# Statuses of a server that is overloaded or restarting; any other error will not pass by itself.
TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When to try again after a transient failure: exponential backoff with jitter.

    Attributes:
        max_attempts: tries in all, at least 1.
        first_wait_seconds: mean wait before the second try; doubles with every further one.
        max_wait_seconds: longest wait, also of a wait that the server asks for.

    Raises:
        ValueError: if ``max_attempts`` is no integer of at least 1, or a wait is not finite or
            negative.
    """

    max_attempts: int = 6
    first_wait_seconds: float = 0.5
    max_wait_seconds: float = 30.0

    def __post_init__(self) -> None:
        if type(self.max_attempts) is not int or self.max_attempts < 1:
            raise ValueError(f"max_attempts={self.max_attempts!r} must be an integer of at least 1")
        for name in ("first_wait_seconds", "max_wait_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be finite and at least 0")

    def wait_seconds(self, attempt: int, asked_seconds: float | None) -> float:
        """Wait after failed try number ``attempt`` (from 0), longer if the server asked for it."""
        # Jitter: clients that failed together must not come back together.
        wait = self.first_wait_seconds * 2.0 ** min(attempt, 64) * random.uniform(0.5, 1.5)
        return min(max(wait, asked_seconds or 0.0), self.max_wait_seconds)


def retry_after_seconds(header: str | None) -> float | None:
    """What a Retry-After asks for, in seconds or as a date; None where it cannot be read."""
    if header is None:
        return None
    from urllib3 import Retry

    try:
        return Retry().parse_retry_after(header)
    except Exception:  # dates of servers fail in many ways; the backoff does instead
        return None
