"""What a response is worth: reward functions, and the groups that rewarded responses form."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..data import Group, Sample
from .base import Prompt, Response


class RewardFunction(Protocol):
    """Any callable of a prompt and one of its responses that returns a finite number."""

    def __call__(self, prompt: Prompt, response: Response) -> float: ...


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


def math_verify_reward(prompt: Prompt, response: Response) -> float:
    """1.0 if the response's last mathematical expression equals ``metadata["answer"]``, else 0.0.

    Call it from the main thread: the library limits its own time by signals.

    Raises:
        ImportError: if math-verify is not installed.
        ValueError: if the prompt has no answer.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            'math_verify_reward needs math-verify: pip install "megatron_pg[math]"'
        ) from error
    if "answer" not in prompt.metadata:
        raise ValueError(f'prompt {prompt.prompt_id!r} has no metadata["answer"] to verify against')
    return float(verify(parse(str(prompt.metadata["answer"])), parse(response.text)))


def make_groups(
    prompts: Sequence[Prompt], responses: Sequence[Sequence[Response]], reward: RewardFunction
) -> list[Group]:
    """One rewarded group per prompt.

    An aborted response trains nothing and is not judged: its reward is 0.0, which nothing reads.

    Args:
        prompts: what was given.
        responses: what was sampled, per prompt, as ``RolloutSource.generate`` returns it.
        reward: called once per other response, in order, on the calling thread.

    Raises:
        ValueError: if the lengths differ, two prompts share an id, or a reward is not finite.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(responses)} groups of responses for {len(prompts)} prompts")
    check_prompt_ids(prompts)
    return [
        Group(prompt.prompt_id, tuple(_make_sample(prompt, one, reward) for one in of_prompt))
        for prompt, of_prompt in zip(prompts, responses)
    ]


def check_prompt_ids(prompts: Sequence[Prompt]) -> None:
    """Raise ValueError if two prompts of a step share an id."""
    if len({prompt.prompt_id for prompt in prompts}) != len(prompts):
        raise ValueError("prompts share a prompt_id: give every prompt of a step its own")


def _make_sample(prompt: Prompt, response: Response, reward: RewardFunction) -> Sample:
    given = 0.0 if response.status == "aborted" else reward(prompt, response)
    value = math.nan if given is None else float(given)
    if not math.isfinite(value):
        raise ValueError(
            f"reward {reward!r} gave {given} for prompt {prompt.prompt_id!r}; return a finite "
            "number"
        )
    mask = response.loss_mask
    return Sample(
        prompt_ids=prompt.prompt_ids,
        response_ids=response.response_ids,
        reward=value,
        loss_mask=torch.ones_like(response.response_ids, dtype=torch.bool)
        if mask is None
        else mask,
        rollout_logprobs=response.rollout_logprobs,
        status=response.status,
        metadata={**response.metadata, "response": response.text},
    )
