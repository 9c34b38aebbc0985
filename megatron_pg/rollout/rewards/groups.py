"""The groups that rewarded responses form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import chdir

import torch

from ...data import Group, Sample
from ..values import Prompt, Response
from .functions import BatchedReward, RewardFunction
from .values import Judgement


def make_groups(
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[Response]],
    reward: RewardFunction | BatchedReward,
) -> list[Group]:
    """One rewarded group per prompt.

    An aborted response trains nothing and is not judged: its reward is 0.0, which nothing reads.
    A sample's metadata are those of its response with the texts ``prompt`` and ``response``, and
    ``data_source`` and ``reward_metrics`` where they are known.

    Args:
        prompts: what was given.
        responses: what was sampled, per prompt, as ``RolloutSource.generate`` returns it.
        reward: called once per other response, in order, on the calling thread; a
            ``BatchedReward`` once with all of them.

    Raises:
        ValueError: if the lengths differ, two prompts share an id, or a reward is not finite.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(responses)} groups of responses for {len(prompts)} prompts")
    check_prompt_ids(prompts)
    pairs = [(p, one) for p, of_prompt in zip(prompts, responses) for one in of_prompt]
    judged = [(p, one) for p, one in pairs if one.status != "aborted"]
    # A reward that runs code may leave another working directory behind than the run began in.
    with chdir("."):
        judgements = iter(_judge(judged, reward))
    samples = iter(
        [
            _make_sample(p, one, None if one.status == "aborted" else next(judgements))
            for p, one in pairs
        ]
    )
    return [
        Group(prompt.prompt_id, tuple(next(samples) for _ in of_prompt))
        for prompt, of_prompt in zip(prompts, responses)
    ]


def check_prompt_ids(prompts: Sequence[Prompt]) -> None:
    """Raise ValueError if two prompts of a step share an id."""
    if len({prompt.prompt_id for prompt in prompts}) != len(prompts):
        raise ValueError("prompts share a prompt_id: give every prompt of a step its own")


def _judge(
    pairs: Sequence[tuple[Prompt, Response]], reward: RewardFunction | BatchedReward
) -> list[Judgement]:
    if isinstance(reward, BatchedReward):
        return reward.judge([prompt for prompt, _ in pairs], [one for _, one in pairs])
    return [Judgement(score=_score(prompt, one, reward)) for prompt, one in pairs]


def _score(prompt: Prompt, response: Response, reward: RewardFunction) -> float:
    given = reward(prompt, response)
    value = math.nan if given is None else float(given)
    if not math.isfinite(value):
        raise ValueError(
            f"reward {reward!r} gave {given} for prompt {prompt.prompt_id!r}; return a finite "
            "number"
        )
    return value


def _make_sample(prompt: Prompt, response: Response, judgement: Judgement | None) -> Sample:
    mask = response.loss_mask
    known = {
        "prompt": prompt.text,
        "data_source": prompt.metadata.get("data_source"),
        "reward_metrics": None if judgement is None else dict(judgement.metrics),
    }
    return Sample(
        prompt_ids=prompt.prompt_ids,
        response_ids=response.response_ids,
        reward=0.0 if judgement is None else judgement.score,
        loss_mask=torch.ones_like(response.response_ids, dtype=torch.bool)
        if mask is None
        else mask,
        rollout_logprobs=response.rollout_logprobs,
        routed_experts=response.routed_experts,
        status=response.status,
        metadata={
            **response.metadata,
            "response": response.text,
            **{name: value for name, value in known.items() if value},
        },
    )
