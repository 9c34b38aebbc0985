"""Mamba-2's recurrence in chunks against the same, token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_pg.linear import forked_scan, in_batches, of_layout, state_space_scan
from tests.linear.rows import random_row, relative

HEADS, GROUPS, HEAD_DIM, STATE_DIM = 4, 2, 3, 5


def step_by_step(
    x: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    outs = []
    b, c = (y.repeat_interleave(HEADS // GROUPS, 2) for y in (b, c))
    for t in range(x.shape[1]):
        kept = (dt[:, t] * rates).exp()[..., None, None]
        written = dt[:, t, :, None, None] * torch.einsum("nhp,nhs->nhps", x[:, t], b[:, t])
        state = kept * state + written
        outs.append(torch.einsum("nhps,nhs->nhp", state, c[:, t]))
    return torch.stack(outs, 1), state


def make_inputs(seed: int, *shape: int) -> list[Tensor]:
    """``x, dt, b, c`` and rates in fp64; some heads keep their state far, some forget at once."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*rest: int) -> Tensor:
        return torch.randn(*shape, *rest, generator=gen, dtype=torch.float64)

    dt = torch.nn.functional.softplus(normal(HEADS))
    b, c = normal(GROUPS, STATE_DIM), normal(GROUPS, STATE_DIM)
    rates = -torch.tensor([0.01, 0.1, 1.0, 16.0], dtype=torch.float64)
    return [y.requires_grad_() for y in (normal(HEADS, HEAD_DIM), dt, b, c, rates)]


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 150])
@pytest.mark.parametrize("has_states", [False, True])
def test_chunks_equal_steps(num_tokens: int, has_states: bool) -> None:
    x, dt, b, c, rates = leaves = make_inputs(num_tokens, 3, num_tokens)
    states = torch.randn(3, HEADS, HEAD_DIM, STATE_DIM, dtype=torch.float64) * has_states
    states.requires_grad_()
    got = state_space_scan(x, dt, rates, b, c, states if has_states else None)
    want = step_by_step(x, dt, rates, b, c, states)
    told = [torch.randn_like(y) for y in want]
    leaves = [*leaves, *([states] if has_states else [])]
    grads = [
        torch.autograd.grad([(y * w).sum() for y, w in zip(pair, told)], leaves, allow_unused=True)
        for pair in (got, want)
    ]
    if num_tokens == 1 and not has_states:  # Nothing has been kept yet.
        grads = [[g for g, leaf in zip(of, leaves) if leaf is not rates] for of in grads]
    pairs = [*zip(got, want), *zip(*grads)]
    assert all(w.abs().max() > 0 for _, w in pairs)
    assert max(relative(g, w) for g, w in pairs) < 1e-12


def test_a_step_of_nothing_leaves_the_state() -> None:
    x, dt, b, c, rates = (y.detach() for y in make_inputs(0, 1, 70))
    _, state = state_space_scan(x[:, :40], dt[:, :40], rates, b[:, :40], c[:, :40])
    dt = dt.clone()
    dt[:, 40:] = 0
    _, same = state_space_scan(x, dt, rates, b, c)
    assert relative(same, state) < 1e-14


def test_low_precision_is_computed_in_fp32() -> None:
    inputs = [y.detach().bfloat16() for y in make_inputs(0, 2, 70)]
    x, dt, b, c, rates = inputs
    out, state = state_space_scan(x, dt, rates, b, c)
    wide, exact = state_space_scan(*(y.float() for y in (x, dt, rates, b, c)))
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(out, wide.bfloat16()) and torch.equal(state, exact)


def test_autocast_changes_nothing() -> None:
    inputs = [y.detach().float() for y in make_inputs(0, 2, 70)]
    x, dt, b, c, rates = inputs
    want = state_space_scan(x, dt, rates, b, c)
    with torch.autocast("cpu", torch.bfloat16):
        got = state_space_scan(x, dt, rates, b, c)
        assert (x[..., 0] @ x[..., 0].mT).dtype == torch.bfloat16
    assert all(map(torch.equal, got, want))


def test_rows_of_shared_tokens() -> None:
    seed = 1
    layout = random_row(seed, longest=70)
    assert layout.forest.depth > 1
    leaves = make_inputs(seed, layout.total_tokens)
    *inputs, rates = leaves
    forks = of_layout(layout, 4)

    def scan(parts: list[Tensor], states: Tensor | None, _: bool) -> tuple[Tensor, Tensor]:
        x, dt, b, c = parts
        return state_space_scan(x, dt, rates, b, c, states)

    out = forked_scan([forks.depth_major(y) for y in inputs], forks, in_batches(scan)).out
    got = layout.expand(forks.packed(out))
    outs = []
    zeros = torch.zeros(1, HEADS, HEAD_DIM, STATE_DIM, dtype=torch.float64)
    for sample in range(layout.num_samples):
        x, dt, b, c = (y[layout.sample_indices(sample)][None] for y in inputs)
        outs.append(step_by_step(x, dt, rates, b, c, zeros)[0][0])
    want = torch.cat(outs)
    told = torch.randn_like(want)
    grads = [torch.autograd.grad((y * told).sum(), leaves) for y in (got, want)]
    assert max(relative(g, w) for g, w in [(got, want), *zip(*grads)]) < 1e-12
