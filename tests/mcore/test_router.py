"""Routers on packed rows: what the stock router gives on written-out samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_pg.mcore.versions import HAS_HYBRID_MODEL
from tests.mcore import cases, harness
from tests.mcore.router_steps import RouterCase, routers, two_steps
from tests.ranks import Pool

pytestmark = pytest.mark.megatron

CASES = cases.ROUTERS


def assert_equal(ranks: Pool, case: RouterCase) -> None:
    if case.pattern is not None and not HAS_HYBRID_MODEL:
        pytest.skip("HybridModel came with megatron-core 0.18")
    found = ranks.run(case.world_size, two_steps, case)
    counted = [any(name.split()[1] == "count" for name in steps.errors) for steps in found]
    assert any(counted) == bool(case.config.get("moe_router_enable_expert_bias"))
    assert all(counted) or not any(counted) or "moe_layer_freq" in case.config
    for steps in found:
        assert any("grad" in name for name in steps.errors)
        # A layer's biases of attention and the like may train nothing; every router must.
        assert not any("router" in name for name in steps.zero), steps.zero
        counts = {n: e for n, e in steps.errors.items() if n.split()[1] == "count"}
        assert not any(counts.values()), counts
        harness.assert_within(steps.errors, case.bound)


@pytest.mark.parametrize("name", CASES)
def test_statistics_equal_the_stock_routers_on_written_out_samples(ranks: Pool, name: str) -> None:
    assert_equal(ranks, CASES[name])


MUTANTS: dict[str, tuple[str, str]] = {
    "aux_unweighted": ("aux", "unweighted"),
    "z_padding": ("z", "padding_counted"),
    "bias_unweighted": ("bias", "unweighted"),
    "bias_padding": ("bias", "padding_counted"),
    "z_local": ("seq_z_tp2_sp", "local_denominator"),
    "aux_local": ("all_tp2_sp", "local_lengths"),
    "replay_other_layer": ("replay", "other_layers_routes"),
    "hybrid_unweighted": ("hybrid", "unweighted"),
    "hybrid_other_layer": ("hybrid_replay_full", "other_layers_routes"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_count_is_seen(ranks: Pool, name: str) -> None:
    of, mutant = MUTANTS[name]
    case: Any = replace(CASES[of], mutant=mutant)
    if case.pattern is not None and not HAS_HYBRID_MODEL:
        pytest.skip("HybridModel came with megatron-core 0.18")
    for steps in ranks.run(case.world_size, two_steps, case):
        assert max(steps.errors.values()) > 1e3 * case.bound


def test_no_mode_of_the_device_rounds_what_is_balanced(one_rank: None) -> None:
    """Products of a row's weights and scores are sums to the stock router."""
    (model,) = harness.build(CASES["aux"], harness.make_config(CASES["aux"]), packed=True)
    router = routers([model])[0]
    weights = torch.randint(0, 300, (3, 50))
    scores = torch.rand(50, 4, requires_grad=True)
    routing_map = torch.zeros(50, 4).scatter(1, scores.detach().topk(2).indices, 1).bool()
    found = []
    for rounds in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            loss = router._balance_loss(weights, weights.sum(1), scores, routing_map)
            found.append((loss, *torch.autograd.grad(loss, scores)))
    assert all(torch.equal(plain, other) for plain, other in zip(*found))
