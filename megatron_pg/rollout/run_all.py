"""Many requests at once, of which the first failure ends all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

J = TypeVar("J")
R = TypeVar("R")


def run_all(
    action: Callable[[J, threading.Event], R],
    jobs: Sequence[J],
    max_concurrency: int,
    stop: threading.Event,
) -> list[R]:
    """What ``action`` returns for every job, in order.

    The first one that fails, whichever it is, sets ``stop``, which the others got, and is raised.
    """
    failures: list[BaseException] = []

    def run(job: J) -> R:
        try:
            return action(job, stop)
        except BaseException as error:
            # Before the others learn of it and fail too.
            failures.append(error)
            stop.set()
            raise

    with ThreadPoolExecutor(max_workers=max_concurrency) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # Also when the wait itself is interrupted.
            if not all(future.done() for future in futures):
                stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        raise failures[0]
    return [future.result() for future in futures]
