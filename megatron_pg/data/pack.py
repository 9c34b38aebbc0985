"""Microbatches: the planned rows with their tokens and training values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..tree import PackedLayout
from .cost import CostModel
from .planning import PackPlan, RowPart, plan_rows
from .routes import pack_routes
from .rows import Microbatch, PackedRow, PrefixRow, TokenValues, Wave
from .shape import GroupShape, group_shape
from .types import OPTIONAL_TOKEN_VALUES, Group, Sample

Groups = Sequence[Group] | Mapping[int, Group]


def pack_groups(
    groups: Sequence[Group],
    max_tokens: int,
    *,
    members: Sequence[int] | None = None,
    sample_weights: Tensor | None = None,
    advantages: Tensor | None = None,
    min_shared: int | None = None,
    cost_model: CostModel | None = None,
    pad_to_multiple: int = 1,
    pad_id: int = 0,
) -> list[Microbatch]:
    """Microbatches of at most ``max_tokens`` unique tokens that train ``groups``.

    Equals ``plan_rows`` on the groups' shapes, then ``make_microbatches``. Every sample stands in
    exactly one row; a group that fits into one row is not divided; groups never share tokens with
    each other, equal prompts or not.

    Args:
        groups: the global batch.
        max_tokens: budget of a row in unique tokens, padding included.
        members: indices of the groups to be packed (one list of ``balance_groups``); None packs
            all. Places in the global batch do not depend on it.
        sample_weights: ``[N]`` share of each trained token of a sample in the global loss, for all
            N samples of the global batch in group order; None is the token mean, one over the
            number of trained tokens of the global batch.
        advantages: ``[N]`` scalar per sample; None takes the samples' own.
        min_shared: as in ``group_tree``: None shares exactly the prompt, an integer every run of at
            least that many tokens.
        cost_model: evens out the rows; the default model when None.
        pad_to_multiple: every row's length becomes a multiple of this.
        pad_id: token written on padding.

    Raises:
        ValueError: if one sample exceeds the budget, on missing advantages, if some samples have a
            kind of logprobs and others do not, if they have loss weights and ``sample_weights`` is
            None, or if a tensor does not have N entries.
    """
    shapes = [group_shape(group, min_shared) for group in groups]
    plan = plan_rows(
        shapes,
        max_tokens,
        members=members,
        cost_model=cost_model,
        pad_to_multiple=pad_to_multiple,
    )
    return make_microbatches(
        plan, groups, sample_weights=sample_weights, advantages=advantages, pad_id=pad_id
    )


def make_microbatches(
    plan: PackPlan,
    groups: Groups,
    *,
    sample_weights: Tensor | None = None,
    advantages: Tensor | None = None,
    pad_id: int = 0,
) -> list[Microbatch]:
    """All rows of ``plan`` with what the loss reads, see ``pack_groups``.

    Args:
        plan: rows of one rank.
        groups: by index in the global batch; a mapping may hold only the groups of the plan.
        sample_weights: ``[N]``, as in ``pack_groups``.
        advantages: ``[N]``, as in ``pack_groups``.
        pad_id: token written on padding.

    Raises:
        ValueError: as ``pack_groups``.
    """
    held = groups if isinstance(groups, Mapping) else dict(enumerate(groups))
    values = token_values(plan.shapes, held, sample_weights=sample_weights, advantages=advantages)
    if values.advantages is None:
        if plan.loss_tokens:
            raise ValueError(
                "the samples carry no advantages; pass advantages=, one number per sample of the "
                "global batch"
            )
        values = replace(values, advantages=torch.zeros_like(values.weights))
    return [row.with_values(values) for row in make_wave(plan, groups, pad_id).microbatches]


def make_wave(plan: PackPlan, groups: Groups, pad_id: int = 0) -> Wave:
    """All rows of ``plan``, with the prefix rows that they attend to.

    Args:
        plan: rows of one rank.
        groups: by index in the planned batch; a mapping may hold only the groups of the plan.
        pad_id: token written on padding.
    """
    prefix_rows = [_build_prefix_row(plan, i, groups, pad_id) for i in range(len(plan.prefix_rows))]
    rows = [_build_row(plan, row, groups, pad_id) for row in range(len(plan.rows))]
    return Wave(tuple(prefix_rows), tuple(rows))


def token_values(
    shapes: Sequence[GroupShape],
    groups: Mapping[int, Group],
    *,
    sample_weights: Tensor | None = None,
    advantages: Tensor | None = None,
    carried: Sequence[str] | None = None,
) -> TokenValues:
    """The values of every trained token of a batch, as the samples carry them.

    Args:
        shapes: all groups of the batch.
        groups: by index; the tokens of a group that is not held keep zeros.
        sample_weights: ``[num_samples]``; None is the token mean of the batch.
        advantages: ``[num_samples]`` scalars; None takes the samples' own, if they have some.
        carried: names of the samples' own values, where more groups than these decide which there
            are; None takes those that all samples with trained tokens have.

    Raises:
        ValueError: if some samples have a kind of values and others do not, if they have loss
            weights and ``sample_weights`` is None, or if a tensor does not have one entry per
            sample.
    """
    counts = torch.from_numpy(
        np.concatenate([np.empty(0, np.int64), *(shape.loss_lens for shape in shapes)])
    )
    num_tokens = int(counts.sum())
    weights = _per_sample("sample_weights", sample_weights, len(counts))
    given = carried_fields(groups.values()) if carried is None else carried
    if weights is None:
        if "loss_weight" in given:
            raise ValueError(
                "the samples carry loss_weight, which the token mean would ignore; pass "
                "sample_weights=loss.aggregation_weights(..., loss_weights=...)"
            )
        weights = torch.full((len(counts),), 1 / max(num_tokens, 1), dtype=torch.float64)
    scalars = _per_sample("advantages", advantages, len(counts))
    own = {
        name: torch.zeros(num_tokens, dtype=torch.float64)
        for name in given
        if name in OPTIONAL_TOKEN_VALUES
    }
    if scalars is not None:
        own["advantages"] = torch.repeat_interleave(scalars, counts)
    offsets = np.cumsum([0] + [shape.loss_tokens for shape in shapes])
    for index, group in groups.items():
        for name in own.keys() - ({"advantages"} if scalars is not None else set()):
            own[name][offsets[index] : offsets[index + 1]] = _trained_values(group.samples, name)
    return TokenValues(weights=torch.repeat_interleave(weights, counts), **own)


def carried_fields(groups: Iterable[Group]) -> tuple[str, ...]:
    """Names of the optional values that all samples with trained tokens carry.

    Those of ``TokenValues`` besides ``weights``, "loss_weight" and "routed_experts".

    Raises:
        ValueError: when some of them carry one and others do not; names two of them.
    """
    names = (*OPTIONAL_TOKEN_VALUES, "loss_weight", "routed_experts")
    first: tuple[str, int, dict[str, bool]] | None = None
    for group in groups:
        for i, sample in enumerate(group.samples):
            if not sample.num_loss_tokens:
                continue
            has = {name: getattr(sample, name) is not None for name in names}
            first = first or (group.group_id, i, has)
            for name in names:
                if has[name] != first[2][name]:
                    one, other = ("has", "has not") if has[name] else ("has no", "has")
                    raise ValueError(
                        f"sample {i} of group {group.group_id!r} {one} {name}, sample {first[1]} "
                        f"of group {first[0]!r} {other}; give them for all samples or for none"
                    )
    return tuple(name for name in names if first and first[2][name])


def _per_sample(name: str, values: Tensor | None, num_samples: int) -> Tensor | None:
    if values is None:
        return None
    if values.shape != (num_samples,):
        raise ValueError(
            f"{name} has shape {tuple(values.shape)}, the global batch has {num_samples} samples; "
            "give one number per sample, in group order"
        )
    return values.detach().to("cpu", torch.float64)


def _build_row(plan: PackPlan, row: int, groups: Groups, pad_id: int) -> PackedRow:
    layout, parts = plan.row_layout(row), plan.rows[row]
    samples = [groups[part.group].samples[i] for part in parts for i in part.samples]
    if not samples:
        return _build_filler(layout, pad_id)
    places = [int(plan.sample_offsets[p.group]) + i for p in parts for i in p.samples]
    # What stands in the row of every sample: all of it, or what follows its resident prefix.
    starts = [_first_token(plan, part, i) for part in parts for i in part.samples]
    tokens = layout.pack_tokens([s.tokens[start:] for s, start in zip(samples, starts)], pad_id)
    masks = [_logical_mask(s)[start:] for s, start in zip(samples, starts)]
    packed, prediction_ids = torch.unique(
        layout.logical_to_packed[torch.cat(masks)], return_inverse=True
    )
    counts = torch.tensor([sample.num_loss_tokens for sample in samples])
    sample_ids = torch.repeat_interleave(counts)
    # Place of a token in its sample, after those of the samples before it in the batch.
    firsts = torch.from_numpy(plan.loss_offsets[places]) - (counts.cumsum(0) - counts)
    return PackedRow(
        tokens=tokens,
        layout=layout,
        sample_numbers=torch.tensor(places),
        predictor_ids=layout.predictor_of[packed],
        target_ids=packed,
        prediction_ids=prediction_ids,
        sample_ids=sample_ids,
        token_numbers=firsts[sample_ids] + torch.arange(len(sample_ids)),
        routed_experts=pack_routes(layout, _routes(samples, starts)),
    )


def _routes(samples: Sequence[Sample], starts: Sequence[int]) -> list[Tensor | None]:
    """Routes of the tokens from ``starts`` on."""
    given = [sample.routed_experts for sample in samples]
    return [None if own is None else own[start:] for own, start in zip(given, starts)]


def _trained_values(samples: Sequence[Sample], name: str) -> Tensor:
    parts = [
        getattr(sample, name)[sample.loss_mask] for sample in samples if sample.num_loss_tokens
    ]
    return torch.cat(parts).double() if parts else torch.empty(0, dtype=torch.float64)


def _first_token(plan: PackPlan, part: RowPart, sample: int) -> int:
    shape = plan.shapes[part.group]
    return int(shape.resident_lens[shape.sample_roots[sample]]) if part.is_resident else 0


def _build_prefix_row(plan: PackPlan, number: int, groups: Groups, pad_id: int) -> PrefixRow:
    layout, prefixes = plan.prefix_layout(number), []
    counts: list[int] = []
    routes: list[Tensor | None] = []
    for group in plan.prefix_rows[number]:
        shape = plan.shapes[group]
        roots, samples, continued = np.unique(
            shape.sample_roots, return_index=True, return_counts=True
        )
        for root, sample, count in zip(roots, samples, continued):
            if length := int(shape.resident_lens[root]):
                own = groups[group].samples[int(sample)]
                prefixes.append(own.tokens[:length])
                counts.append(int(count))
                known = own.routed_experts
                routes.append(None if known is None else known[:length])
    if not prefixes:
        return PrefixRow(torch.full((layout.total_tokens,), pad_id), layout, sample_counts=(0,))
    tokens = layout.pack_tokens(prefixes, pad_id)
    return PrefixRow(
        tokens, layout, sample_counts=tuple(counts), routed_experts=pack_routes(layout, routes)
    )


def _build_filler(layout: PackedLayout, pad_id: int) -> PackedRow:
    """A valid row that trains nothing."""
    nothing = torch.empty(0, dtype=torch.int64)
    return PackedRow(
        tokens=torch.full((layout.total_tokens,), pad_id),
        layout=layout,
        sample_numbers=torch.tensor([-1]),
        predictor_ids=nothing,
        target_ids=nothing,
        prediction_ids=nothing,
        sample_ids=nothing,
        token_numbers=nothing,
    )


def _logical_mask(sample: Sample) -> Tensor:
    """``[P + R]`` bool: the loss mask, with the prompt untrained."""
    return torch.cat([sample.loss_mask.new_zeros(len(sample.prompt_ids)), sample.loss_mask])
