"""A step over replicas of several ranks equals that on one replica, and fails on all or none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.data import Group  # noqa: E402
from megatron_pg.grpo import GrpoConfig, PrefixGroupConfig  # noqa: E402
from megatron_pg.loss import PolicyLossConfig  # noqa: E402
from tests.grpo import on_ranks  # noqa: E402
from tests.mcore.harness import Case  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train.tiny import make_groups  # noqa: E402

GROUPS = make_groups(5, has_rollout_logprobs=True)
RESIDENT = PrefixGroupConfig(
    max_tokens_per_microbatch=18, max_resident_tokens=14, prefix_resident="always"
)
KL = GrpoConfig(use_kl_in_reward=True, kl_coef=0.1, num_minibatches=2)
IMPORTANCE = GrpoConfig(policy=PolicyLossConfig(importance_mode="token_truncate", kl_loss_coef=0.1))


def carrying(groups: list[Group], *names: str) -> list[Group]:
    """The groups with random values in (-2, -1) for every token."""
    generator = torch.Generator().manual_seed(5)

    def values(count: int) -> torch.Tensor:
        return -torch.rand(count, generator=generator, dtype=torch.float64) - 1

    return [
        Group(
            group.group_id,
            tuple(
                replace(s, **{name: values(len(s.response_ids)) for name in names})
                for s in group.samples
            ),
        )
        for group in groups
    ]


def by_number(groups: list[Group], size: int) -> list[Any]:
    return [{i: g for i, g in enumerate(groups) if i % size == rank} for rank in range(size)]


def all_on_the_first(groups: list[Group], size: int) -> list[Any]:
    return [groups, *[()] * (size - 1)]


@pytest.mark.parametrize(
    ("case", "algorithm", "settings", "groups", "split"),
    [
        (Case(tp=2, dp=2), GrpoConfig(), on_ranks.SETTINGS, GROUPS, by_number),
        (Case(pp=2, dp=2), KL, RESIDENT, carrying(GROUPS, "ref_logprobs"), all_on_the_first),
        (
            Case(dp=2),
            GrpoConfig(),
            on_ranks.SETTINGS,
            carrying(GROUPS[:1], "advantages"),
            all_on_the_first,
        ),
        (
            Case(dp=2),
            KL,
            on_ranks.SETTINGS,
            carrying(GROUPS[:1], "old_logprobs", "ref_logprobs"),
            all_on_the_first,
        ),
        (
            Case(dp=2),
            IMPORTANCE,
            on_ranks.SETTINGS,
            carrying(GROUPS[:1], "ref_logprobs"),
            all_on_the_first,
        ),
        (Case(dp=4), GrpoConfig(), RESIDENT, GROUPS[:3], by_number),
    ],
    ids=["tp2_dp2", "pp2_dp2_kl", "advantages", "kl_of_carried", "importance", "dp4_resident"],
)
def test_replicas_make_the_gradients_of_one(
    ranks: Pool,
    case: Case,
    algorithm: GrpoConfig,
    settings: PrefixGroupConfig,
    groups: list[Group],
    split: Any,
) -> None:
    """Fewer groups than replicas too, where one of them runs only rows that train nothing."""
    alone = replace(case, dp=1)
    arguments = (algorithm, settings)
    wanted = ranks.run(alone.world_size, on_ranks.whole_step, alone, *arguments, [groups])
    parts = split(groups, case.dp)
    found = ranks.run(case.world_size, on_ranks.whole_step, case, *arguments, parts)
    want_of = {want["place"]: want for want in wanted}
    for got in found:
        want = want_of[got["place"]]
        assert got["check"] < 1e-12 and got["gradients"].keys() == want["gradients"].keys()
        for name, gradient in want["gradients"].items():
            assert gradient.norm() > 0, name
            assert (got["gradients"][name] - gradient).norm() < 1e-12 * gradient.norm(), name
        assert (got["kl"] is None) == (not algorithm.use_kl_in_reward)
        if got["kl"] is not None:
            torch.testing.assert_close(got["kl"], want["kl"], rtol=0, atol=1e-14)
            assert len(got["kl"].unique()) > 1
    assert found[0]["losses"] == pytest.approx(wanted[0]["losses"], rel=1e-10, abs=1e-14)
    is_idle = {got["num_tokens"] == 0 for got in found}
    assert (True in is_idle) == (len(groups) < case.dp) and False in is_idle


BARE = make_groups(5)
BEYOND = replace(GROUPS[1].samples[0], response_ids=GROUPS[1].samples[0].response_ids + 100)
LONG = replace(GROUPS[1].samples[0], prompt_ids=torch.ones(50, dtype=torch.int64))


@pytest.mark.parametrize(
    ("case", "parts", "message"),
    [
        (Case(tp=2), [[GROUPS[0], BARE[1]]], "give them for all samples or for none"),
        (Case(tp=2, dp=2), [[GROUPS[0], BARE[1]], [GROUPS[2]]], "give them for all samples"),
        (Case(pp=2, dp=2), [[GROUPS[0]], [Group("long", (LONG,))]], "a row holds 48"),
        (Case(pp=2, dp=2), [{0: GROUPS[0]}, {0: GROUPS[1]}], "two replicas brought one group"),
        (Case(tp=2), [[GROUPS[0], Group("b", (BEYOND,))]], "must lie in [0, vocab_size)"),
        (Case(dp=2), [[GROUPS[0]], [GROUPS[1].samples[0]]], "groups[0] is a Sample; bring Group"),
        (Case(dp=2), [[GROUPS[0]], GROUPS[1]], "groups is a Group; bring a list"),
        (Case(dp=2), [{0: GROUPS[0]}, {1.5: GROUPS[1]}], "by their whole number"),
    ],
    ids=["tp2", "tp2_dp2", "long", "twice", "token", "sample", "group", "number"],
)
def test_a_refusal_of_a_first_rank_is_raised_on_all(
    ranks: Pool, case: Case, parts: list[Any], message: str
) -> None:
    for told in ranks.run(case.world_size, on_ranks.refused, case, parts, timeout=60):
        assert message in told, told
