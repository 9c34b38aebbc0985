"""Routes: which experts the tokens of a sample went to in every layer, to be replayed in training.

A route is part of a token's identity: what follows it depends on it. Samples share a token only
where all of them have the same tokens with the same routes up to it. Without routes to replay
there is nothing to compare: a router that decides by itself sees the same hidden state in every
sample that shares a token, and sends it to the same experts.

An engine reports no route of the last token that it sampled, which was never fed back. Nothing that
is trained depends on that token, so its router decides by itself there. Only what counts tokens
reads it: balancing losses and an expert bias that is updated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..tree import PackedLayout
from .model import expert_pattern
from .rows import Wave
from .types import UNKNOWN_ROUTE, Group, Sample

# Bounds what the check of a long sample needs beside it.
_CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class RouteShape:
    """What a model's routes look like.

    Attributes:
        num_experts: of a layer that has some.
        topk: experts that a token goes to.
        has_experts: of every layer whether it has some; those of the others are not read.
    """

    num_experts: int
    topk: int
    has_experts: tuple[bool, ...]

    @classmethod
    def from_config(cls, config: Any) -> Self | None:
        """Of a ``TransformerConfig``; None for a model without experts."""
        if not config.num_moe_experts:
            return None
        return cls(config.num_moe_experts, config.moe_router_topk, tuple(expert_pattern(config)))

    @property
    def num_layers(self) -> int:
        return len(self.has_experts)

    def of_model(self, routes: Tensor) -> Tensor:
        """``[num_tokens, num_layers, topk]`` with zeros where a layer has no experts.

        Args:
            routes: int16 of all layers, or of those alone that have experts.

        Raises:
            ValueError: if the routes are not those of such a model: names the first wrong value.
        """
        places = torch.tensor([i for i, has in enumerate(self.has_experts) if has])
        if routes.shape[1:] not in ((self.num_layers, self.topk), (len(places), self.topk)):
            raise ValueError(
                f"routed_experts has shape {tuple(routes.shape)}, the model has {self.num_layers} "
                f"layers, {len(places)} of them with experts, and {self.topk} of these to a token: "
                f"give [tokens, {self.num_layers}, {self.topk}]"
            )
        if wrong := self.problem(routes):
            raise ValueError(f"routed_experts {wrong}")
        if len(places) == self.num_layers:
            return routes
        whole = routes.new_zeros(len(routes), self.num_layers, self.topk)
        whole[:, places] = routes if routes.shape[1] == len(places) else routes[:, places]
        return whole

    def of_group(self, group: Group) -> Group:
        """The group with the routes that a step compares and replays.

        Raises:
            ValueError: naming the sample whose routes are not those of such a model.
        """

        def routed(number: int, sample: Sample) -> Sample:
            own = sample.routed_experts
            try:
                own = None if own is None else self.of_model(own)
            except ValueError as error:
                raise ValueError(f"sample {number} of group {group.group_id!r}: {error}") from error
            return sample if own is sample.routed_experts else replace(sample, routed_experts=own)

        return replace(group, samples=tuple(routed(i, s) for i, s in enumerate(group.samples)))

    def problem(self, routes: Tensor) -> str | None:
        """``route_problem`` of routes as ``of_model`` takes them."""
        if routes.shape[1] == self.num_layers and not all(self.has_experts):
            is_read = torch.tensor(self.has_experts)[:, None]
            routes = torch.where(is_read, routes, UNKNOWN_ROUTE)
        return route_problem(routes, self.num_experts)


def route_problem(routes: Tensor, num_experts: int | None = None) -> str | None:
    """What is wrong with the first wrong entry of routes ``[num_tokens, layers, topk]``, or None.

    An entry is an expert in [0, ``num_experts``), and no other of its token and layer; all of them
    are -1 where the engine reported none.
    """
    for start in range(0, len(routes), _CHUNK_TOKENS):
        part = routes[start : start + _CHUNK_TOKENS]
        is_known = part >= 0
        low = (part < UNKNOWN_ROUTE) | (is_known != is_known[..., :1])
        if num_experts is not None:
            low |= part >= num_experts
        ranked = part.sort(dim=-1).values
        twice = (ranked[..., 1:] == ranked[..., :-1]) & (ranked[..., 1:] >= 0)
        wrong = torch.nonzero(low.any(-1) | twice.any(-1))
        if len(wrong):
            token, layer = wrong[0].tolist()
            limit = "num_experts" if num_experts is None else str(num_experts)
            return (
                f"of token {start + token} in layer {layer} are {part[token, layer].tolist()}, "
                f"must be different experts in [0, {limit})"
            )
    return None


def route_labels(group: Group) -> list[npt.NDArray[Any]] | None:
    """``[num_tokens, layers * topk]`` of every sample: what shared tokens have to agree in.

    None where no sample has routes. A last token without a route takes that of a sample which goes
    on from there, so that both share it: nothing that is trained depends on which it is.

    Raises:
        ValueError: if samples have routes of different shapes.
    """
    given = [sample.routed_experts for sample in group.samples]
    shapes = {routes.shape[1:] for routes in given if routes is not None}
    if not shapes:
        return None
    if len(shapes) > 1:
        told = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise ValueError(
            f"samples of group {group.group_id!r} have routed_experts of {told} layers and experts"
        )
    width = shapes.pop().numel()
    labels = [
        np.full((len(sample.tokens), width), UNKNOWN_ROUTE, dtype=np.int16)
        if routes is None
        else routes.reshape(len(routes), width).numpy()
        for sample, routes in zip(group.samples, given)
    ]
    return _with_last_routes(group.samples, labels)


def without_routes(group: Group) -> Group:
    """The group whose routers decide by themselves."""
    if all(sample.routed_experts is None for sample in group.samples):
        return group
    samples = tuple(replace(sample, routed_experts=None) for sample in group.samples)
    return replace(group, samples=samples)


def prompts_agree(group: Group, labels: Sequence[npt.NDArray[Any]]) -> bool:
    """Whether equal prompts have equal labels in all samples."""
    firsts: dict[bytes, npt.NDArray[Any]] = {}
    for sample, own in zip(group.samples, labels):
        own = own[: len(sample.prompt_ids)]
        first = firsts.setdefault(sample.prompt_ids.numpy().tobytes(), own)
        if first is not own and not np.array_equal(first, own):
            return False
    return True


def pack_routes(layout: PackedLayout, routes: Sequence[Tensor | None]) -> Tensor | None:
    """``[total_tokens, layers, topk]`` int16 of a row; -1 on padding and where no sample has one.

    None where no sample has routes.

    Args:
        layout: of the row.
        routes: of the tokens of every sample that stand in the row.

    Raises:
        ValueError: if samples disagree on the route of a token that they share.
    """
    given = next((own for own in routes if own is not None), None)
    if given is None:
        return None
    row = given.new_full((layout.total_tokens, *given.shape[1:]), UNKNOWN_ROUTE)
    for sample, own in enumerate(routes):
        if own is None:
            continue
        ids = layout.sample_indices(sample)
        held = row[ids]
        wrong = (held != own) & (held >= 0) & (own >= 0)
        if wrong.any():
            token = int(torch.nonzero(wrong)[0, 0])
            raise ValueError(
                f"the route of sample {sample} at position {token} of the row differs from that of "
                "another sample that shares the token; samples share only where routes agree"
            )
        row[ids] = torch.where(own >= 0, own, held)
    return row


def routes_of_samples(wave: Wave, row: int) -> list[Tensor]:
    """``[num_tokens, layers, topk]`` of every written-out sample of a row; resident prefixes count.

    Args:
        wave: whose rows all have routes.
        row: number of the row in the wave.
    """
    packed = wave.microbatches[row]
    assert packed.routed_experts is not None
    found = []
    for sample in range(packed.layout.num_samples):
        ids = packed.layout.sample_indices(sample)
        own = packed.routed_experts[ids]
        found.append(torch.cat([*_resident_routes(wave, packed.layout, int(ids[0])), own]))
    return found


def _resident_routes(wave: Wave, layout: PackedLayout, first: int) -> Iterator[Tensor]:
    """Of the resident prefix that the token at ``first`` continues, if it does."""
    for spans in layout.resident_spans:
        for (start, end), kept in zip(spans.q_spans.tolist(), spans.kv_spans.tolist()):
            routes = wave.prefix_rows[spans.row].routed_experts
            if start <= first < end and routes is not None:
                yield routes[slice(*kept)]


def _with_last_routes(
    samples: Sequence[Sample], labels: list[npt.NDArray[Any]]
) -> list[npt.NDArray[Any]]:
    tokens = [sample.tokens.numpy() for sample in samples]
    found = list(labels)
    for i, own in enumerate(tokens):
        end = len(own) - 1
        # Layers without experts have zeros whatever is reported.
        is_known = labels[i][end] != UNKNOWN_ROUTE
        if is_known.all():
            continue
        for j, other in enumerate(tokens):
            # Most differ in the one token that is looked at first.
            goes_on = len(other) > len(own) and other[end] == own[end]
            if (
                goes_on
                and np.array_equal(other[:end], own[:end])
                and np.array_equal(labels[j][:end], labels[i][:end])
                and np.array_equal(labels[j][end][is_known], labels[i][end][is_known])
            ):
                found[i] = np.concatenate([labels[i][:end], labels[j][end : end + 1]])
                break
    return found
