"""What a reward may return for a response: a number, a flag, or several numbers by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...data import reward_problem, shorten


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a response is worth.

    Attributes:
        score: finite.
        metrics: finite numbers by name, whose means are reported.

    Raises:
        ValueError: on a number that is not finite.
    """

    score: float
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in [("score", self.score), *self.metrics.items()]:
            if not math.isfinite(value):
                raise ValueError(f"{name}={value} must be finite")


def read_value(value: Any) -> Judgement | str:
    """The judgement that ``value`` says, or what is wrong with it, as the end of a sentence.

    A mapping has its number under ``score``. Its other numbers and flags are metrics; what else it
    holds (a parsed answer, a reason) is left out.
    """
    if not isinstance(value, dict):
        problem = reward_problem(value)
        if problem is None:
            return Judgement(score=float(value))
        return f"returned a reward that {problem}; {_REMEDY}"
    if "score" not in value:
        return f"returned a dict without 'score' ({shorten(list(value))}); {_REMEDY}"
    if (problem := reward_problem(value["score"])) is not None:
        return f"returned a 'score' that {problem}; {_REMEDY}"
    metrics = {}
    for name, entry in value.items():
        if name == "score" or type(entry) not in (int, float, bool):
            continue
        if (problem := reward_problem(entry)) is not None:
            return f"returned {shorten(name)}, which {problem}; leave it out"
        metrics[str(name)] = float(entry)
    return Judgement(score=float(value["score"]), metrics=metrics)


_REMEDY = "return a finite number, True or False, or a dict with one under 'score'"
