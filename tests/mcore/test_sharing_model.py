"""The transparent model equals the stock model on the same call, on every parallel layout."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_pg.mcore import count_attention_calls, count_shared_tokens
from tests.mcore import cases, harness
from tests.mcore.harness import Case
from tests.mcore.sharing_rows import (
    Comparison,
    Variant,
    build,
    call,
    make_row,
    make_rows,
    run,
    tokens_fed,
)
from tests.ranks import Pool

pytestmark = pytest.mark.megatron

FULL = cases.FULL_RECOMPUTE


def headless(**sizes: Any) -> Variant:
    return Variant(
        case=Case(trains=lambda s, c, name: "output_layer" not in name, **sizes), hidden=True
    )


VARIANTS = {
    "plain": Variant(),
    "tied": Variant(case=Case(tied=True)),
    "yarn": Variant(case=Case(position_embedding_type="yarn")),
    "learned": Variant(case=Case(position_embedding_type="learned_absolute")),
    "learned_positions": Variant(
        case=Case(position_embedding_type="learned_absolute"), positions=True
    ),
    "positions": Variant(positions=True),
    "qk_layernorm": Variant(case=cases.EQUIVALENCE["qk_layernorm"]),
    "moe": Variant(case=Case(**cases.MOE)),
    # Of a thd row the stock router's seq_aux_loss is that of the row.
    "moe_statistics": Variant(case=Case(**cases.moe(**cases.BIAS, **cases.BOTH, **cases.Z))),
    "moe_statistics_tp2_sp_full": Variant(
        case=Case(tp=2, sp=True, **cases.moe(**cases.BOTH, **cases.Z, **FULL))
    ),
    "full": Variant(case=Case(config=FULL)),
    "selective": Variant(case=Case(config=cases.SELECTIVE_RECOMPUTE)),
    "window": Variant(case=cases.EQUIVALENCE["window_freq"]),
    "window_latent": Variant(case=cases.EQUIVALENCE["window_latent"]),
    "labels": Variant(labels=True),
    "hidden": headless(),
    "padded": Variant(padded=True),
    "borders": Variant(borders=True),
    "unshared": Variant(shares=False),
    "as_it_came": Variant(shares=False, takes_thd=True),
    "learned_as_it_came": Variant(
        case=Case(position_embedding_type="learned_absolute"), shares=False, takes_thd=True
    ),
    "takes_thd": Variant(takes_thd=True),
    "tp2": Variant(case=Case(tp=2)),
    "tp2_labels": Variant(case=Case(tp=2), labels=True),
    "tp2_sp": Variant(case=Case(tp=2, sp=True)),
    "tp2_sp_tied_full": Variant(case=Case(tp=2, sp=True, tied=True, config=FULL)),
    "tp2_sp_window": Variant(case=cases.EQUIVALENCE["tp2_sp_window"]),
    "tp2_sp_latent": Variant(case=cases.EQUIVALENCE["latent_tp2_sp"]),
    "tp2_sp_labels": Variant(case=Case(tp=2, sp=True), labels=True),
    "tp2_sp_unshared": Variant(case=Case(tp=2, sp=True), shares=False),
    "tp2_sp_hidden": headless(tp=2, sp=True),
    "tp2_hidden": headless(tp=2),
    "pp2": Variant(case=Case(pp=2)),
    "pp2_tied_full": Variant(case=Case(pp=2, tied=True, config=FULL)),
    "pp2_as_it_came": Variant(case=Case(pp=2), shares=False, takes_thd=True),
    "pp2_vpp2": Variant(case=Case(pp=2, vpp=2, num_layers=4)),
    "tp2_sp_pp2_hidden": headless(tp=2, sp=True, pp=2),
    "pp2_vpp2_window_latent": Variant(case=cases.EQUIVALENCE["latent_pp2_vpp2_window"]),
    "dp2": Variant(case=Case(dp=2)),
    "cp2": Variant(case=Case(cp=2)),
    "cp2_tied_mqa_full": Variant(case=Case(cp=2, tied=True, num_query_groups=1, config=FULL)),
    "cp2_learned_positions": Variant(
        case=Case(cp=2, position_embedding_type="learned_absolute"), positions=True
    ),
    "cp2_labels": Variant(case=Case(cp=2), labels=True),
    "cp2_padded_borders": Variant(case=Case(cp=2), padded=True, borders=True),
    "cp2_unshared": Variant(case=Case(cp=2), shares=False),
    "cp2_latent_window": Variant(case=replace(cases.EQUIVALENCE["window_latent"], cp=2)),
    "cp2_moe_statistics": Variant(
        # Megatron's router takes its softmax in fp32.
        case=Case(cp=2, ep=2, loss_bound=1e-6, **cases.moe(**cases.BIAS, **cases.BOTH, **cases.Z))
    ),
    # Four ranks and more.
    "cp4": Variant(case=Case(cp=4)),
    "cp2_tp2_hidden": headless(cp=2, tp=2),
    "cp2_tp2_sp": Variant(case=Case(cp=2, tp=2, sp=True)),
    "cp2_tp2_sp_hidden": headless(cp=2, tp=2, sp=True),
    "cp2_dp2": Variant(case=Case(cp=2, dp=2)),
    "cp2_pp2_vpp2_selective": Variant(
        case=Case(cp=2, pp=2, vpp=2, num_layers=4, config=cases.SELECTIVE_RECOMPUTE)
    ),
    "cp2_tp2_sp_pp2_labels": Variant(case=Case(cp=2, tp=2, sp=True, pp=2), labels=True),
    "tp2_sp_pp2": Variant(case=Case(tp=2, sp=True, pp=2)),
    "moe_statistics_tp2_sp_pp2_vpp2_ep2_full": Variant(
        case=Case(
            tp=2,
            sp=True,
            pp=2,
            vpp=2,
            ep=2,
            etp=1,
            num_layers=4,
            loss_bound=1e-6,
            **cases.moe(**cases.BIAS, **cases.BOTH, **cases.Z, **FULL),
        )
    ),
    "tp2_sp_pp2_vpp2_full": Variant(
        case=Case(tp=2, sp=True, pp=2, vpp=2, num_layers=4, config=FULL)
    ),
}


def compare(name: str) -> Comparison:
    variant = VARIANTS[name]
    case = variant.case
    with harness.on_cpu():
        harness.initialize(case)
        config = harness.make_config(case)
        chunks = build(variant, config, True)
        harness.make_experts_differ(chunks)
        initial = [deepcopy(chunk.state_dict()) for chunk in chunks]
        ours = harness.wrap_ddp(case, config, chunks)
        rows = make_rows(variant, 2)
        assert len({len(row.tokens) for row in rows}) > 1, "microbatches must differ in length"
        with tokens_fed(ours) as seen:
            outputs = run(variant, ours, rows)
        got = harness.named_gradients(ours)
        variant = variant.stock
        harness.initialize(variant.case)
        config = harness.make_config(variant.case)
        chunks = build(variant, config, False)
        for chunk, state in zip(chunks, initial):
            assert list(chunk.state_dict()) == list(state)
            chunk.load_state_dict(state)
        stock = harness.wrap_ddp(variant.case, config, chunks)
        controls = run(variant, stock, rows)
        want = harness.named_gradients(stock)
        for mine, theirs in zip(*(biases(chunks) for chunks in (ours, stock)), strict=True):
            assert torch.equal(mine, theirs) and mine.any(), "another expert bias"
        calls = [count_attention_calls(chunk) for chunk in ours]
        return Comparison(
            output_errors=[
                float((a - b).abs().max() / b.abs().max()) for a, b in zip(outputs, controls)
            ],
            gradient_errors={n: float((got[n] - want[n]).norm() / want[n].norm()) for n in want},
            least_gradient=float(min(x.norm() for x in want.values())),
            calls=(sum(c.prefix_grouped for c in calls), sum(c.ordinary for c in calls)),
            counted=[tuple(count_shared_tokens(chunk)) for chunk in ours],
            seen=[n * case.row_multiple for n in seen],
            logical=sum(len(row.tokens) for row in rows),
        )


def biases(chunks: list[Any]) -> list[Tensor]:
    """Of routers, updated by what was counted."""
    named = [item for chunk in chunks for item in chunk.module.named_buffers()]
    return [buffer for name, buffer in named if name.endswith("expert_bias")]


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_stock_model_on_the_same_rows(ranks: Pool, name: str) -> None:
    variant = VARIANTS[name]
    case: Any = variant.case
    results = ranks.run(case.world_size, compare, name)
    last = [result for result in results if result.output_errors]
    assert len(last) == case.world_size // case.pp
    for result in results:
        assert result.gradient_errors and result.least_gradient > 0
        harness.assert_within(result.gradient_errors, case.bound)
        assert all(error <= case.loss_bound for error in result.output_errors)
        is_whole = variant.takes_thd and not variant.shares
        assert (result.calls[0] > 0) != is_whole and (result.calls[1] > 0) == is_whole
        assert {logical for _, logical in result.counted} == {result.logical}
        runs = 2 if case.config.get("recompute_granularity") == "full" else 1
        assert result.seen == [runs * unique for unique, _ in result.counted]
        ratio = result.logical / result.counted[0][0]
        assert ratio > 1.3 if variant.shares else ratio == 1


def outputs_and_gradients(variant: Variant, ours: bool, state: Any) -> dict[str, Tensor]:
    (model,) = build(variant, harness.make_config(variant.case), ours)
    model.load_state_dict(state)
    row = make_row(variant, 0, 20)
    output = call(model, row, variant)
    # The same cotangent in both dtypes.
    output.backward(row.cotangent[None].bfloat16().to(output.dtype))
    found = {n: p.grad for n, p in model.named_parameters()}
    return {name: x.double() for name, x in {**found, "logits": output.detach()}.items()}


def test_bf16_errs_as_the_stock_model_does(one_rank) -> None:
    exact, low = (
        Variant(case=Case(dtype=dtype, config=dict(init_method_std=0.1)))
        for dtype in (torch.float64, torch.bfloat16)
    )
    (model,) = build(exact, harness.make_config(exact.case), ours=False)
    state = {n: x if x is None else x.bfloat16() for n, x in model.state_dict().items()}
    truth = outputs_and_gradients(exact, False, state)
    got, control = (outputs_and_gradients(low, ours, state) for ours in (True, False))
    for name, want in truth.items():
        allowed = float((control[name] - want).norm() / want.norm())
        assert 1e-3 < allowed < 0.1, (name, allowed)
        assert float((got[name] - want).norm() / want.norm()) <= 2 * allowed, name
