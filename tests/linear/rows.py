"""Rows of long and short segments, and recurrences that are written out token by token."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_pg import PackedLayout, PrefixTree, pack_trees


def random_tree(rng: random.Random, longest: int = 200, max_depth: int = 5) -> PrefixTree:
    """Segments of 1 to ``longest`` tokens, a third of them of 1 to 4; samples may end inside."""
    lens: list[int] = []
    parents: list[int] = []
    ends: list[int] = []

    def grow(parent: int, depth: int) -> None:
        segment = len(lens)
        lens.append(rng.randint(1, 4 if rng.random() < 0.35 else longest))
        parents.append(parent)
        children = rng.randint(0, 3) if depth < max_depth and len(lens) < 9 else 0
        children = max(children, 2) if parent < 0 else children
        if not children or rng.random() < 0.2:
            ends.append(segment)
        for _ in range(children):
            grow(segment, depth + 1)

    grow(-1, 0)
    rng.shuffle(ends)
    return PrefixTree(np.array(lens), np.array(parents), np.array(ends))


def random_row(seed: int, longest: int = 200, max_depth: int = 5) -> PackedLayout:
    """One or two such trees, padded."""
    rng = random.Random(seed)
    trees = [random_tree(rng, longest, max_depth) for _ in range(rng.randint(1, 2))]
    return pack_trees(trees, rng.choice([1, 2, 8]))


def an_agent(num_turns: int, branches_at: int, turn_tokens: int = 3) -> PackedLayout:
    """One tree: a sample ends after every turn, and after one of them another goes its own way."""
    parents = np.append(np.arange(num_turns) - 1, branches_at)
    lens = np.full(num_turns + 1, turn_tokens)
    # In pre-order the branch stands behind all that follows its turn.
    return pack_trees([PrefixTree(lens, parents, np.arange(num_turns + 1))])


def delta_rule(
    inputs: Sequence[Tensor], state: Tensor | None, wants_state: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule, a step a token: ``[batch, tokens, dim]`` queries, keys, values.

    Gates ``[batch, tokens]``: the logarithm of the decay, and how much of a value is written.
    Zeros leave the state as it is.
    """
    q, k, v, g, beta = inputs
    if state is None:
        state = q.new_zeros(len(q), k.shape[-1], v.shape[-1])
    outs = []
    for t in range(q.shape[1]):
        state = state * g[:, t, None, None].exp()
        old = torch.einsum("bk,bkv->bv", k[:, t], state)
        change = beta[:, t, None] * (v[:, t] - old)
        state = state + torch.einsum("bk,bv->bkv", k[:, t], change)
        outs.append(torch.einsum("bk,bkv->bv", q[:, t], state))
    return torch.stack(outs, 1), state if wants_state else None


def rule_inputs(num_tokens: int, seed: int) -> list[Tensor]:
    """What ``delta_rule`` takes of a row, in fp64, with gradients; decays that reach far."""
    gen = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(num_tokens, 3, generator=gen, dtype=torch.float64) for _ in range(2))
    v = torch.randn(num_tokens, 2, generator=gen, dtype=torch.float64)
    g, beta = (torch.rand(num_tokens, generator=gen, dtype=torch.float64) for _ in range(2))
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    return [x.requires_grad_() for x in (q, k, v, -0.1 * g, beta)]


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value."""
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))
