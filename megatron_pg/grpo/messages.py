"""Groups as bytes, for the way from the replica that has them to the one that packs them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch

from ..data import OPTIONAL_TOKEN_VALUES, Group, GroupShape, Sample

Numbered = tuple[int, Group, GroupShape]
"""Number of a group within the step, the group, and what its samples share."""

_TOKENS = ("response_ids", "loss_mask")
_SCALARS = ("reward", "status", "sample_id", "rollout_id", "loss_weight")


def encode_groups(groups: Sequence[Numbered]) -> bytes:
    """As ``decode_groups`` reads it: a few arrays instead of one a sample, and no metadata."""
    if not groups:
        return b""
    samples = [sample for _, group, _ in groups for sample in group.samples]
    prompts = {id(sample.prompt_ids): sample.prompt_ids for sample in samples}
    places = {key: i for i, key in enumerate(prompts)}
    columns: dict[str, Any] = {"prompts": _flat(list(prompts.values()))}
    for name in _TOKENS:
        columns[name] = _flat([getattr(sample, name) for sample in samples])
    for name in OPTIONAL_TOKEN_VALUES:
        given = [getattr(sample, name) for sample in samples]
        columns[name] = (
            [values is not None for values in given],
            # As the loss reads them; numpy has no bfloat16.
            _flat([values.detach().double() for values in given if values is not None]),
        )
    routes = [sample.routed_experts for sample in samples]
    columns["routes"] = (
        [own is not None for own in routes],
        _flat([own for own in routes if own is not None]),
    )
    columns["samples"] = [
        (places[id(s.prompt_ids)], [getattr(s, name) for name in _SCALARS]) for s in samples
    ]
    columns["groups"] = [(n, g.group_id, len(g.samples), shape) for n, g, shape in groups]
    return pickle.dumps(columns, protocol=5)


def decode_groups(content: bytes) -> list[Numbered]:
    """Groups that another rank of this job has encoded."""
    if not content:
        return []
    columns = pickle.loads(content)
    prompts = _split(columns["prompts"])
    tokens = {name: _split(columns[name]) for name in _TOKENS}
    values: dict[str, list[Any]] = {}
    for name in OPTIONAL_TOKEN_VALUES:
        is_given, flat = columns[name]
        given = iter(_split(flat))
        values[name] = [next(given) if is_own else None for is_own in is_given]
    is_given, flat = columns["routes"]
    given = iter(_split(flat))
    values["routed_experts"] = [next(given) if is_own else None for is_own in is_given]
    samples = iter(
        Sample(
            prompt_ids=prompts[prompt],
            **dict(zip(_SCALARS, scalars)),
            **{name: column[i] for name, column in (tokens | values).items()},
        )
        for i, (prompt, scalars) in enumerate(columns["samples"])
    )
    return [
        (number, Group(group_id, tuple(next(samples) for _ in range(count))), shape)
        for number, group_id, count, shape in columns["groups"]
    ]


def _flat(tensors: Sequence[torch.Tensor]) -> tuple[Any, list[int]]:
    joined = torch.cat(list(tensors)).numpy() if tensors else None
    return joined, [len(tensor) for tensor in tensors]


def _split(flat: tuple[Any, list[int]]) -> list[torch.Tensor]:
    joined, lens = flat
    return [] if joined is None else list(torch.split(torch.from_numpy(joined), lens))
