"""Calls of a reward in this process: one after the other, or awaited together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .worker import plain, told


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a call gave no value.

    Attributes:
        reason: what happened, as the end of a sentence.
        timed_out: whether it was ended for its time.
    """

    reason: str
    timed_out: bool = False


Outcome = Any  # what a call returned, as JSON has it, or a Failure
# Hears of every failure at once, with the number of its call; what it raises ends all calls.
OnFailure = Callable[[int, Failure], None]


def call_here(
    function: Callable[..., Any], calls: Sequence[Call], on_failure: OnFailure
) -> list[Outcome]:
    """What ``function`` returns, call after call on this thread."""
    return [
        _attempt(lambda call=call: plain(function(*call.args, **call.kwargs)), number, on_failure)  # type: ignore[misc]
        for number, call in enumerate(calls)
    ]


def call_async(
    function: Callable[..., Any],
    calls: Sequence[Call],
    on_failure: OnFailure,
    runner: asyncio.Runner,
    *,
    max_concurrency: int,
    timeout_seconds: float | None,
) -> list[Outcome]:
    """What an ``async`` function returns; at most ``max_concurrency`` calls are under way.

    A client that the function keeps belongs to the loop that it began in, so ``runner`` has to be
    the same at every call.
    """
    outcomes: list[Outcome] = [None] * len(calls)

    async def run(number: int, call: Call, free: asyncio.Semaphore) -> None:
        async with free:
            try:
                async with asyncio.timeout(timeout_seconds) as limit:
                    outcome = plain(await function(*call.args, **call.kwargs))
            except Exception as error:
                outcome = timed_out(timeout_seconds) if limit.expired() else Failure(told(error))
        outcomes[number] = outcome
        if isinstance(outcome, Failure):
            on_failure(number, outcome)

    async def run_all() -> None:
        free = asyncio.Semaphore(max_concurrency)
        async with asyncio.TaskGroup() as tasks:
            for number, call in enumerate(calls):
                tasks.create_task(run(number, call, free))

    try:
        runner.run(run_all())
    except ExceptionGroup as group:
        # Of ``on_failure``; the other tasks were cancelled for it.
        raise group.exceptions[0] from None
    return outcomes


def timed_out(seconds: float | None) -> Failure:
    """A call that took too long."""
    return Failure(f"did not return within {seconds:g} s", timed_out=True)


def _attempt(action: Callable[[], Any], number: int, on_failure: OnFailure) -> Outcome:
    try:
        return action()
    except Exception as error:
        failure = Failure(told(error))
    on_failure(number, failure)
    return failure
