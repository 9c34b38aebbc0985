"""Stages exchange activations of rows that all know, and never ask each other for a shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_pg.mcore import ScheduledRow, prefix_resident_forward_backward
from megatron_pg.mcore.schedule.exchange import KnownShapes
from tests.mcore import cases, harness, resident_steps
from tests.ranks import Pool, RanksFailed

pytestmark = pytest.mark.megatron


def gradients(case: harness.Case, chunks: list[Any], knows: bool) -> dict[str, torch.Tensor]:
    """Of a step with retained prefix rows, whose stages know the rows' lengths or ask for them."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    waves = resident_steps.make_waves(case, "retain")
    for rows in zip(*((wave.prefix_rows, wave.microbatches) for wave in waves)):
        lens = {row.layout.total_tokens for of_wave in rows for row in of_wave}
        assert len(lens) > 1, "rows must differ in length"
    with pytest.MonkeyPatch.context() as patch:
        if knows:
            patch.setattr(P2PCommunicator, "_communicate_shapes", asked)
        else:
            patch.delattr(KnownShapes, "_communicate_shapes")
        prefix_resident_forward_backward(
            forward_step_func=resident_steps.resident_step(resident_steps.groups_of(0)),
            waves=waves,
            model=chunks,
            seq_length=harness.MAX_LEN,
        )
    return {name: value.clone() for name, value in harness.named_gradients(chunks).items()}


def asked(*args: Any) -> None:
    raise AssertionError("a stage asked another one for a shape")


def differences(name: str) -> tuple[int, float, float]:
    """Of gradients: how many, the largest difference, the least norm."""
    case = cases.SCHEDULE[name]
    with harness.on_cpu():
        harness.initialize(case)
        config = harness.make_config(case)
        chunks = harness.wrap_ddp(case, config, harness.build(case, config, packed=True))
        got, want = (gradients(case, chunks, knows) for knows in (True, False))
        largest = max(float((got[n] - want[n]).abs().max()) for n in want)
        return len(want), largest, min(float(g.norm()) for g in want.values())


# The interleaved schedule sends around, too; sequence parallelism divides what is sent.
@pytest.mark.parametrize("name", ["pp2_vpp2", "tp2_sp_pp2"])
def test_a_step_equals_that_of_stages_that_ask(ranks: Pool, name: str) -> None:
    for number, largest, least in ranks.run(cases.SCHEDULE[name].world_size, differences, name):
        assert number > 0 and least > 0
        assert largest == 0


def send_another_row() -> None:
    case = cases.SCHEDULE["pp2"]
    with harness.on_cpu():
        harness.initialize(case)
        (wave, *_) = resident_steps.make_waves(case, "retain")
        rows = [ScheduledRow(row) for row in wave.microbatches]
        known = KnownShapes.of_schedule(harness.make_config(case), rows, 1)
        if parallel_state.is_pipeline_first_stage():
            known.send_forward(torch.zeros(1, 1, 32), is_last_stage=False)


def test_a_row_out_of_its_place_is_not_sent(ranks: Pool) -> None:
    with pytest.raises(RanksFailed, match=r"shape \[1, 1, 32\] to send where the rows of the"):
        ranks.run(2, send_another_row)
