"""The scan of a row against a recurrence over every sample, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_pg import PackedLayout, PrefixTree, pack_trees
from megatron_pg.linear import Depth, forked_scan, in_batches, of_layout
from tests.linear.rows import delta_rule, random_row, relative, rule_inputs
from tests.strategies import forests


def compare(
    layout: PackedLayout, seed: int, has_history: bool, keeps_states: bool = True
) -> dict[str, float]:
    """Worst relative errors of outputs, final states where they are kept, and all gradients."""
    forks = of_layout(layout, 4, keeps_states=keeps_states)
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    inputs = rule_inputs(layout.total_tokens, seed)
    history = normal(len(forks.roots), 3, 2).requires_grad_() if has_history else None
    leaves = [*inputs, *([] if history is None else [history])]
    told, told_states = normal(layout.logical_tokens, 2), normal(layout.num_samples, 3, 2)
    ends = torch.tensor(layout.forest.sample_segments)

    scanned = forked_scan(
        [forks.depth_major(x) for x in inputs], forks, in_batches(delta_rule), history, keeps_states
    )
    got = layout.expand(forks.packed(scanned.out))
    if scanned.states is not None:
        order = [int(layout.segment_ids[t]) for t in forks.tokens]
        segments = list(dict.fromkeys(order))
        got_states = scanned.states[[segments.index(int(end)) for end in ends]]
    else:
        told_states, got_states = torch.zeros_like(told_states), None
    cost = (got * told).sum() + (0 if got_states is None else (got_states * told_states).sum())
    got_grads = torch.autograd.grad(cost, leaves)

    root_of = {segment: i for i, segment in enumerate(forks.roots)}
    outs, states = [], []
    for i in range(layout.num_samples):
        path = layout.sample_indices(i)
        root = root_of[int(layout.segment_ids[path[0]])]
        before = None if history is None else history[root : root + 1]
        out, state = delta_rule([x[path][None] for x in inputs], before)
        outs.append(out[0])
        states.append(state)
    want, want_states = torch.cat(outs), torch.cat([x for x in states if x is not None])
    want_grads = torch.autograd.grad(
        (want * told).sum() + (want_states * told_states).sum(), leaves
    )
    # Nothing decays before the first token of a lone one.
    assert layout.forest.depth == 0 or all(grad.abs().max() > 0 for grad in want_grads)
    got_all, want_all = [got, *got_grads], [want, *want_grads]
    names = ["out", "q", "k", "v", "g", "beta", "history"]
    errors = {n: relative(a, b) for n, a, b in zip(names, got_all, want_all)}
    return errors if got_states is None else errors | {"states": relative(got_states, want_states)}


@settings(max_examples=60)
@given(forests(), st.booleans(), st.booleans())
def test_short_segments(
    forest: tuple[PackedLayout, list[list[int]]], has_history: bool, keeps_states: bool
) -> None:
    layout, _ = forest
    assert max(compare(layout, 0, has_history, keeps_states).values()) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_long_segments(seed: int) -> None:
    layout = random_row(seed, longest=130)
    assert layout.reuse_ratio > 1.05 and layout.forest.depth > 1
    keeps_states = seed == 2
    errors = compare(layout, seed, bool(seed % 2), keeps_states)
    assert ("states" in errors) == keeps_states and max(errors.values()) < 1e-12


def test_calls_grow_with_depth_and_not_with_segments() -> None:
    calls: list[tuple[int, bool, bool]] = []

    def counted(
        depth: Depth, inputs: Sequence[Tensor], states: Tensor | None, wants_states: bool
    ) -> tuple[Tensor, Tensor | None]:
        calls.append((len(depth.lens), states is None, wants_states))
        return inputs[0], torch.zeros(len(depth.lens), 1) if wants_states else None

    for num_children in (2, 40):
        calls.clear()
        layout = pack_trees([PrefixTree.from_group(9, [3] * num_children)] * 2)
        forks = of_layout(layout, 4)
        x = torch.randn(layout.unique_tokens, 2)
        assert torch.equal(forked_scan([x], forks, counted).out, x)
        assert calls == [(2, True, True), (2 * num_children, False, False)]


def test_siblings_are_isolated_bit_for_bit() -> None:
    layout = random_row(4)
    forks = of_layout(layout, 4)
    inputs = [x.detach() for x in rule_inputs(layout.total_tokens, 0)]

    def run(values: Sequence[Tensor]) -> Tensor:
        scanned = forked_scan([forks.depth_major(x) for x in values], forks, in_batches(delta_rule))
        return forks.packed(scanned.out)

    plain, forest = run(inputs), layout.forest
    for segment in range(forest.num_segments):
        start, end = (int(x[segment]) for x in (forest.segment_starts, forest.segment_subtree_ends))
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[start] *= 0.5
        differs = (run(changed) != plain).any(-1)
        assert differs[start] and not differs[:start].any() and not differs[end:].any()
