"""A step that replays routes equals the samples written out with the same routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.data import Group, Sample, group_shape  # noqa: E402
from megatron_pg.grpo import PrefixGroupConfig, decode_groups, encode_groups  # noqa: E402
from tests.data.routed import random_routes, with_routes  # noqa: E402
from tests.data.samples import make_large_groups, random_groups  # noqa: E402
from tests.grpo.replay_steps import (  # noqa: E402
    NUM_EXPERTS,
    SHAPE,
    recorded_step,
    replay_case,
    replay_step,
)
from tests.ranks import Pool  # noqa: E402

RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
LAYOUTS: dict[str, dict[str, Any]] = {
    "one_recomputed": dict(config=RECOMPUTE),
    "tp2_sp": dict(tp=2, sp=True, etp=1, ep=2),
    "pp2": dict(pp=2),
}
RESIDENT = dict(prefix_resident="always", max_tokens_per_microbatch=24, max_resident_tokens=40)
SETTINGS = {
    "one_recomputed": PrefixGroupConfig(min_shared=1, max_tokens_per_microbatch=60),
    "tp2_sp": PrefixGroupConfig(min_shared=1, **RESIDENT),  # type: ignore[arg-type]
    "pp2": PrefixGroupConfig(min_shared=1, prefix_resident_mode="recompute", **RESIDENT),  # type: ignore[arg-type]
}


def by_hand(groups: Sequence[Group]) -> list[tuple[Sample, float]]:
    """Every sample with a route for its last token too, and the weight of its trained tokens."""
    generator = torch.Generator().manual_seed(9)
    trained = sum(s.num_loss_tokens for g in groups for s in g.samples)
    found = []
    for group in groups:
        rewards = group.rewards
        for sample, reward in zip(group.samples, rewards):
            advantage = (reward - rewards.mean()) / (rewards.std() + 1e-6)
            routes = sample.routed_experts.clone()
            # Nothing that is trained depends on it: another one than the step's.
            routes[-1:] = random_routes(1, SHAPE, generator, NUM_EXPERTS)
            found.append((replace(sample, routed_experts=routes), float(advantage) / trained))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_equals_samples_written_out_with_their_routes(ranks: Pool, name: str) -> None:
    """Prompts are shared up to the first other route, also where they are resident."""
    groups = with_routes(make_large_groups(), SHAPE, divergence=0.3, seed=2)
    case = replay_case(**LAYOUTS[name])
    arguments = (case, SETTINGS[name], groups, by_hand(groups))
    for rank in ranks.run(case.world_size, replay_step, *arguments):
        assert rank.least > 0, "a gradient is zero: nothing is proven"
        beyond = {n: error for n, error in rank.errors.items() if not error <= case.bound}
        assert not beyond, beyond
        assert max(rank.unrouted.values()) > 0.05, "routers would decide alike"
        assert rank.split > 10 and rank.taken and rank.unknown > 10
        assert (rank.resident_groups > 2) == (name != "one_recomputed")


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_recorded_is_replayed_to_the_last_bit(ranks: Pool, name: str) -> None:
    groups = make_large_groups()
    case = replay_case(**LAYOUTS[name])
    layers = set()
    for rank in ranks.run(case.world_size, recorded_step, case, SETTINGS[name], groups):
        assert rank.same_gradients and len(rank.recorded) > 2
        layers |= set(rank.layers)
        for recorded, replayed in zip(rank.recorded, rank.replayed, strict=True):
            assert torch.equal(recorded, replayed)
        moved = [(a != b).any() for a, b in zip(rank.recorded, rank.own)]
        assert any(moved), "other weights route alike"
        assert all(routes[:, rank.layers].any() for routes in rank.recorded)
    assert layers == {1, 2, 3}


def test_without_replay_samples_that_share_tokens_share_routes(ranks: Pool) -> None:
    """A router sees the same hidden state, whether samples share it or stand alone."""
    groups = make_large_groups()
    settings = PrefixGroupConfig(max_tokens_per_microbatch=200)
    (rank,) = ranks.run(1, recorded_step, replay_case(), settings, groups)
    assert len(rank.alone) == sum(len(group.samples) for group in groups)
    for alone, together in zip(rank.alone, rank.together, strict=True):
        assert torch.equal(alone, together)


def test_routes_go_from_replica_to_replica() -> None:
    groups = with_routes(random_groups(5, 3), SHAPE)
    groups.append(random_groups(6, 1)[0])
    sent = [(i, group, group_shape(group)) for i, group in enumerate(groups)]
    arrived = decode_groups(encode_groups(sent))
    for (_, before, _), (_, after, _) in zip(sent, arrived):
        for x, y in zip(before.samples, after.samples):
            if x.routed_experts is None:
                assert y.routed_experts is None
            else:
                assert torch.equal(x.routed_experts, y.routed_experts)
