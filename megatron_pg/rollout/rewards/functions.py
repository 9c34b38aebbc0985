"""Reward functions, and those that come with the package."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ..values import Prompt, Response
from .values import Judgement


class RewardFunction(Protocol):
    """Any callable of a prompt and one of its responses that returns a finite number."""

    def __call__(self, prompt: Prompt, response: Response) -> float: ...


@runtime_checkable
class BatchedReward(Protocol):
    """Judges all responses of a step that this replica has."""

    def judge(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Judgement]:
        """One judgement per response, whose prompt stands at its place in ``prompts``."""
        ...


@dataclass(frozen=True)
class CombinedReward:
    """Weighted sum of rewards.

    Attributes:
        parts: pairs of weight and reward function, at least one.

    Raises:
        ValueError: if ``parts`` is empty.
    """

    parts: tuple[tuple[float, RewardFunction], ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts is empty: combine at least one (weight, reward) pair")

    def __call__(self, prompt: Prompt, response: Response) -> float:
        return sum(weight * reward(prompt, response) for weight, reward in self.parts)


@dataclass(frozen=True)
class FormatReward:
    """1.0 for a completed response whose text the regular expression matches in full, else 0.0.

    Attributes:
        pattern: regular expression; a dot matches newlines, surrounding blanks are ignored.
    """

    pattern: str = r".*<answer>.*</answer>"

    def __call__(self, prompt: Prompt, response: Response) -> float:
        found = re.fullmatch(self.pattern, response.text.strip(), flags=re.DOTALL)
        return float(found is not None and response.status == "completed")
