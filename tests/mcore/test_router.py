"""Routers on packed rows: what the stock router gives on written-out samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.mcore import cases, harness
from tests.mcore.router_steps import RouterCase, two_steps
from tests.ranks import Pool

pytestmark = pytest.mark.megatron

CASES = cases.ROUTERS


def assert_equal(ranks: Pool, case: RouterCase) -> None:
    for steps in ranks.run(case.world_size, two_steps, case):
        assert any("grad" in name for name in steps.errors)
        # A layer's biases of attention and the like may train nothing; every router must.
        assert not any("router" in name for name in steps.zero), steps.zero
        has_bias = case.config.get("moe_router_enable_expert_bias")
        assert bool(has_bias) == any(name.split()[1] == "count" for name in steps.errors)
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
    "replay_other_layer": ("replay", "other_layers_routes"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_count_is_seen(ranks: Pool, name: str) -> None:
    of, mutant = MUTANTS[name]
    case: Any = replace(CASES[of], mutant=mutant)
    for steps in ranks.run(case.world_size, two_steps, case):
        assert max(steps.errors.values()) > 1e3 * case.bound
