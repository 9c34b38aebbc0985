"""The convolution of a row against the convolution of every sample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from megatron_pg import PackedLayout, PrefixTree, pack_trees
from megatron_pg.linear import forked_convolution, of_layout
from megatron_pg.tree import join_chains
from tests.linear.rows import random_row, relative
from tests.strategies import forests

CHANNELS = 3


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Causal and depthwise, with an activation: ``[n, channels]``."""
    padded = functional.pad(x.t(), (weight.shape[1] - 1, 0))
    return functional.silu(functional.conv1d(padded, weight[:, None], groups=len(weight))).t()


def compare(layout: PackedLayout, width: int, seed: int, has_history: bool) -> dict[str, float]:
    """Worst relative errors of the output and of all gradients."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    forks = of_layout(layout, width)
    x, weight = normal(layout.total_tokens, CHANNELS), normal(CHANNELS, width)
    history = normal(len(forks.roots), width - 1, CHANNELS) if has_history else None
    leaves = [t.requires_grad_() for t in (x, weight, history) if t is not None]
    told = normal(layout.logical_tokens, CHANNELS)

    row = forked_convolution(x, forks, lambda inputs: convolve(inputs, weight), history)
    got = layout.expand(forks.packed(row))
    got_grads = torch.autograd.grad((got * told).sum(), leaves)

    root_of = {segment: i for i, segment in enumerate(forks.roots)}
    outs = []
    for i in range(layout.num_samples):
        path = layout.sample_indices(i)
        inputs = x[path]
        if history is not None:
            inputs = torch.cat([history[root_of[int(layout.segment_ids[path[0]])]], inputs])
        outs.append(convolve(inputs, weight)[-len(path) :])
    want = torch.cat(outs)
    want_grads = torch.autograd.grad((want * told).sum(), leaves)
    assert all(grad.abs().max() > 0 for grad in want_grads)
    errors = [relative(a, b) for a, b in zip([got, *got_grads], [want, *want_grads])]
    return dict(zip(["out", "x", "weight", "history"], errors))


@settings(max_examples=60)
@given(forests(), st.integers(2, 5), st.booleans())
def test_short_segments(
    forest: tuple[PackedLayout, list[list[int]]], width: int, has_history: bool
) -> None:
    layout, _ = forest
    assert max(compare(layout, width, 0, has_history).values()) < 1e-13


@pytest.mark.parametrize("seed", range(5))
def test_long_segments(seed: int) -> None:
    layout = random_row(seed)
    assert layout.reuse_ratio > 1.05 and layout.forest.depth > 1
    assert max(compare(layout, 4, seed, has_history=bool(seed % 2)).values()) < 1e-13


def test_one_call_a_row() -> None:
    layout, calls = random_row(1), []
    num_segments = join_chains(layout.forest).num_segments
    assert num_segments < layout.forest.num_segments

    def counted(inputs: Tensor) -> Tensor:
        calls.append(len(inputs))
        return inputs

    x = torch.randn(layout.total_tokens, CHANNELS)
    out = forked_convolution(x, of_layout(layout, 4), counted)
    assert calls == [layout.unique_tokens + 3 * num_segments]
    assert torch.equal(out, of_layout(layout, 4).depth_major(x))


def test_gradients_of_shared_inputs_are_summed_in_fp32() -> None:
    """The last token of a prompt is read by every response's first outputs."""
    layout = pack_trees([PrefixTree.from_group(4, [1] * 300)])
    x = torch.zeros(layout.total_tokens, 1, dtype=torch.bfloat16, requires_grad=True)

    def latest(inputs: Tensor) -> Tensor:
        """Every output is the input before its own."""
        return torch.cat([inputs.new_zeros(1, 1), inputs[:-1]])

    forked_convolution(x, of_layout(layout, 2), latest).sum().backward()
    assert x.grad is not None and x.grad[3, 0] == 300
