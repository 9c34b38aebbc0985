"""A step that replays routes equals the samples written out with the same routes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.data import Group, Sample, group_shape  # noqa: E402
from megatron_pg.grpo import (  # noqa: E402
    GrpoConfig,
    GrpoStep,
    PrefixGroupConfig,
    decode_groups,
    encode_groups,
)
from megatron_pg.mcore.versions import HAS_HYBRID_MODEL  # noqa: E402
from tests.data.routed import random_routes, with_routes  # noqa: E402
from tests.data.samples import make_large_groups, random_groups  # noqa: E402
from tests.grpo.on_ranks import make_chunks, whole_step  # noqa: E402
from tests.grpo.replay_steps import (  # noqa: E402
    NUM_EXPERTS,
    SHAPE,
    recorded_step,
    replay_case,
    replay_step,
    routes_alone_and_together,
)
from tests.grpo.test_on_ranks import carrying  # noqa: E402
from tests.mcore import cases, harness  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train.tiny import make_groups  # noqa: E402

pytestmark = pytest.mark.megatron

RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
LAYOUTS: dict[str, dict[str, Any]] = {
    "one_recomputed": dict(config=RECOMPUTE),
    "tp2_sp": dict(tp=2, sp=True, etp=1, ep=2),
    "pp2": dict(pp=2),
    "tp2_sp_cp2_dp2_ep2_etp2": dict(tp=2, sp=True, cp=2, dp=2, ep=2, etp=2),
    "cp2_dp2_ep4": dict(cp=2, dp=2, ep=4, etp=1, config=RECOMPUTE),
    "hybrid_pp2": dict(pp=2, pattern="ME|*E", config=cases.linear_hybrid("ME|*E")["config"]),
}
RESIDENT = dict(prefix_resident="always", max_tokens_per_microbatch=24, max_resident_tokens=40)
SETTINGS = {
    "one_recomputed": PrefixGroupConfig(min_shared=1, max_tokens_per_microbatch=60),
    "tp2_sp": PrefixGroupConfig(min_shared=1, **RESIDENT),  # type: ignore[arg-type]
    "pp2": PrefixGroupConfig(min_shared=1, prefix_resident_mode="recompute", **RESIDENT),  # type: ignore[arg-type]
    "tp2_sp_cp2_dp2_ep2_etp2": PrefixGroupConfig(min_shared=1, **RESIDENT),  # type: ignore[arg-type]
    "cp2_dp2_ep4": PrefixGroupConfig(
        min_shared=1,
        prefix_resident_mode="recompute",
        **RESIDENT,  # type: ignore[arg-type]
    ),
    "hybrid_pp2": PrefixGroupConfig(min_shared=1, **RESIDENT),  # type: ignore[arg-type]
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


def skip_hybrids(name: str) -> None:
    if "pattern" in LAYOUTS.get(name, {}) and not HAS_HYBRID_MODEL:
        pytest.skip("HybridModel came with megatron-core 0.18")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_equals_samples_written_out_with_their_routes(ranks: Pool, name: str) -> None:
    """Prompts are shared up to the first other route, also where they are resident."""
    skip_hybrids(name)
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


@pytest.mark.parametrize("name", [*LAYOUTS, "pp2_vpp2"])
def test_what_is_recorded_is_replayed_to_the_last_bit(ranks: Pool, name: str) -> None:
    skip_hybrids(name)
    groups = make_large_groups()
    case = replay_case(**LAYOUTS.get(name, dict(pp=2, vpp=2)))
    settings = SETTINGS.get(name, SETTINGS["one_recomputed"])
    layers = set()
    for rank in ranks.run(case.world_size, recorded_step, case, settings, groups):
        assert rank.same_gradients and len(rank.recorded) > 2
        layers |= set(rank.layers)
        for recorded, replayed in zip(rank.recorded, rank.replayed, strict=True):
            assert torch.equal(recorded, replayed)
        moved = [(a != b).any() for a, b in zip(rank.recorded, rank.own)]
        assert any(moved), "other weights route alike"
        assert all(routes[:, rank.layers].any() for routes in rank.recorded)
    assert layers == {
        i for i, has_experts in enumerate(case.config["moe_layer_freq"]) if has_experts
    }


def test_without_replay_samples_that_share_tokens_share_routes(ranks: Pool) -> None:
    """A router sees the same hidden state, whether samples share it or stand alone."""
    groups = make_large_groups()
    settings = PrefixGroupConfig(max_tokens_per_microbatch=200)
    arguments = (replay_case(), settings, groups)
    ((alone, together),) = ranks.run(1, routes_alone_and_together, *arguments)
    assert len(alone) == sum(len(group.samples) for group in groups)
    for of_sample, shared in zip(alone, together, strict=True):
        assert torch.equal(of_sample, shared)


def test_replicas_replay_routes_that_others_have_brought(ranks: Pool) -> None:
    """Of two replicas the first brings all groups; the step's own check packs them apart."""
    groups = with_routes(make_groups(5), SHAPE, seed=3)
    case, algorithm = replay_case(), GrpoConfig(router_replay="R3")
    settings = PrefixGroupConfig(min_shared=1, max_tokens_per_microbatch=60)
    (want,) = ranks.run(1, whole_step, case, algorithm, settings, [groups])
    for got in ranks.run(2, whole_step, replace(case, dp=2), algorithm, settings, [groups, ()]):
        assert got["check"] < 1e-6 and got["num_tokens"] > 0
        for name, gradient in want["gradients"].items():
            assert (got["gradients"][name] - gradient).norm() < 1e-6 * gradient.norm(), name


@pytest.fixture
def chunks() -> Iterator[list[Any]]:
    with harness.on_cpu():
        harness.initialize(replay_case())
        yield make_chunks(replay_case())


def spoiled(change: Any) -> list[Group]:
    """The second sample of the first group with other routes."""
    first, second, *rest = ROUTED[0].samples
    assert second.routed_experts is not None
    second = replace(second, routed_experts=change(second.routed_experts.clone()))
    return [Group(ROUTED[0].group_id, (first, second, *rest)), *ROUTED[1:]]


def twice(routes: torch.Tensor) -> torch.Tensor:
    routes[0, 3] = 1
    return routes


def beyond(routes: torch.Tensor) -> torch.Tensor:
    routes[1, 2, 0] = NUM_EXPERTS
    return routes


ROUTED = with_routes(make_groups(2), SHAPE)
BARE = make_groups(2)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (BARE, "but the samples carry no routed_experts; have the engine report them"),
        ([ROUTED[0], BARE[1]], "give them for all samples or for none"),
        (spoiled(twice), "sample 1 of group 'g0': routed_experts of token 0 in layer 3"),
        (spoiled(beyond), "of token 1 in layer 2"),
        (spoiled(lambda r: None), "routed_experts"),
        (spoiled(lambda r: r[:, :2]), "the model has 4 layers, 3 of them with experts"),
    ],
    ids=["none", "some", "twice", "beyond", "one_none", "layers"],
)
def test_routes_that_cannot_be_replayed_are_refused(
    chunks: list[Any], groups: list[Group], message: str
) -> None:
    algorithm = GrpoConfig(router_replay="R3")
    step = GrpoStep(chunks, vocab_size=harness.VOCAB, algorithm=algorithm)
    with pytest.raises(ValueError) as error:
        step.prepare(groups)
    assert message in str(error.value)


def test_routes_are_dropped_where_they_are_not_replayed(chunks: list[Any]) -> None:
    step = GrpoStep(chunks, vocab_size=harness.VOCAB)
    batch = step.prepare(spoiled(beyond))
    assert all(row.routed_experts is None for part in batch.minibatches for row in part.rows)
    assert batch.tokens.split == 0


def test_settings_that_replay_nothing_are_refused(chunks: list[Any]) -> None:
    def make(mode: Any, own: list[Any] = chunks) -> GrpoStep:
        algorithm = GrpoConfig(router_replay=mode, num_minibatches=2)
        return GrpoStep(own, vocab_size=harness.VOCAB, algorithm=algorithm)

    with pytest.raises(ValueError, match="router_replay='R4' must be one of disabled, R2, R3"):
        make("R4")
    dense = make_chunks(harness.Case())
    for mode in ("R2", "R3"):
        with pytest.raises(ValueError, match=f"router_replay='{mode}' .* the model has none"):
            make(mode, dense)
    with pytest.raises(ValueError, match="but the samples carry old_logprobs; leave them out"):
        make("R2").prepare(carrying(BARE, "old_logprobs"))
    chunks[0].config.moe_router_fusion = True
    with pytest.raises(NotImplementedError, match="moe_router_fusion=True"):
        make("R2")


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
