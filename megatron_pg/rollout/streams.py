"""Rewarded groups for a trainer, sampled on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data import Group, response_problems
from .ahead import Ahead
from .base import HoldsOut, Identified, PromptSource, RolloutSource, WeightExporter
from .rewards import BatchedReward, RewardFunction, check_prompt_ids, make_groups
from .values import Prompt, Response, SamplingParams

# Problems that one error writes out.
_MAX_PROBLEMS = 10
# For a request that was called off.
_CANCEL_SECONDS = 5


class SampledRollouts:
    """Groups sampled from a task's prompts and rewarded when they are asked for.

    Args:
        task: where prompts come from.
        source: samples the responses.
        reward: judges them; one that is a ``BatchedReward`` all those of a step at once.
        params: how to sample; a seed is advanced with every call, so that a prompt seen twice is
            answered afresh.
        vocab_size: token ids must lie below; None checks only that they are plausible.
    """

    def __init__(
        self,
        task: PromptSource,
        source: RolloutSource,
        reward: RewardFunction | BatchedReward,
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
        self._ahead: _Ahead | None = None

    @property
    def on_all_ranks(self) -> bool:
        """Whether every rank takes part in sampling."""
        return self.source.on_all_ranks

    def start(self) -> object | None:
        """Wait for the source; what prompts and source say of themselves."""
        told = [self.task if isinstance(self.task, Identified) else None, self.source.start()]
        return "\n".join(str(one) for one in told if one is not None) or None

    def numbers(self, num_groups: int) -> Sequence[int]:
        """Which of the next groups this rank's replica samples."""
        return self.source.numbers(num_groups)

    def next_groups(self, num_groups: int) -> list[Group]:
        """Sample the next ``num_groups`` prompts, those of ``numbers``, and reward the responses.

        Raises:
            ValueError: naming the prompt of every response that is not what was asked for.
        """
        ahead, self._ahead = self._ahead, None
        asked = self._next(num_groups) if ahead is None else ahead.asked
        if len(asked.prompts) != num_groups:
            raise ValueError(f"{len(asked.prompts)} groups were asked ahead, not {num_groups}")
        responses = self._generate(asked) if ahead is None else ahead.responses.result()
        groups = self._judge(asked, responses)
        self._num_taken += num_groups
        return groups

    def held_out_groups(self, num_prompts: int | None, num_generations: int) -> dict[int, Group]:
        """See ``GroupStream.held_out_groups``."""
        held_out = held_out_prompts(self.task, num_prompts)
        self.wait()
        params = replace(self.params, num_generations=num_generations)
        asked = self._asked(held_out, params)
        groups = self._judge(asked, self._generate(asked))
        return dict(zip(self.numbers(len(held_out)), groups))

    def ask_ahead(self, num_groups: int) -> None:
        """See ``GroupStream.ask_ahead``: a thread asks the source, ``next_groups`` rewards."""
        asked = self._next(num_groups)
        self._ahead = _Ahead(asked, Ahead(lambda: self._generate(asked)))

    def wait(self) -> None:
        """See ``GroupStream.wait``."""
        if self._ahead is not None:
            self._ahead.responses.wait()

    def close(self) -> None:
        """See ``GroupStream.close``."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self.source.cancel()
            ahead.responses.wait(_CANCEL_SECONDS)

    def _next(self, num_groups: int) -> _Asked:
        prompts = self.task.prompts(self._num_taken, positive("num_groups", num_groups))
        params = self.params
        if params.seed is not None:
            params = replace(params, seed=params.seed + self._num_taken)
        return self._asked(prompts, params)

    def _asked(self, prompts: Sequence[Prompt], params: SamplingParams) -> _Asked:
        # Of all replicas, before anything is sampled.
        check_prompt_ids(prompts)
        return _Asked(prompts, [prompts[n] for n in self.numbers(len(prompts))], params)

    def _generate(self, asked: _Asked) -> Sequence[Sequence[Response]] | None:
        responses = self.source.generate(asked.chosen, asked.params)
        if responses is not None:
            _check_responses(asked.chosen, responses, asked.params, self.vocab_size)
        return responses

    def _judge(self, asked: _Asked, responses: Sequence[Sequence[Response]] | None) -> list[Group]:
        return [] if responses is None else make_groups(asked.chosen, responses, self.reward)

    def update_weights(self, export: WeightExporter, version: int) -> None:
        """Pass the current policy on to the source, which is sampling nothing then."""
        self.wait()
        self.source.update_weights(export, version)

    def state_dict(self) -> dict[str, Any]:
        """Number of prompts taken, and what tells them from others."""
        identity = self.task.identity() if isinstance(self.task, Identified) else {}
        return {"num_taken": self._num_taken, **identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the prompts that the state had taken.

        Raises:
            ValueError: if it is the state of no such stream, or of other prompts.
        """
        self._num_taken = checked_num_taken(state, self.state_dict(), "other prompts")


def held_out_prompts(task: PromptSource, num_prompts: int | None) -> list[Prompt]:
    """The first ``num_prompts`` of those that training never sees; None for all of them.

    Raises:
        ValueError: if the task holds nothing out, holds out fewer, or has no length where all are
            asked for.
    """
    if not isinstance(task, HoldsOut):
        raise ValueError(
            f"{type(task).__name__} has no held_out(), which gives the prompts that training never "
            "sees"
        )
    held_out = task.held_out()
    try:
        most: int | None = len(held_out)  # type: ignore[arg-type]
    except TypeError:
        most = None
    count = most if num_prompts is None else num_prompts
    if count is None:
        raise ValueError(
            f"{type(held_out).__name__} has no length: its held-out prompts do not end; give "
            "their number"
        )
    if most is not None and count > most:
        raise ValueError(f"there are {most} held-out prompts; ask for at most so many")
    return held_out.prompts(0, count)


@dataclass(frozen=True)
class _Asked:
    """Prompts of all replicas, those of this one, and how they are answered."""

    prompts: Sequence[Prompt]
    chosen: Sequence[Prompt]
    params: SamplingParams


@dataclass(frozen=True)
class _Ahead:
    asked: _Asked
    responses: Ahead[Sequence[Sequence[Response]] | None]


def checked_num_taken(state: Mapping[str, Any], mine: Mapping[str, Any], others: str) -> int:
    """The count of a saved state that agrees with ``mine`` in all else; ``others`` if it does not.

    Raises:
        ValueError: if it does not agree, or is no such state.
    """
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
    for name in (name for name in mine if name != "num_taken"):
        saved = state.get(name)
        if saved != mine[name] or type(saved) is not type(mine[name]):
            what = others if name == "content" else f"{name}={saved}"
            raise ValueError(
                f"the saved rollout state is of {what}, these rollouts have {name}={mine[name]}; "
                "resume with the files and settings it was saved with"
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
        for name in ("rollout_logprobs", "routed_experts"):
            if len({getattr(one, name) is None for one in trained}) > 1:
                found.append(f"some responses carry {name}, others do not")
        problems += [f"prompt {prompt.prompt_id!r}: {problem}" for problem in found]
    if len(problems) > _MAX_PROBLEMS:
        problems[_MAX_PROBLEMS:] = [f"and {len(problems) - _MAX_PROBLEMS} more"]
    if problems:
        raise ValueError("the source sampled what cannot be trained: " + "; ".join(problems))


def positive(name: str, value: int) -> int:
    """The value. Raises ValueError if it is below 1."""
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    return value
