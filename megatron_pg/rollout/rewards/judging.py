"""The rewards of a run: loaded, called in their convention, checked, weighted and added."""

from __future__ import annotations

import asyncio
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from ..named import load_callable
from ..values import Prompt, Response
from .calling import Failure, Outcome, call_async, call_here
from .conventions import find_convention
from .pool import RewardError, RewardPool
from .settings import RewardSettings, metric_names
from .values import Judgement, read_value

# What a TRL reward returns for a sample that it does not concern.
_NOT_APPLICABLE = None


class NamedReward:
    """One reward of a configuration.

    Args:
        settings: of it.

    Raises:
        ValueError: if it cannot be loaded, is called in no known way, or is given a time limit that
            nothing can hold it to.
    """

    def __init__(self, settings: RewardSettings) -> None:
        where = f"rollout.reward {settings.name!r}"
        self.settings = settings
        function: Any = load_callable("rollout.reward", settings.path)
        arguments = settings.kwargs
        try:
            if inspect.isclass(function):
                function, arguments = function(**settings.kwargs), {}
                if not callable(function):
                    raise ValueError("makes an object without __call__")
            self.convention = find_convention(function, arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} {error}") from error
        self.function = function
        self.is_async = is_async = any(
            map(inspect.iscoroutinefunction, (function, type(function).__call__))
        )
        self._runner = asyncio.Runner()
        weakref.finalize(self, self._runner.close)
        number = settings.num_processes
        if number is None:
            is_limited = settings.timeout_seconds is not None and not is_async
            number = int(is_limited or settings.name != settings.path)
        elif number == 0 and settings.timeout_seconds is not None and not is_async:
            raise ValueError(
                f"{where} has timeout_seconds={settings.timeout_seconds:g} with num_processes=0; "
                "only another process can be ended: set num_processes to at least 1"
            )
        self.pool = (
            RewardPool(
                settings.path,
                settings.kwargs,
                modules=self.convention.modules,
                num_processes=number,
                timeout_seconds=settings.timeout_seconds,
            )
            if number
            else None
        )

    def judge(
        self, prompts: Sequence[Prompt], responses: Sequence[Response]
    ) -> list[Judgement | None]:
        """What every response is worth; None where the reward does not concern it (TRL's None).

        Raises:
            RewardError: on the first failure, if failures end the run.
        """
        calls = self.convention.calls(prompts, responses)
        outcomes = self._outcomes(calls, lambda n, f: self._heed(self._first(n, prompts), f))
        if self.convention.is_batched:
            outcomes = _split(outcomes[0], len(prompts))
        return [self._judgement(p, outcome) for p, outcome in zip(prompts, outcomes)]

    def _outcomes(self, calls: Sequence[Any], on_failure: Callable[..., None]) -> list[Outcome]:
        if self.pool is not None:
            return self.pool.run(calls, on_failure)
        if self.is_async:
            return call_async(
                self.function,
                calls,
                on_failure,
                self._runner,
                max_concurrency=self.settings.max_concurrency,
                timeout_seconds=self.settings.timeout_seconds,
            )
        return call_here(self.function, calls, on_failure)

    def _judgement(self, prompt: Prompt, outcome: Outcome) -> Judgement | None:
        if outcome is _NOT_APPLICABLE and self.convention.is_batched:
            return None
        if not isinstance(outcome, Failure):
            read = read_value(outcome)
            if isinstance(read, Judgement):
                return replace(read, metrics=self._with_counts(read.metrics))
            outcome = Failure(read)
        self._heed(prompt.prompt_id, outcome)
        return Judgement(score=self.settings.error_score, metrics=self._counts(outcome))

    def _counts(self, failure: Failure | None) -> dict[str, float]:
        """Shares of responses whose judging failed, where that does not end the run."""
        if self.settings.on_error == "raise":
            return {}
        is_late = failure is not None and failure.timed_out
        counts = {"errors": float(failure is not None and not is_late)}
        has_limit = self.settings.timeout_seconds is not None
        return counts | ({"timeouts": float(is_late)} if has_limit else {})

    def _with_counts(self, metrics: Mapping[str, float]) -> dict[str, float]:
        counts = self._counts(None)
        if taken := sorted(counts.keys() & metrics.keys()):
            raise RewardError(
                f"rollout.reward {self.settings.name!r} gives a number called {taken[0]!r} beside "
                "the reward, which on_error=score counts its failures under; give it another name"
            )
        return {**metrics, **counts}

    def _heed(self, prompt_id: str, failure: Failure) -> None:
        if self.settings.on_error == "raise":
            self._refuse(prompt_id, failure.reason)

    def _refuse(self, prompt_id: str, reason: str) -> NoReturn:
        raise RewardError(
            f"rollout.reward {self.settings.name!r} for prompt {prompt_id!r} {reason}; mend it, or "
            "set its on_error to score"
        )

    def _first(self, number: int, prompts: Sequence[Prompt]) -> str:
        return prompts[number].prompt_id


class NamedRewards:
    """The weighted sum of the rewards of a configuration, for all samples of a step at once.

    Args:
        settings: at least one.

    Raises:
        ValueError: listing every reward that cannot be used.
    """

    def __init__(self, settings: Sequence[RewardSettings]) -> None:
        problems: list[str] = []
        self.rewards: list[NamedReward] = []
        for one in settings:
            try:
                self.rewards.append(NamedReward(one))
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        self._labels = metric_names(settings)

    def check(self, prompt: Prompt) -> None:
        """Raise ValueError if a reward needs what such a prompt does not have."""
        for reward in self.rewards:
            if missing := reward.convention.missing(prompt):
                told = ", ".join(map(repr, missing))
                raise ValueError(
                    f"rollout.reward {reward.settings.name!r} needs {told}, which prompts such as "
                    f"{prompt.prompt_id!r} do not have (they have "
                    f"{', '.join(prompt.metadata) or 'no columns'}); an answer is named by "
                    "rollout.prompts.answer_key"
                )

    def judge(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[Judgement]:
        """See ``BatchedReward``.

        Raises:
            RewardError: if a reward fails and is told to end the run by that, or if no reward
                concerns a response.
        """
        parts = [reward.judge(prompts, responses) for reward in self.rewards] if prompts else []
        return [self._sum(prompt, of_one) for prompt, *of_one in zip(prompts, *parts)]

    def close(self) -> None:
        """End all processes."""
        for reward in self.rewards:
            if reward.pool is not None:
                reward.pool.close()

    def _sum(self, prompt: Prompt, parts: Sequence[Judgement | None]) -> Judgement:
        if all(part is None for part in parts):
            self.rewards[0]._refuse(prompt.prompt_id, "returned None, and no other reward a number")
        score = 0.0
        metrics: dict[str, float] = {}
        for reward, label, part in zip(self.rewards, self._labels, parts):
            if part is None:
                continue
            score += reward.settings.weight * part.score
            if len(self.rewards) == 1:
                metrics |= part.metrics
            else:
                metrics[label] = part.score
                metrics |= {f"{label}/{name}": value for name, value in part.metrics.items()}
        return Judgement(score=score, metrics=metrics)


def _split(outcome: Outcome, number: int) -> list[Outcome]:
    """What a call for all samples gave each of them."""
    if isinstance(outcome, Failure):
        return [outcome] * number
    if not isinstance(outcome, list):
        told = "None" if outcome is None else f"a {type(outcome).__name__}"
        return [Failure(f"returned {told}; return a list of one number per completion")] * number
    if len(outcome) != number:
        told = f"returned {len(outcome)} values for {number} completions"
        return [Failure(f"{told}; return one number for each")] * number
    return outcome
