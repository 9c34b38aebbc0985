"""Packed equals written out, on every parallel layout and for every model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_pg.mcore import count_attention_calls
from tests.mcore import cases, harness
from tests.ranks import Pool

pytestmark = pytest.mark.megatron


@dataclass(frozen=True)
class Step:
    """One step of a rank; errors of gradients are relative to the stock spec's.

    Attributes:
        losses: packed and written out; None where no token is predicted.
        least_gradient: the smallest norm of a gradient of the stock spec.
        calls: of attention, packed and ordinary.
    """

    losses: tuple[float | None, float | None]
    errors: dict[str, float]
    least_gradient: float
    calls: tuple[int, int]


def one_step(name: str) -> Step:
    return step_of(cases.EQUIVALENCE[name])


def step_of(case: harness.Case) -> Step:
    with harness.on_cpu(case):
        harness.initialize(case)
        config = harness.make_config(case)
        packed = harness.build(case, config, packed=True)
        harness.make_experts_differ(packed)
        harness.make_states_reach_far(packed)
        initial = [chunk.state_dict() for chunk in packed]
        packed = harness.wrap_ddp(case, config, packed)
        rows = harness.make_dp_rows(case, 4 if case.pp == 4 else 2)
        lens = {row.layout.total_tokens for row in rows}
        assert len(lens) > 1, "microbatches must differ in length"
        assert all(row.layout.reuse_ratio > 1.3 for row in rows)
        batches = harness.packed_microbatches(case, rows)
        loss = harness.run_step(case, packed, harness.packed_step, batches)
        got = harness.named_gradients(packed)
        if case.cp > 1:
            case = case.without_context
            harness.initialize(case)
        stock_config = harness.make_config(case)
        stock = harness.build(case, stock_config, packed=False)
        for theirs, state in zip(stock, initial):
            assert list(theirs.state_dict()) == list(state)
            theirs.load_state_dict(state)
        stock = harness.wrap_ddp(case, stock_config, stock)
        written_out = harness.written_out_microbatches(case, rows)
        control = harness.run_step(case, stock, harness.written_out_step, written_out)
        want = harness.named_gradients(stock)
        norms = {n: want[n].norm() for n in want}
        calls = [count_attention_calls(chunk) for chunk in packed]
        return Step(
            losses=(loss, control),
            errors={n: float((got[n] - want[n]).norm() / norms[n]) for n in want},
            least_gradient=float(min(norms.values())),
            calls=(sum(c.prefix_grouped for c in calls), sum(c.ordinary for c in calls)),
        )


@pytest.mark.parametrize("name", cases.EQUIVALENCE)
def test_gradients_equal_the_stock_specs_on_written_out_samples(ranks: Pool, name: str) -> None:
    case = cases.EQUIVALENCE[name]
    check_steps(case, ranks.run(case.world_size, one_step, name))


def check_steps(case: harness.Case, steps: list[Step]) -> None:
    for step in steps:
        assert step.errors and step.least_gradient > 0, "a gradient is zero: nothing is proven"
        harness.assert_within(step.errors, case.bound)
        assert step.calls[1] == 0
    # A stage of the loss alone attends to nothing.
    assert sum(step.calls[0] > 0 for step in steps) >= case.world_size // case.pp
    losses = [step.losses for step in steps if step.losses[0] is not None]
    assert len(losses) == case.world_size // case.pp
    for loss, control in losses:
        assert abs(loss - control) <= case.loss_bound * abs(control), (loss, control)


Weights = list[dict[str, torch.Tensor]]


def train(
    case: harness.Case, packed: bool, state: Weights | None
) -> tuple[Weights, Weights, list[float]]:
    """Initial weights, final weights and gradient norms of all steps."""
    rows_of = partial(harness.make_dp_rows, case, 2)
    if not packed:
        case = case.without_context
    harness.initialize(case)
    config = harness.make_config(case)
    chunks = harness.build(case, config, packed=packed)
    if state is not None:
        for chunk, weights in zip(chunks, state):
            chunk.load_state_dict(weights)
    initial = [{n: t.clone() for n, t in c.state_dict().items() if t is not None} for c in chunks]
    chunks = harness.wrap_ddp(case, config, chunks)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=2e-3,
            # A usual 1e-8 turns the rounding of gradients near zero into full-sized steps.
            adam_eps=1e-3,
            clip_grad=1.0,
            params_dtype=case.dtype,
            use_distributed_optimizer=case.distributed_optimizer,
        ),
        chunks,
    )
    config.grad_scale_func = optimizer.scale_loss
    norms = []
    for step in range(case.num_steps):
        rows = rows_of(seed=1000 * step)
        optimizer.zero_grad()
        if packed:
            batches, step_func = harness.packed_microbatches(case, rows), harness.packed_step
        else:
            batches = harness.written_out_microbatches(case, rows)
            step_func = harness.written_out_step
        harness.run_step(case, chunks, step_func, batches)
        success, norm, _ = optimizer.step()
        assert success
        norms.append(norm)
    return initial, [dict(chunk.module.named_parameters()) for chunk in chunks], norms


def train_twice(name: str) -> tuple[dict[str, float], dict[str, float], list[tuple[float, float]]]:
    """Differences relative to movements, movements, and gradient norms of both, step by step."""
    case = cases.TRAINING[name]
    errors, movements = {}, {}
    with harness.on_cpu(case):
        initial, packed, norms = train(case, packed=True, state=None)
        _, stock, control = train(case, packed=False, state=initial)
    for i, (ours, theirs, start) in enumerate(zip(packed, stock, initial)):
        for n, weight in ours.items():
            moved = (theirs[n] - start[n]).norm()
            movements[f"chunk{i}.{n}"] = float(moved)
            errors[f"chunk{i}.{n}"] = float((weight - theirs[n]).norm() / moved)
    return errors, movements, list(zip(norms, control))


@pytest.mark.parametrize("name", cases.TRAINING)
def test_optimizer_steps_end_at_the_same_weights(ranks: Pool, name: str) -> None:
    case = cases.TRAINING[name]
    for errors, movements, norms in ranks.run(case.world_size, train_twice, name):
        assert len(norms) == case.num_steps and max(ours for ours, _ in norms) > 1.0, (
            "never clipped"
        )
        assert errors and min(movements.values()) > 0, "a weight did not train"
        harness.assert_within(errors, case.bound)
        assert max(abs(ours - theirs) / theirs for ours, theirs in norms) <= case.bound
