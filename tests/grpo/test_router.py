"""Losses and counts of routers do not depend on the rows that groups are packed into."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("megatron.core")

from megatron_pg.data import CostModel  # noqa: E402
from megatron_pg.grpo import PackingConfig, PrefixGroupConfig  # noqa: E402
from tests.grpo import router_steps  # noqa: E402
from tests.mcore import cases, harness  # noqa: E402
from tests.ranks import Pool  # noqa: E402

BIAS = cases.BIAS | dict(moe_router_bias_update_rate=0.0)
ONE_ROW = PrefixGroupConfig(max_tokens_per_microbatch=1024, prefix_resident="never")
ROWS = replace(ONE_ROW, max_tokens_per_microbatch=40)
RETAIN = PrefixGroupConfig(
    max_tokens_per_microbatch=18, prefix_resident="always", max_resident_tokens=20
)
RECOMPUTE = replace(RETAIN, prefix_resident_mode="recompute")

CASES = {
    "one_row": (cases.router(cases.AUX, cases.Z, BIAS), ONE_ROW),
    "rows": (cases.router(cases.Z, BIAS), ROWS),
    "rows_dp2": (cases.router(cases.Z, BIAS, dp=2), ROWS),
    "retain": (cases.router(cases.Z, BIAS), RETAIN),
    "recompute": (cases.router(cases.Z, BIAS), RECOMPUTE),
    "retain_dp2": (cases.router(cases.Z, BIAS, dp=2), RETAIN),
    "retain_pp2": (cases.router(cases.Z, BIAS, pp=2), RETAIN),
    # Megatron-Core up to 0.18 divides what a row's routers lose by these ranks.
    "one_row_tp2": (cases.router(cases.AUX, cases.Z, BIAS, tp=2, sp=True), ONE_ROW),
    "retain_tp2": (cases.router(cases.Z, BIAS, tp=2, sp=True), RETAIN),
    "one_row_cp2": (cases.router(cases.AUX, cases.Z, BIAS, cp=2), ONE_ROW),
    "retain_cp2": (cases.router(cases.Z, BIAS, cp=2), RETAIN),
}


@pytest.mark.parametrize("name", CASES)
def test_router_losses_equal_the_stock_routers_on_all_samples(ranks: Pool, name: str) -> None:
    case, settings = CASES[name]
    for errors, tokens in ranks.run(case.world_size, router_steps.against_stock, case, settings):
        assert len(errors) > 4
        assert not any(error for name, error in errors.items() if name.startswith("count"))
        harness.assert_within(errors, case.bound)
        assert (tokens.rows - tokens.fillers > 4) == (settings is not ONE_ROW)
        assert bool(tokens.resident) == (settings.prefix_resident == "always")
        assert bool(tokens.fillers) == (name == "retain_dp2")


PER_TOKEN = dict(calculate_per_token_loss=True)
EVEN_ROWS = replace(ONE_ROW, max_tokens_per_microbatch=24)
# Megatron-Core up to 0.18 gives several of these ranks a fraction of the coefficients.
BY_ROW = {
    "aux_tp2_sp": cases.router(cases.AUX, cases.Z, tp=2, sp=True),
    "aux_cp2": cases.router(cases.AUX, cases.Z, cp=2),
    "seq_tp2_sp": cases.router(cases.SEQ, PER_TOKEN, tp=2, sp=True),
    "seq_cp2": cases.router(cases.SEQ, PER_TOKEN, cp=2),
    "seq_pp2": cases.router(cases.SEQ, PER_TOKEN, pp=2),
}


@pytest.mark.parametrize("name", BY_ROW)
def test_a_row_weighs_as_much_as_its_samples_have_tokens(ranks: Pool, name: str) -> None:
    """Losses that are not linear, of rows and of samples, on ranks that divide either."""
    case = BY_ROW[name]
    for errors, num_rows in ranks.run(2, router_steps.rows_against_stock, case, EVEN_ROWS):
        assert num_rows > 2 and len(errors) > 4
        harness.assert_within(errors, case.bound)


@pytest.mark.parametrize("name", ["rows_dp2", "retain_dp2", "retain_tp2", "retain_cp2"])
def test_the_policy_loss_stays_what_it_is_beside_them(ranks: Pool, name: str) -> None:
    case, settings = CASES[name]
    tiny = replace(case, config=case.config | dict(moe_z_loss_coeff=1e-30))
    none = replace(case, config=case.config | dict(moe_z_loss_coeff=None))
    for errors in ranks.run(2, router_steps.main_loss_alone, (tiny, none), settings):
        assert errors
        harness.assert_within(errors, 1e-6)


def test_a_loss_of_every_sample_keeps_samples_whole() -> None:
    config = harness.make_config(cases.router(cases.SEQ))
    auto = replace(RETAIN, prefix_resident="auto")
    assert PackingConfig.from_config(auto, config, CostModel()).residency.choice == "never"
    with pytest.raises(ValueError, match="prefix_resident='always' with seq_aux_loss"):
        PackingConfig.from_config(RETAIN, config, CostModel())
    other = harness.make_config(cases.router(cases.AUX))
    assert PackingConfig.from_config(RETAIN, other, CostModel()).residency.choice == "always"
