"""Which groups keep their prefix resident, and in which wave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..cost import CostModel
from ..model import ResidentMode
from ..shape import GroupShape
from .bins import fill_bins
from .plan import PackPlan, RowPart, fill_rows, plan_rows, row_budget
from .split import split_group

ResidencyChoice = Literal["auto", "always", "never"]

# Work of a forward and of a backward pass.
_FORWARD, _BACKWARD = 1.0, 2.0
# With as many, a stage of S idles for (S - 1) / (5 S - 1) of a phase.
_PREFIX_ROWS_PER_STAGE = 4


@dataclass(frozen=True, kw_only=True)
class ResidencyConfig:
    """What becomes of groups that are larger than a row.

    Attributes:
        choice: "always" keeps the prefix of every such group resident, "never" repeats the prefix
            in every row, "auto" does what costs less and fits.
        mode: "retain" keeps the graph of the prefix rows until their backward pass, "recompute"
            runs their forward pass once more.
        max_resident_tokens: prefix tokens that are resident at once; more groups make more waves.
        num_stages: pipeline stages, whose idle time counts.

    Raises:
        ValueError: if a choice or mode is unknown, or a number is below 1.
    """

    choice: ResidencyChoice = "never"
    mode: ResidentMode = "retain"
    max_resident_tokens: int
    num_stages: int = 1

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("choice", self.choice, get_args(ResidencyChoice)),
            ("mode", self.mode, get_args(ResidentMode)),
        ):
            if value not in valid:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(valid)}")
        if self.max_resident_tokens < 1 or self.num_stages < 1:
            raise ValueError(
                f"max_resident_tokens={self.max_resident_tokens} and num_stages={self.num_stages} "
                "must be at least 1"
            )


def plan_waves(
    shapes: Sequence[GroupShape],
    max_tokens: int,
    residency: ResidencyConfig,
    *,
    members: Sequence[int] | None = None,
    cost_model: CostModel | None = None,
    pad_to_multiple: int = 1,
) -> list[PackPlan]:
    """Rows of at most ``max_tokens`` unique tokens, in waves that share resident prefixes.

    A group that fits into a row stands there whole. A larger one is divided; its prefix is repeated
    in every row or stands in a prefix row that the rows of its wave attend to. Deterministic.

    Args:
        shapes: all groups of the global batch, the same on every rank.
        max_tokens: budget of a row, and of a prefix row.
        residency: what may be resident.
        members: indices of the groups to be planned; None plans all.
        cost_model: as in ``plan_rows``.
        pad_to_multiple: as in ``plan_rows``.

    Returns:
        One plan a wave; a single one without prefix rows where nothing is resident.

    Raises:
        ValueError: if a sample fits in no way: names the sample or the prefix and the number that
            is too small.
    """
    cost_model = cost_model or CostModel()
    budget = row_budget(max_tokens, pad_to_multiple)
    indices = list(range(len(shapes)) if members is None else members)

    def repeated() -> list[PackPlan]:
        return [
            plan_rows(
                shapes,
                max_tokens,
                members=indices,
                cost_model=cost_model,
                pad_to_multiple=pad_to_multiple,
            )
        ]

    large = [g for g in indices if shapes[g].tree.unique_tokens > budget]
    if residency.choice == "never" or not large:
        return repeated()
    refusals = {g: _refusal(shapes[g], budget, residency) for g in large}
    resident = [g for g in large if refusals[g] is None]
    if residency.choice == "auto":
        # A group with a sample longer than a row has no other way.
        resident = [g for g in resident if _saves(shapes[g], budget, residency, cost_model)]
    for group in large:
        longest = int(shapes[group].tree.sample_lens.max())
        if group not in resident and (residency.choice == "always" or longest > budget):
            raise ValueError(refusals[group])
    if not resident:
        return repeated()
    waves = _make_waves(shapes, indices, resident, budget, residency, cost_model, pad_to_multiple)
    if residency.choice == "auto" and all(
        shapes[g].tree.sample_lens.max() <= budget for g in resident
    ):
        plain = repeated()
        if step_cost(plain, residency, cost_model) <= step_cost(waves, residency, cost_model):
            return plain
    return waves


def group_cost(
    shape: GroupShape,
    max_tokens: int,
    residency: ResidencyConfig,
    cost_model: CostModel,
    pad_to_multiple: int = 1,
) -> float:
    """Forward cost of a group in rows, with what is encoded once more where it is cut.

    The third part of forward and backward; of a group that fits in no way, as if it stood whole.

    Args:
        shape: of the group.
        max_tokens: as in ``plan_waves``.
        residency: as in ``plan_waves``.
        cost_model: as in ``plan_waves``.
        pad_to_multiple: as in ``plan_waves``.
    """
    budget = row_budget(max_tokens, pad_to_multiple)
    if shape.tree.unique_tokens <= budget:
        return shape.cost(cost_model)
    can_stay = residency.choice != "never" and _refusal(shape, budget, residency) is None
    ways = [_resident_cost(shape, budget, residency, cost_model)] if can_stay else []
    is_free = residency.choice != "always" or not can_stay
    if is_free and shape.tree.sample_lens.max() <= budget:
        ways.append(_cut_cost(shape, budget, cost_model))
    return min(ways, default=shape.cost(cost_model))


def step_cost(
    waves: Sequence[PackPlan], residency: ResidencyConfig, cost_model: CostModel
) -> float:
    """Time of a forward and backward pass over one rank's waves, in forward cost of one stage.

    Every phase of a wave fills and drains the pipeline: with S stages, rows of cost c_i take
    ``(sum(c_i) + (S - 1) max(c_i)) / S``.
    """

    def phase(costs: Sequence[float], factor: float) -> float:
        idle = (residency.num_stages - 1) * max(costs, default=0.0)
        return factor * (sum(costs) + idle) / residency.num_stages

    again = _FORWARD if residency.mode == "recompute" else 0.0
    return sum(
        phase(wave.row_costs(cost_model), _FORWARD + _BACKWARD)
        + phase(wave.prefix_costs(cost_model), _FORWARD)
        + phase(wave.prefix_costs(cost_model), again + _BACKWARD)
        for wave in waves
    )


def _refusal(shape: GroupShape, budget: int, residency: ResidencyConfig) -> str | None:
    """Why the prefix of a group cannot be resident, with the number to change; None if it can."""
    name, prefix = f"group {shape.group_id!r}", shape.resident_tokens
    if prefix == 0:
        return (
            f"{name} has more tokens than a row ({shape.tree.unique_tokens} > {budget}) and no "
            "untrained prefix that could be resident; raise max_tokens"
        )
    if prefix > budget:
        return f"the prefix of {name} has {prefix} tokens, a row holds {budget}; raise max_tokens"
    if prefix > residency.max_resident_tokens:
        return (
            f"the prefix of {name} has {prefix} tokens, max_resident_tokens="
            f"{residency.max_resident_tokens} are resident at once; raise max_resident_tokens"
        )
    longest = int(shape.suffixes.tree.sample_lens.max())
    if longest > budget:
        sample = int(shape.suffixes.tree.sample_lens.argmax())
        return (
            f"sample {sample} of {name} has {longest} tokens after its prefix, a row holds "
            f"{budget}; raise max_tokens or truncate the response"
        )
    return None


def _saves(
    shape: GroupShape, budget: int, residency: ResidencyConfig, cost_model: CostModel
) -> bool:
    """Whether a resident prefix costs less than repeating it, idle time left out."""
    if shape.tree.sample_lens.max() > budget:
        return True
    resident = _resident_cost(shape, budget, residency, cost_model)
    return resident < _cut_cost(shape, budget, cost_model)


def _cut_cost(shape: GroupShape, budget: int, cost_model: CostModel) -> float:
    """Forward cost of the parts of a group."""
    return sum(shape.cost(cost_model, part) for part in split_group(shape, budget))


def _resident_cost(
    shape: GroupShape, budget: int, residency: ResidencyConfig, cost_model: CostModel
) -> float:
    """The same with its prefix resident; a second forward pass is shared out."""
    again = _FORWARD if residency.mode == "recompute" else 0.0
    once = cost_model.estimate(shape.prefixes) * (1 + again / (_FORWARD + _BACKWARD))
    return once + _cut_cost(shape.suffixes, budget, cost_model)


def _prefix_budget(lens: Sequence[int], budget: int, residency: ResidencyConfig) -> int:
    """Tokens of a prefix row: idle stages wait for the longest, so a few rows for each stage."""
    if residency.num_stages == 1:
        return budget
    share = -(-sum(lens) // (_PREFIX_ROWS_PER_STAGE * residency.num_stages))
    return min(budget, max(share, *lens))


def _make_waves(
    shapes: Sequence[GroupShape],
    members: Sequence[int],
    resident: Sequence[int],
    budget: int,
    residency: ResidencyConfig,
    cost_model: CostModel,
    pad_to_multiple: int,
) -> list[PackPlan]:
    """The first wave also runs what needs no resident prefix."""
    others = [
        RowPart(group, samples)
        for group in members
        if group not in set(resident)
        for samples in split_group(shapes[group], budget)
    ]
    lens = [shapes[group].resident_tokens for group in resident]
    waves: list[PackPlan] = []
    for places in fill_bins(lens, residency.max_resident_tokens):
        groups = sorted(resident[i] for i in places)
        prefix_lens = [shapes[g].resident_tokens for g in groups]
        prefix_bins = fill_bins(prefix_lens, _prefix_budget(prefix_lens, budget, residency))
        parts = [
            RowPart(group, samples, is_resident=True)
            for group in groups
            for samples in split_group(shapes[group].suffixes, budget)
        ]
        if not waves:
            parts += others
        waves.append(
            PackPlan(
                tuple(shapes),
                fill_rows(shapes, parts, budget, cost_model),
                pad_to_multiple,
                tuple(sorted(tuple(sorted(groups[i] for i in row)) for row in prefix_bins)),
            )
        )
    return waves
