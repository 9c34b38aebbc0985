"""Resident prefixes equal the written-out step; see ``resident_steps``."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.data import Wave
from megatron_pg.mcore import PrefixKV, prefix_resident_forward_backward
from megatron_pg.mcore.schedule import sweep
from tests.mcore import cases, harness, resident_steps
from tests.ranks import Pool

pytestmark = pytest.mark.megatron


@pytest.mark.parametrize("name", cases.SCHEDULE)
def test_gradients_equal_the_stock_specs_on_written_out_samples(ranks: Pool, name: str) -> None:
    case = cases.SCHEDULE[name]
    steps = ranks.run(case.world_size, resident_steps.run, name)
    compares_with_sequential = case.world_size == 1 and name != "averaged"
    for mode in ("retain", "recompute"):
        of_ranks = [step[mode] for step in steps]
        # Nothing is trained on stages that are frozen, and in one case nowhere.
        assert any(step.errors for step in of_ranks) == (not name.endswith("frozen_all"))
        for step in of_ranks:
            harness.assert_within(step.errors, case.bound)
            if step.losses is not None:
                got, loss = step.losses
                assert abs(got - loss) <= 1e-9 * abs(loss), f"{mode}: loss {got} != {loss}"
                assert step.num_results == step.num_rows > 0
            assert bool(step.sequential_errors) == (compares_with_sequential and bool(step.errors))
            harness.assert_within(step.sequential_errors, 1e-12)
        speaking = [step for step in of_ranks if step.losses is not None]
        assert len(speaking) == case.world_size // case.pp


@pytest.mark.parametrize(
    ("num_stages", "num_chunks", "num_rows"),
    [s for s in itertools.product([1, 2, 3, 4], [1, 2, 3], [0, 1, 2, 5]) if s[0] > 1 or s[1] == 1],
)
def test_a_sweep_takes_every_row_through_every_chunk(num_stages, num_chunks, num_rows) -> None:
    ticks = [list(sweep(p, num_stages, num_chunks, num_rows)) for p in range(num_stages)]
    assert len({len(t) for t in ticks}) == 1
    there = {(0, (0, row)) for row in range(num_rows)}
    done = set()
    for number in range(len(ticks[0])):
        sent = set()
        for stage in range(num_stages):
            tick = ticks[stage][number]
            if tick.job is not None:
                assert (stage, tick.job) in there, "computed before its input came"
                assert (stage, tick.job) not in done
                done.add((stage, tick.job))
                chunk, row = tick.job
                is_end = stage == num_stages - 1 and chunk == num_chunks - 1
                assert tick.sends == (not is_end)
                if tick.sends:
                    last = stage == num_stages - 1
                    sent.add((0, (chunk + 1, row)) if last else (stage + 1, tick.job))
            else:
                assert not tick.sends
        # What is sent in a tick is received in it, so that no rank waits for another.
        arrived = {
            (stage, ticks[stage][number].arrives)
            for stage in range(num_stages)
            if ticks[stage][number].arrives is not None
        }
        assert arrived == sent
        there |= arrived
    every = itertools.product(
        range(num_stages), itertools.product(range(num_chunks), range(num_rows))
    )
    assert done == set(every)


def test_a_row_that_comes_too_early_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="not been encoded"):
        PrefixKV().of(torch.nn.Identity())


@pytest.mark.parametrize("window", [None, 3, 2, 0])
@pytest.mark.parametrize("has_graph", [False, True])
def test_what_is_kept_owns_its_memory_and_no_more(has_graph: bool, window: int | None) -> None:
    """Two prefixes of 3 and 2 tokens; values are a view of what projects them."""
    projected = torch.randn(6, 2, 9, requires_grad=True)
    layout = pack_trees([PrefixTree.from_sequences([[0] * n]) for n in (3, 2)], pad_to_multiple=6)
    key, value = projected[..., 3:6].contiguous(), projected[..., 6:]
    prefix_kv, layer = PrefixKV(), torch.nn.Identity()
    with torch.set_grad_enabled(has_graph):
        row_key, row_value = prefix_kv.keep(layer, key, value, layout, window)
    assert torch.equal(row_key, key) and torch.equal(row_value, value)
    # A window of 3 leaves nothing out; padding stays with what is kept whole.
    rows = torch.tensor([[], [], [1, 2, 3, 4], [0, 1, 2, 3, 4, 5]][3 if window is None else window])
    rows = rows.long()
    kept = prefix_kv.of(layer)
    assert torch.equal(kept.k, key[rows]) and torch.equal(kept.v, value[rows])
    assert not kept.v.requires_grad
    # What attention saves for the backward pass of the row itself is the same copy.
    is_whole = len(rows) == 6
    assert (row_value.data_ptr() == kept.v.data_ptr() != value.data_ptr()) == is_whole
    assert (kept.k.data_ptr() == key.data_ptr()) == is_whole
    stored = sum(x.untyped_storage().nbytes() for x in (kept.k, kept.v))
    assert stored == prefix_kv.num_bytes == 2 * len(rows) * 2 * 3 * 4
    if has_graph:
        kept.grads()[1].fill_(2.0)
        kept.grads()[0].fill_(1.0)
        assert prefix_kv.num_bytes == 2 * stored
        torch.autograd.backward([row_key, row_value], [torch.ones_like(x) for x in (key, value)])
        assert projected.grad is not None
        want = torch.ones(6, 2, 9)
        want[..., :3] = 0
        want[rows, :, 3:6] += 1
        want[rows, :, 6:] += 2
        assert torch.equal(projected.grad, want)


def test_overlaps_that_count_on_one_call_and_unknown_modes_are_refused() -> None:
    model = torch.nn.Linear(2, 2)
    model.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    model.ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=True)
    call = partial(
        prefix_resident_forward_backward,
        forward_step_func=None,
        waves=[Wave((object(),), (object(),))],
        model=model,
        seq_length=4,
    )
    with pytest.raises(ValueError, match="mode='recompite' must be one of retain, recompute"):
        call(mode="recompite")
    # Rows of one call, too, are as many as the groups fill.
    for waves in ([Wave((object(),), (object(),))], [Wave((), (object(),))]):
        with pytest.raises(ValueError, match="needs config.no_sync_func"):
            call(waves=waves)
    model.config.param_sync_func = lambda parameters: None
    with pytest.raises(NotImplementedError, match="overlap_param_gather"):
        call()
    model.config.param_sync_func, model.ddp_config.overlap_grad_reduce = None, False
    model.config.num_moe_experts, model.config.moe_z_loss_coeff = 4, 0.1
    model.config.calculate_per_token_loss = False
    with pytest.raises(NotImplementedError, match="need calculate_per_token_loss=True"):
        call()
