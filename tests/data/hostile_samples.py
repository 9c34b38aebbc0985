"""Samples that a generator of hostile files knows, and how what is read compares with them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_pg.data import read_rollouts
from tests.hostile import refused

VOCAB = 100


@dataclass
class Known:
    """A sample as it has to be read; nothing of it is trained when ``status`` is aborted."""

    prompt: list[int]
    response: list[int]
    reward: float
    mask: list[bool]
    logprobs: list[float] | None
    group: Any
    status: str = "completed"
    rollout: Any = None
    weight: float | None = None

    def abort(self, is_empty: bool) -> None:
        self.status, self.logprobs = "aborted", None
        self.response = [] if is_empty else self.response
        self.mask = [False] * len(self.response)


@dataclass
class Input:
    """Files, the samples of each in order, and the names in the refusal that is due."""

    rng: random.Random
    samples: list[list[Known]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    fault: tuple[str, ...] | None = None
    has_ids: bool = True

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share


def next_prompt(made: Input, before: Known) -> list[int]:
    """Of the next row of a rollout: a turn, a compacted context, a sub-agent, or once more."""
    rng = made.rng
    some = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 3))]
    return made.pick(
        before.prompt + before.response + some,
        before.prompt[: rng.randint(1, len(before.prompt))] + some,
        [7, *some],
        before.prompt,
    )


def make_input(seed: int, *, has_rollouts: bool = False, has_ids: bool | None = None) -> Input:
    """Up to three files whose group ids start anew, with the odd response that trains nothing.

    Where groups have ids, rows of one rollout are a forest.
    """
    made = Input(random.Random(seed))
    rng = made.rng
    made.has_ids = made.chance(0.6) if has_ids is None else has_ids
    for _ in range(made.pick(1, 1, 2, 3)):
        samples = []
        carries_logprobs = made.chance(0.5)
        for group in range(rng.randint(1, 3)):
            # Distinct within a file, so that prompts make the same groups as ids.
            prompt = [5, 10 + group, *(rng.randrange(VOCAB) for _ in range(rng.randint(0, 3)))]
            is_weighted = has_rollouts and made.chance(0.3)
            for number in range(rng.randint(1, 4)):
                response = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 5))]
                logprobs = [-rng.random() * made.pick(1, 30, 999) for _ in response]
                samples.append(
                    Known(
                        prompt,
                        response,
                        made.pick(0.0, 1.0, -0.5, 1e-300, rng.random()),
                        [made.chance(0.8) for _ in response],
                        logprobs if carries_logprobs else None,
                        group,
                    )
                )
                if has_rollouts and number and made.chance(0.3):
                    samples[-1].reward = samples[-2].reward
                    samples[-2].rollout = samples[-2].rollout or f"{group}.{number}"
                    samples[-1].rollout = samples[-2].rollout
                    if made.has_ids:
                        samples[-1].prompt = next_prompt(made, samples[-2])
                samples[-1].weight = made.pick(1.0, 0.25, 3.0) if is_weighted else None
        if samples[0].status == "completed" and made.chance(0.3):
            rng.choice(samples).abort(made.chance(0.5))
        made.samples.append(samples)
    return made


def assert_read(made: Input, paths: list[Path], **options: Any) -> None:
    """What the files hold is what was written into them."""
    groups = read_rollouts(paths, **options, **made.options)
    want: dict[Any, list[Known]] = {}
    for number, samples in enumerate(made.samples):
        for sample in samples:
            want.setdefault((number, sample.group), []).append(sample)
    assert len({g.group_id for g in groups}) == len(groups) == len(want)
    for group, known in zip(groups, want.values()):
        rollouts = [i if s.rollout is None else s.rollout for i, s in enumerate(known)]
        assert group.rollouts.tolist() == [list(dict.fromkeys(rollouts)).index(e) for e in rollouts]
        assert len(group.samples) == len(known)
        for got, sample in zip(group.samples, known):
            assert got.prompt_ids.tolist() == sample.prompt
            assert got.response_ids.tolist() == sample.response
            assert got.loss_mask.tolist() == sample.mask and got.status == sample.status
            assert got.status == "aborted" or got.reward == sample.reward
            if any(sample.mask):
                assert got.loss_weight == sample.weight
                carried = got.rollout_logprobs
                assert (None if carried is None else carried.tolist()) == sample.logprobs


def settle(made: Input, paths: list[Path], **options: Any) -> None:
    """The one or the other; a fault that is read is silently wrong."""
    if made.fault is None:
        assert_read(made, paths, **options)
    else:
        with refused(*made.fault):
            read_rollouts(paths, **options, **made.options)
