"""Settings of a reward, as a configuration gives them: a name, a mapping, or a list of these."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

OnError = Literal["raise", "score"]

# name -> path of the function
REWARDS: Mapping[str, str] = {"math": "megatron_pg.rollout:math_score"}
"""Rewards that need no module of one's own."""


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """One reward of a run.

    Attributes:
        name: ``module:name`` of a function, or of a class that is made with ``kwargs``; or a key of
            ``REWARDS``.
        kwargs: further keyword arguments of every call, or of the class.
        weight: of its score in the sum of several rewards.
        timeout_seconds: of a call, after which its process is killed; of all samples of a step
            where a call takes them all (TRL's). None is no limit. What is ``async`` is cancelled
            instead where it runs in this process.
        num_processes: processes that call it; 0 calls it in this one. None is 1 for "math" and for
            what has a time limit and is not ``async``, else 0.
        max_concurrency: calls of an ``async`` reward that are under way at once.
        on_error: whether a call that raises, takes too long or returns no number ends the run
            ("raise") or scores ``error_score`` ("score"), counted in the metrics.
        error_score: see ``on_error``.

    Raises:
        ValueError: naming every value that is not what it must be.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    timeout_seconds: float | None = None
    num_processes: int | None = None
    max_concurrency: int = 64
    on_error: OnError = "raise"
    error_score: float = 0.0

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ValueError("; ".join(problems))

    @property
    def path(self) -> str:
        """``module:name``."""
        return REWARDS.get(self.name, self.name)

    @property
    def label(self) -> str:
        """The name without its module."""
        return self.name.rpartition(":")[2]

    def _problems(self) -> Iterator[str]:
        if not isinstance(self.name, str) or (":" not in self.name and self.name not in REWARDS):
            known = ", ".join(REWARDS)
            yield f"name={self.name!r} must be module:name, or one of {known}"
        if not isinstance(self.kwargs, dict) or not all(isinstance(k, str) for k in self.kwargs):
            yield f"kwargs={self.kwargs!r} must be a mapping of argument names"
        for name in ("weight", "error_score"):
            if not _is_finite(getattr(self, name)):
                yield f"{name}={getattr(self, name)!r} must be a finite number"
        seconds = self.timeout_seconds
        if seconds is not None and not (_is_finite(seconds) and seconds > 0):
            yield f"timeout_seconds={seconds!r} must be null or a number above 0"
        number = self.num_processes
        if number is not None and (type(number) is not int or number < 0):
            yield f"num_processes={number!r} must be null or an integer of at least 0"
        if type(self.max_concurrency) is not int or self.max_concurrency < 1:
            yield f"max_concurrency={self.max_concurrency!r} must be an integer of at least 1"
        if self.on_error not in get_args(OnError):
            yield f"on_error={self.on_error!r} must be one of {', '.join(get_args(OnError))}"


def reward_settings(value: Any) -> tuple[RewardSettings, ...]:
    """The rewards that ``rollout.reward`` names.

    Args:
        value: a name, a mapping of the fields of ``RewardSettings``, or a list of these.

    Raises:
        ValueError: naming every unknown key and wrong value, and two rewards of one name.
    """
    entries = value if isinstance(value, list) else [value]
    problems: list[str] = [] if entries else [" is an empty list; name a reward, or set it to null"]
    read: list[RewardSettings] = []
    for number, entry in enumerate(entries):
        where = f"[{number}] " if isinstance(value, list) else " "
        try:
            read.append(_read_one(entry))
        except ValueError as error:
            problems.append(f"{where}{error}")
    names = [one.name for one in read]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f" has {name!r} twice; its metrics need a name of their own")
    if problems:
        raise ValueError("; ".join(f"rollout.reward{problem}" for problem in problems))
    return tuple(read)


def metric_names(settings: Sequence[RewardSettings]) -> list[str]:
    """How the metrics of several rewards are called: by label, or by name where labels are equal.

    verl's rewards are all called ``compute_score``.
    """
    labels = [one.label for one in settings]
    return [one.label if labels.count(one.label) == 1 else one.name for one in settings]


def _read_one(entry: Any) -> RewardSettings:
    if isinstance(entry, str):
        return RewardSettings(name=entry)
    if not isinstance(entry, Mapping):
        raise ValueError(f"is {entry!r}, must be a name or a mapping with 'name'")
    known = [f.name for f in fields(RewardSettings)]
    for name in entry:
        if name not in known:
            close = get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"has an unknown key {name!r}; {hint}")
    if "name" not in entry:
        raise ValueError("has no 'name'")
    return RewardSettings(**entry)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf
