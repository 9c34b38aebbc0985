"""Groups whose samples carry routes, and what perfect sharing of them stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_pg.data import Group, Sample


def random_routes(
    num_tokens: int, shape: Sequence[int], generator: torch.Generator, num_experts: int = 4
) -> Tensor:
    """``[num_tokens, layers, topk]`` of different experts."""
    layers, topk = shape
    scores = torch.rand(num_tokens, layers, num_experts, generator=generator)
    return scores.argsort(dim=-1)[..., :topk].to(torch.int16)


def with_routes(
    groups: Sequence[Group],
    shape: Sequence[int],
    *,
    seed: int = 0,
    num_experts: int = 4,
    divergence: float = 0.4,
    reports_last: bool = False,
) -> list[Group]:
    """The groups with random routes; equal tokens begin with equal ones.

    Args:
        groups: whose samples may share tokens.
        shape: layers, and experts of each token.
        seed: of the routes.
        num_experts: to choose from.
        divergence: share of samples whose routes leave those of the others somewhere.
        reports_last: whether the last token has a route too.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for group in groups:
        longest = max(len(sample.tokens) for sample in group.samples)
        common = random_routes(longest, shape, generator, num_experts)
        samples = []
        for sample in group.samples:
            own = common[: len(sample.tokens)].clone()
            if float(torch.rand(1, generator=generator)) < divergence:
                start = int(torch.randint(len(own), (1,), generator=generator))
                own[start:] = random_routes(len(own) - start, shape, generator, num_experts)
            samples.append(
                replace(sample, routed_experts=own if reports_last else own[: len(own) - 1])
            )
        found.append(Group(group.group_id, tuple(samples)))
    return found


def identities(sample: Sample, *, with_routes: bool = True) -> list[tuple[int, ...]]:
    """Every token with its route."""
    assert sample.routed_experts is not None
    routes = sample.routed_experts.flatten(1).tolist()
    tokens = sample.tokens.tolist()
    return [(token, *(own if with_routes else ())) for token, own in zip(tokens, routes)]


def distinct_prefixes(samples: Sequence[Sample], *, with_routes: bool = True) -> int:
    """Nodes of the trie of tokens, or of tokens with their routes: what perfect sharing stores."""
    runs = [identities(sample, with_routes=with_routes) for sample in samples]
    return len({tuple(run[:n]) for run in runs for n in range(1, len(run) + 1)})
