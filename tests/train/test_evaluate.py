"""What an evaluation counts, and what cannot be judged."""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.data import Group, Sample  # noqa: E402
from megatron_pg.rollout import RecordedRollouts  # noqa: E402
from megatron_pg.train import METRICS, parallel_run  # noqa: E402
from megatron_pg.train.config import ParallelConfig, RunConfig  # noqa: E402
from megatron_pg.train.rollouts.evaluate import check_held_out, evaluate, judge, pass_at  # noqa: E402
from megatron_pg.train.rollouts.shared_stream import SharedStream  # noqa: E402
from tests.train import tiny  # noqa: E402
from tests.train.held_out import EndlessTask, Task  # noqa: E402


def group(name: str, rewards: list[float], source: str | None = None, **metadata: Any) -> Group:
    if source is not None:
        metadata["data_source"] = source
    ids, mask = torch.tensor([3, 4]), torch.ones(2, dtype=torch.bool)
    samples = [
        Sample(prompt_ids=ids, response_ids=ids, reward=r, loss_mask=mask, metadata=metadata)
        for r in rewards
    ]
    return Group(name, tuple(samples))


def test_rollouts_that_hold_no_prompts_out_are_refused() -> None:
    recorded = RecordedRollouts(tiny.make_groups(), shuffle=False, seed=0)
    stream = SharedStream(recorded, is_first=True)
    message = "run.eval_prompts=3: recorded rollouts have no prompts that could be held out"
    with parallel_run(ParallelConfig(), 0), pytest.raises(ValueError, match=message):
        evaluate(RunConfig(eval_prompts=3), stream)


@pytest.mark.parametrize("seed", range(6))
def test_pass_at_k_is_the_mean_best_of_all_draws(seed: int) -> None:
    chance = random.Random(seed)
    rewards = [chance.choice([0.0, 1.0, chance.random()]) for _ in range(chance.randint(1, 7))]
    for k in range(1, len(rewards) + 1):
        draws = list(itertools.combinations(rewards, k))
        assert math.isclose(pass_at(rewards, k), sum(map(max, draws)) / len(draws))


@pytest.mark.parametrize(("n", "c"), [(8, 0), (8, 1), (8, 3), (8, 8), (5, 2)])
def test_of_right_and_wrong_it_is_the_estimator_of_the_paper(n: int, c: int) -> None:
    rewards = [1.0] * c + [0.0] * (n - c)
    for k in (1, 2, 4, n):
        want = 1 - math.comb(n - c, k) / math.comb(n, k)
        assert math.isclose(pass_at(rewards, k), want, abs_tol=1e-15)


def test_means_are_over_prompts_and_by_data_source() -> None:
    groups = {
        2: group("c", [0.0, 0.0, 0.0, 1.0], "algebra"),
        0: group("a", [1.0, 1.0, 0.0, 0.0], "openai/gsm8k", reward_metrics={"form": 0.5}),
        1: group("b", [1.0, 1.0, 1.0, 1.0], "openai/gsm8k"),
        3: group("d", [0.5, 0.5, 0.5, 0.5], reward_metrics={"form": 1.0}),
    }
    found = judge(groups, 4)
    assert (found.mean, found.num_prompts) == ((0.5 + 1 + 0.25 + 0.5) / 4, 4)
    deviations = [x - 0.5625 for x in (0.5, 1, 0.25, 0.5)]
    error = math.sqrt(sum(d * d for d in deviations) / 3 / 4)
    assert math.isclose(found.standard_error, error) and error > 0
    want = {
        "eval/prompts": 4.0,
        "eval/standard_error": found.standard_error,
        "eval/reward/mean@4": 0.5625,
        "eval/reward/pass@1": 0.5625,
        # Of 6 pairs: 5, 6, 3 hold a right one.
        "eval/reward/pass@2": (5 / 6 + 1 + 3 / 6 + 0.5) / 4,
        "eval/reward/pass@4": (1 + 1 + 1 + 0.5) / 4,
        "eval/openai/gsm8k/reward/mean@4": 0.75,
        "eval/openai/gsm8k/reward/pass@1": 0.75,
        "eval/openai/gsm8k/reward/pass@2": (5 / 6 + 1) / 2,
        "eval/openai/gsm8k/reward/pass@4": 1.0,
        "eval/algebra/reward/mean@4": 0.25,
        "eval/algebra/reward/pass@1": 0.25,
        "eval/algebra/reward/pass@2": 0.5,
        "eval/algebra/reward/pass@4": 1.0,
        "eval/reward/form": 0.75,
    }
    assert found.metrics.keys() == want.keys()
    assert all(math.isclose(found.metrics[name], want[name]) for name in want)
    assert {"eval/prompts", "eval/standard_error", "eval/reward/mean@<n>"} <= METRICS.keys()


def test_aborted_responses_are_not_judged() -> None:
    whole = group("a", [1.0, 0.0, 0.0, 0.0])
    cut = replace(
        whole, samples=tuple(replace(s, status="aborted") for s in whole.samples[:2])
        + whole.samples[2:]
    )  # fmt: skip
    gone = replace(whole, samples=tuple(replace(s, status="aborted") for s in whole.samples))
    found = judge({0: cut, 1: group("b", [1.0, 1.0, 0.0, 0.0]), 2: gone}, 4)
    assert (found.mean, found.num_prompts) == (0.25, 2)
    # The first prompt has no four responses to draw.
    assert found.metrics["eval/reward/pass@4"] == 1.0
    assert math.isclose(found.metrics["eval/reward/pass@2"], (0 + 5 / 6) / 2)
    with pytest.raises(ValueError, match="every response to a held-out prompt was aborted"):
        judge({2: gone}, 4)


def test_all_held_out_prompts_need_an_end() -> None:
    task, endless = Task(None), EndlessTask(None)
    check_held_out(RunConfig(eval_prompts="all"), task, task)
    check_held_out(RunConfig(eval_prompts=7), endless, endless)
    message = "run.eval_prompts=all: .*has no length.*give their number; or set it to 0"
    with pytest.raises(ValueError, match=message):
        check_held_out(RunConfig(eval_prompts="all"), endless, endless)


@pytest.mark.parametrize("name", ["mean@2", "pass@1", "sums/reward/pass@2", "mean"])
def test_a_reward_cannot_call_its_numbers_as_an_evaluation_does(name: str) -> None:
    held_out = {0: group("a", [1.0, 0.0], "sums", reward_metrics={name: 9.0})}
    with pytest.raises(ValueError, match=re.escape(f"called {name!r} beside the reward")):
        judge(held_out, 2)
