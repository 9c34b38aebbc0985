"""What every layer is handed of its microbatch, under recompute and between other microbatches."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_pg.attention import interface
from megatron_pg.mcore import PrefixGroupedSeqParams, with_prefix_grouped_attention
from tests.mcore import cases, harness, probes
from tests.mcore.probes import Records
from tests.ranks import Pool

pytestmark = pytest.mark.megatron

MOE_RECOMPUTE = dict(recompute_granularity="selective", recompute_modules=["moe"])
# A case, and how often a layer's router or MLP runs for one microbatch.
CASES: dict[str, tuple[harness.Case, int]] = {
    "mlp": (harness.Case(), 1),
    "mlp_full": (harness.Case(config=cases.FULL_RECOMPUTE), 2),
    "mlp_selective": (harness.Case(config=cases.MODULES_RECOMPUTE), 2),
    "router": (harness.Case(**cases.MOE), 1),
    "router_full": (harness.Case(**cases.moe(**cases.FULL_RECOMPUTE)), 2),
    "router_selective": (harness.Case(**cases.moe(**MOE_RECOMPUTE)), 2),
}


STAGES = {
    "pp2_vpp2_full": harness.Case(pp=2, vpp=2, num_layers=4, config=cases.FULL_RECOMPUTE),
    "pp2_vpp2_router_selective": harness.Case(
        pp=2,
        vpp=2,
        num_layers=4,
        **cases.moe(recompute_granularity="selective", recompute_modules=["moe"]),
    ),
}


def handed_on_stages(name: str) -> tuple[list[int], int]:
    """Places, in the order of planning, of the rows that were planned; how many there are."""
    case = STAGES[name]
    with harness.on_cpu():
        harness.initialize(case)
        config = harness.make_config(case)
        records: Records = []
        with probes.probed_layers(records):
            policy, reference = (
                harness.wrap_ddp(case, config, harness.build(case, config, packed=True))
                for _ in range(2)
            )
        rows = harness.make_dp_rows(case, 4)
        counted = mock.Mock(side_effect=interface.make_attention_plan)
        with mock.patch.object(interface, "make_attention_plan", counted):
            # Each call makes its rows' parameters anew, as a pass over them does.
            for chunks in (reference, policy, policy):
                records.clear()
                batches = harness.packed_microbatches(case, rows)
                harness.run_step(case, chunks, harness.packed_step, batches)
                # Two layers of this rank, each run and recomputed.
                probes.check_records(records, rows, 2 * 2)
        layouts = [row.layout for row in rows]
        return [layouts.index(call.args[0]) for call in counted.call_args_list], len(rows)


def outputs_of(model: Any, case: harness.Case, rows: list[harness.Rows]) -> list[torch.Tensor]:
    batches = harness.packed_microbatches(case, rows)
    return [harness.packed_step(iter([batch]), model)[0][0] for batch in batches]


@pytest.mark.parametrize("name", CASES)
def test_microbatches_that_interleave_keep_their_own(one_rank, name: str) -> None:
    case, num_runs = CASES[name]
    records: Records = []
    config = harness.make_config(case)
    with probes.probed_layers(records):
        (model,) = harness.build(case, config, packed=True)
    rows = harness.make_dp_rows(case, 3)
    # All forward passes before the first backward pass.
    outputs = outputs_of(model, case, rows)
    assert len(records) == len(rows) * case.num_layers
    for output in outputs:
        output.sum().backward()
    probes.check_records(records, rows, num_runs * case.num_layers)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", STAGES)
def test_virtual_stages(ranks: Pool, name: str) -> None:
    for planned, num_rows in ranks.run(2, handed_on_stages, name):
        assert sorted(planned) == list(range(num_rows)) and num_rows > 1


@pytest.mark.parametrize("name", ["mlp", "router"])
def test_probed_models_are_stock_ones_in_a_state_dict(one_rank, name: str) -> None:
    case, _ = CASES[name]
    config = harness.make_config(case)
    (stock,) = harness.build(case, config, packed=False)
    with probes.probed_layers([]):
        (model,) = harness.build(case, config, packed=True)
    assert list(model.state_dict()) == list(stock.state_dict())
    layer, stock_layer = model.decoder.layers[0], stock.decoder.layers[0]
    assert type(layer) is not type(stock_layer) and isinstance(layer, type(stock_layer))


def test_ordinary_batches_keep_their_padding_mask(one_rank) -> None:
    records: Records = []
    case, _ = CASES["mlp"]
    with probes.probed_layers(records):
        (model,) = harness.build(case, harness.make_config(case), packed=True)
    mask, hidden = torch.zeros(1, 5, dtype=torch.bool), torch.zeros(5, 1, 32, dtype=case.dtype)
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).triu(1)
    model.decoder.layers[0](hidden, attention_mask=causal, padding_mask=mask)
    assert records == [(5, mask)]


def test_layers_that_nobody_asks_for_a_mask_stay(one_rank) -> None:
    assert with_prefix_grouped_attention(get_gpt_layer_local_spec()).module is TransformerLayer
    # A router that keeps no statistics asks for none either.
    for case in (harness.Case(), harness.Case(**cases.MOE)):
        (model,) = harness.build(case, harness.make_config(case), packed=True)
        (row,) = rows = harness.make_dp_rows(case, 1)
        outputs_of(model, case, rows)
        made = {key[0] for key in vars(row.layout)["_derived"]}
        assert not made & {"row_mask", "multiplicity_digits"}


def test_wrapping_a_layer_that_reads_the_mask_twice_is_wrapping_it_once() -> None:
    once = with_prefix_grouped_attention(probes.with_probe(get_gpt_layer_local_spec(), []))
    assert issubclass(once.module, TransformerLayer) and once.module is not TransformerLayer
    assert with_prefix_grouped_attention(once).module is once.module


def test_a_layer_that_hands_no_mask_is_refused() -> None:
    spec = probes.with_probe(get_gpt_layer_local_spec(), [])
    other = ModuleSpec(module=MLP, submodules=spec.submodules)
    with pytest.raises(NotImplementedError, match="MLP reads the row mask, but the layer is no"):
        with_prefix_grouped_attention(other)


def test_a_row_is_planned_once(one_rank, monkeypatch) -> None:
    case = harness.Case()
    config = harness.make_config(case)
    (policy,), (reference,) = (harness.build(case, config, packed=True) for _ in range(2))
    rows, planned = harness.make_dp_rows(case, 3), []
    make = interface.make_attention_plan
    monkeypatch.setattr(
        interface, "make_attention_plan", lambda *args: planned.append(args[0]) or make(*args)
    )
    for model in (policy, reference):
        with torch.no_grad():
            outputs_of(model, case, rows)
    for _ in range(2):
        for output in outputs_of(policy, case, rows):
            output.sum().backward()
    assert planned == [row.layout for row in rows]


def test_positions_on_the_device_are_made_once() -> None:
    layout = harness.make_rows(0, 1).layout
    first, second = (PrefixGroupedSeqParams.from_layout(layout) for _ in range(2))
    assert first.position_ids is second.position_ids and first.row_mask is second.row_mask
    assert torch.equal(first.row_mask, probes.membership(layout))
