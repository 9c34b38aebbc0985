"""Streams of rewarded groups for a trainer: recorded ones, and ones sampled on the way."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from ..data import Group, content_checksum, response_problems, without_aborted
from .base import (
    HoldsOut,
    Prompt,
    PromptSource,
    Response,
    RolloutSource,
    SamplingParams,
    WeightExporter,
)
from .reward import RewardFunction, check_prompt_ids, make_groups

# Problems that one error writes out.
_MAX_PROBLEMS = 10


class RecordedRollouts:
    """Groups that were sampled earlier, epoch after epoch, each epoch in its own order.

    From the second epoch on a group's id gains ``#<epoch>``, so that a step which spans two
    epochs holds no id twice.

    Args:
        groups: what was recorded.
        shuffle: draw a new order every epoch from ``seed``; else the order given.
        seed: of the orders.
        num_epochs: passes over the groups; None never ends.

    Raises:
        ValueError: on no groups, a repeated ``group_id`` or ``num_epochs < 1``.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_epochs: int | None = None,
    ) -> None:
        if len(groups) == 0:
            raise ValueError("groups is empty: there is nothing to train on")
        if len({group.group_id for group in groups}) != len(groups):
            raise ValueError("groups repeat a group_id: join the samples of equal ids first")
        if num_epochs is not None and num_epochs < 1:
            raise ValueError(f"num_epochs={num_epochs} must be None or at least 1")
        self.groups = tuple(groups)
        self.shuffle = shuffle
        self.seed = seed
        self.num_epochs = num_epochs
        self._num_taken = 0

    on_all_ranks = False

    def start(self) -> None:
        """Nothing to wait for."""

    def numbers(self, num_groups: int) -> Sequence[int]:
        """All of them."""
        return range(num_groups)

    def held_out_rewards(self, num_prompts: int, num_generations: int) -> dict[int, float]:
        """Recorded groups hold nothing out. Raises ValueError."""
        raise ValueError("recorded rollouts have no prompts that could be held out")

    def next_groups(self, num_groups: int) -> list[Group]:
        """The next groups; fewer than asked for when the last epoch ends, then none."""
        end = self._num_taken + _positive("num_groups", num_groups)
        if self.num_epochs is not None:
            end = min(end, self.num_epochs * len(self.groups))
        taken: list[Group] = []
        while self._num_taken < end:
            epoch, first = divmod(self._num_taken, len(self.groups))
            order = self._epoch_order(epoch)[first : first + end - self._num_taken]
            taken += [self._group_of_epoch(number, epoch) for number in order]
            self._num_taken += len(order)
        return taken

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """Nothing to do: recorded responses do not depend on the weights."""

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream and what fixes its order."""
        return {
            "num_taken": self._num_taken,
            "num_groups": len(self.groups),
            "content": self._content,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken.

        A state without ``content``, as earlier versions gave it, is not compared in that.

        Raises:
            ValueError: if the state is of other groups or another order, or none.
        """
        mine = self.state_dict()
        num_taken = _checked_num_taken(state, mine)
        for name in ("num_groups", "content", "shuffle", "seed"):
            saved = state.get(name, mine[name] if name == "content" else None)
            if saved != mine[name] or type(saved) is not type(mine[name]):
                what = "another recording" if name == "content" else f"{name}={saved}"
                raise ValueError(
                    f"the saved rollout state is of {what}, these rollouts have "
                    f"{name}={mine[name]}; resume with the recording and settings it was saved with"
                )
        self._num_taken = num_taken

    @cached_property
    def _content(self) -> str:
        return content_checksum(self.groups)

    def _epoch_order(self, epoch: int) -> list[int]:
        order = list(range(len(self.groups)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

    def _group_of_epoch(self, number: int, epoch: int) -> Group:
        group = self.groups[number]
        return replace(group, group_id=f"{group.group_id}#{epoch}") if epoch else group


class SampledRollouts:
    """Groups sampled from a task's prompts and rewarded when they are asked for.

    Args:
        task: where prompts come from.
        source: samples the responses.
        reward: judges them.
        params: how to sample; a seed is advanced with every call, so that a prompt seen twice is
            answered afresh.
        vocab_size: token ids must lie below; None checks only that they are plausible.
    """

    def __init__(
        self,
        task: PromptSource,
        source: RolloutSource,
        reward: RewardFunction,
        params: SamplingParams,
        *,
        vocab_size: int | None = None,
    ) -> None:
        self.task = task
        self.source = source
        self.reward = reward
        self.params = params
        self.vocab_size = vocab_size
        self._num_taken = 0

    @property
    def on_all_ranks(self) -> bool:
        """Whether every rank takes part in sampling."""
        return self.source.on_all_ranks

    def start(self) -> object | None:
        """Wait for the source."""
        return self.source.start()

    def numbers(self, num_groups: int) -> Sequence[int]:
        """Which of the next groups this rank's replica samples."""
        return self.source.numbers(num_groups)

    def next_groups(self, num_groups: int) -> list[Group]:
        """Sample the next ``num_groups`` prompts, those of ``numbers``, and reward the responses.

        Raises:
            ValueError: naming the prompt of every response that is not what was asked for.
        """
        prompts = self.task.prompts(self._num_taken, _positive("num_groups", num_groups))
        params = self.params
        if params.seed is not None:
            params = replace(params, seed=params.seed + self._num_taken)
        groups = self._sample(prompts, params)
        self._num_taken += num_groups
        return groups

    def held_out_rewards(self, num_prompts: int, num_generations: int) -> dict[int, float]:
        """See ``GroupStream.held_out_rewards``; the position in the stream stays as it is."""
        if not isinstance(self.task, HoldsOut):
            raise ValueError(
                f"{type(self.task).__name__} has no held_out(), which gives the prompts that "
                "training never sees"
            )
        prompts = self.task.held_out().prompts(0, num_prompts)
        params = replace(self.params, num_generations=num_generations)
        groups = self._sample(prompts, params)
        judged = (
            (number, kept)
            for number, group in zip(self.numbers(num_prompts), groups)
            for kept in without_aborted([group])
        )
        return {number: float(group.rewards.mean()) for number, group in judged}

    def _sample(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Group]:
        # Of all replicas, before anything is sampled.
        check_prompt_ids(prompts)
        chosen = [prompts[number] for number in self.numbers(len(prompts))]
        responses = self.source.generate(chosen, params)
        if responses is None:
            return []
        _check_responses(chosen, responses, params, self.vocab_size)
        return make_groups(chosen, responses, self.reward)

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """Pass the current policy on to the source."""
        self.source.update_weights(export, version)

    def state_dict(self) -> dict[str, Any]:
        """Number of prompts taken."""
        return {"num_taken": self._num_taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the prompts that the state had taken.

        Raises:
            ValueError: if it is the state of no such stream.
        """
        self._num_taken = _checked_num_taken(state, self.state_dict())


def _checked_num_taken(state: Mapping[str, Any], mine: Mapping[str, Any]) -> int:
    """The count of a saved state, which has the names of ``mine``."""
    unknown = sorted(state.keys() - mine.keys())
    if unknown:
        raise ValueError(
            f"the saved rollout state has {', '.join(unknown)}, which these rollouts do not know; "
            "resume with the rollout.source and the version it was saved with"
        )
    num_taken = state.get("num_taken")
    if type(num_taken) is not int or num_taken < 0:
        raise ValueError(
            f"the saved rollout state has num_taken={num_taken}, must be a whole number from 0; "
            "restore it"
        )
    return num_taken


def _check_responses(
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[Response]],
    params: SamplingParams,
    vocab_size: int | None,
) -> None:
    """Hold what any source sampled to the rules of recorded rollouts."""
    problems = []
    for prompt, of_prompt in zip(prompts, responses):
        found = []
        if len(of_prompt) != params.num_generations:
            found.append(f"{len(of_prompt)} responses instead of {params.num_generations}")
        for number, one in enumerate(of_prompt):
            # Text that is tokenized again has another number of tokens than was sampled.
            is_exact = not one.metadata.get("retokenized")
            wrong = response_problems(
                one.response_ids.tolist(),
                None if one.rollout_logprobs is None else one.rollout_logprobs.tolist(),
                vocab_size=vocab_size,
                max_response_tokens=params.max_response_tokens if is_exact else None,
            )
            found += [f"response {number} {problem}" for problem in wrong]
        trained = [one for one in of_prompt if one.status != "aborted"]
        if len({one.rollout_logprobs is None for one in trained}) > 1:
            found.append("some responses carry rollout_logprobs, others do not")
        problems += [f"prompt {prompt.prompt_id!r}: {problem}" for problem in found]
    if len(problems) > _MAX_PROBLEMS:
        problems[_MAX_PROBLEMS:] = [f"and {len(problems) - _MAX_PROBLEMS} more"]
    if problems:
        raise ValueError("the source sampled what cannot be trained: " + "; ".join(problems))


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value
