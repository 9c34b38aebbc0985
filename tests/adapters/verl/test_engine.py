"""verl's unmodified loop and losses: packed rows against the stock engine on written-out rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("verl", reason="verl is installed in its own lane")

from tests.adapters.verl.harness import QWEN3_NEXT, Difference, VerlCase, compare  # noqa: E402
from tests.mcore import cases  # noqa: E402
from tests.ranks import Pool  # noqa: E402

pytestmark = pytest.mark.verl

TEMPERATURES = (0.7, 1.3, 0.7, 0.7, 1.0, 0.9, 1.3, 1.3)
CASES = {
    "plain": VerlCase(),
    "uids": VerlCase(data=dict(uids=True)),
    "several_rows": VerlCase(data=dict(max_token_len_per_gpu=80)),
    "turns": VerlCase(batch="turns"),
    "turns_uids_several_rows": VerlCase(
        batch="turns", data=dict(uids=True, max_token_len_per_gpu=90)
    ),
    "temperatures": VerlCase(temperature=TEMPERATURES),
    "samples_per_row": VerlCase(data=dict(use_dynamic_bsz=False, micro_batch_size_per_gpu=4)),
    "another_loss": VerlCase(sft=True, data=dict(uids=True, max_token_len_per_gpu=80)),
    "seq_mean": VerlCase(loss=dict(loss_agg_mode="seq-mean-token-mean")),
    "per_token_loss": VerlCase(
        data=dict(max_token_len_per_gpu=80), config=dict(calculate_per_token_loss=True)
    ),
    "per_token_loss_resident": VerlCase(
        data=dict(max_token_len_per_gpu=60),
        config=dict(calculate_per_token_loss=True),
        prefix_group=dict(prefix_resident="always"),
    ),
    "padded": VerlCase(padded=True, data=dict(uids=True, max_token_len_per_gpu=80)),
    "latent_tp2_sp": VerlCase(
        tp=2, sp=True, layers=cases.LATENT, data=dict(max_token_len_per_gpu=80)
    ),
    "latent_resident": VerlCase(
        layers=cases.LATENT,
        data=dict(max_token_len_per_gpu=60),
        prefix_group=dict(prefix_resident="always"),
    ),
    "tp2": VerlCase(tp=2, data=dict(max_token_len_per_gpu=80)),
    "tp2_sp": VerlCase(tp=2, sp=True, data=dict(max_token_len_per_gpu=80)),
    "pp2": VerlCase(pp=2, data=dict(max_token_len_per_gpu=80)),
    "pp2_vpp2": VerlCase(pp=2, vpp=2, data=dict(max_token_len_per_gpu=80)),
    "dp2": VerlCase(dp=2, batch="turns", data=dict(uids=True, max_token_len_per_gpu=80)),
    # A rank has half of every row: samples of up to 53 tokens fit.
    "cp2": VerlCase(cp=2, data=dict(max_token_len_per_gpu=40)),
    # As Megatron Bridge sets it where a row is divided.
    "cp2_per_token_loss": VerlCase(
        cp=2,
        batch="turns",
        data=dict(uids=True, max_token_len_per_gpu=45),
        config=dict(calculate_per_token_loss=True),
    ),
    "cp2_latent_temperatures": VerlCase(cp=2, layers=cases.LATENT, temperature=TEMPERATURES),
    "cp2_resident": VerlCase(
        cp=2,
        data=dict(max_token_len_per_gpu=30),
        config=dict(calculate_per_token_loss=True),
        prefix_group=dict(prefix_resident="always"),
    ),
    "cp2_tp2_sp": VerlCase(cp=2, tp=2, sp=True, data=dict(max_token_len_per_gpu=40)),
    "cp2_pp2": VerlCase(
        cp=2,
        pp=2,
        data=dict(max_token_len_per_gpu=40),
        config=dict(calculate_per_token_loss=True),
    ),
    "cp2_dp2": VerlCase(cp=2, dp=2, batch="turns", data=dict(uids=True, max_token_len_per_gpu=40)),
    "next": replace(QWEN3_NEXT, data=dict(uids=True, max_token_len_per_gpu=90)),
    "next_resident": replace(
        QWEN3_NEXT,
        batch="ragged",
        data=dict(max_token_len_per_gpu=60),
        prefix_group=dict(prefix_resident="always"),
    ),
    "next_tp2_sp": replace(QWEN3_NEXT, tp=2, sp=True, data=dict(max_token_len_per_gpu=90)),
    "next_cp2": replace(QWEN3_NEXT, cp=2, data=dict(uids=True, max_token_len_per_gpu=45)),
    "tp2_sp_pp2": VerlCase(tp=2, sp=True, pp=2, batch="turns"),
    "resident": VerlCase(
        data=dict(max_token_len_per_gpu=60), prefix_group=dict(prefix_resident="always")
    ),
    "resident_pp2": VerlCase(
        pp=2, data=dict(max_token_len_per_gpu=60), prefix_group=dict(prefix_resident="always")
    ),
    "resident_dp2_recompute": VerlCase(
        dp=2,
        data=dict(max_token_len_per_gpu=60),
        prefix_group=dict(prefix_resident="always", prefix_resident_mode="recompute"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_stock_engine(ranks: Pool, name: str) -> None:
    case = CASES[name]
    found = ranks.run(case.world_size, compare, case)
    for own in found:
        assert own.smallest > 1e-6, "every gradient was compared with something"
        beyond = {n: e for n, e in own.gradients.items() if not e <= 1e-5}
        assert not beyond
    last = [own for own in found if own.losses is not None]
    assert last
    for own in last:
        stock, ours = own.losses
        assert ours == pytest.approx(stock, abs=1e-6, rel=1e-6) and abs(stock) > 1e-3
        check_values_and_sharing(case, own)


@pytest.mark.parametrize("name", ["plain", "turns_uids_several_rows", "temperatures", "resident"])
def test_logprobs_of_a_forward_pass(ranks: Pool, name: str) -> None:
    (own,) = ranks.run(1, compare, CASES[name], True)
    check_values_and_sharing(CASES[name], own)


def check_values_and_sharing(case: VerlCase, own: Difference) -> None:
    assert own.values["log_probs"] <= 1e-5 and own.values["entropy"] <= 1e-5
    assert own.metrics["reuse_ratio"] > 1.3
    assert own.metrics["unique_tokens"] < own.metrics["logical_tokens"]
    assert own.metrics["packed_calls"] > 0
    if "max_token_len_per_gpu" in case.data:
        assert own.metrics["rows"] > case.dp, "several rows were packed"
    if case.prefix_group.get("prefix_resident") == "always":
        assert own.metrics["resident_groups"] > 0
