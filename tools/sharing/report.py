"""The arithmetic of ``plan_sharing``: from lengths to reuse, time, memory and a token budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from megatron_pg import PrefixTree, pack_trees
from megatron_pg.data import (
    CARDS,
    FORWARD_BACKWARD,
    Group,
    GroupShape,
    PackPlan,
    ResidencyConfig,
    StepWork,
    group_shape,
    part_tree,
    plan_waves,
    predict_step,
    product_flops_on,
    row_budget,
    with_rows_for_stages,
    without_routes,
)
from tools.flops import packed_flops, written_out_flops
from tools.sharing.budget import recommend_max_tokens
from tools.sharing.dims import ModelDims
from tools.sharing.memory import RESIDENT_MODE, stage_memory
from tools.sharing.rollouts import rollout_report, summary
from tools.sharing.settings import Settings, raise_problems, setting_problems

# Below this a group's own gain is within the noise of a step.
PAYS_FROM = 1.03


@dataclass(frozen=True)
class GroupReport:
    """One group on its own.

    Attributes:
        prompt_lens, response_lens: of every sample.
        trained: of every sample, which tokens of the tree it trains.
    """

    prompt_lens: tuple[int, ...]
    response_lens: tuple[int, ...]
    shape: GroupShape
    trained: tuple[Tensor, ...]

    @property
    def group_id(self) -> str:
        return self.shape.group_id

    @property
    def tree(self) -> PrefixTree:
        return self.shape.tree

    def predicted_tokens(self, samples: Iterable[int]) -> int:
        """Distinct trained tokens: what several of ``samples`` train is predicted once in a row."""
        is_trained = np.zeros(self.tree.unique_tokens, dtype=bool)
        for sample in samples:
            is_trained[self.trained[sample].numpy()] = True
        return int(is_trained.sum())

    def ratio(self, dims: ModelDims) -> float:
        """Predicted step-time ratio of the group in a row of its own."""
        predicted = self.predicted_tokens(range(self.tree.num_samples))
        cost, loss_tokens = dims.cost_model, self.shape.loss_tokens
        packed = packed_flops(self.tree, predicted, cost, FORWARD_BACKWARD)
        return written_out_flops(self.tree, loss_tokens, cost, FORWARD_BACKWARD) / packed


def make_report(groups: Sequence[Group], dims: ModelDims, settings: Settings) -> dict[str, Any]:
    """Everything that the command prints, as plain values.

    ``rollouts`` is described by ``rollout_report``, ``memory`` by ``stage_memory``. Tokens and
    attention pairs are ``unique`` after sharing and ``logical`` written out; ``group_ratios`` and
    ``predicted_step_time_ratio`` are predicted times written out over packed. ``split_tokens`` are
    encoded once more where recorded routes are replayed, which ``unique_tokens`` then holds.
    ``predicted_seconds`` are those of one forward and backward pass and update on the card, by what
    takes them (``StepTime``), all data-parallel ranks but one left out.

    Raises:
        ValueError: if the settings cannot be, all problems in one error.
    """
    raise_problems([*setting_problems(settings, dims), *_too_long(groups, dims)])
    split_tokens = sum(group_shape(group, settings.min_shared).split_tokens for group in groups)
    reports = [_report_group(group, settings) for group in groups]
    trees = [report.tree for report in reports]
    recommended = recommend_max_tokens(trees, dims, settings)
    max_tokens = recommended if settings.max_tokens is None else settings.max_tokens
    unfit = [f for r in reports if (f := _why_unfit(r, dims, max_tokens, settings)) is not None]
    too_long = {f["group_id"] for f in unfit if f["parts"] is None}
    kept = [r for r in reports if r.group_id not in too_long]
    packed, logical, waves = _step_flops(kept, dims, max_tokens, settings)
    pair_sums = [
        sum(t.attention_pairs for t in trees),
        sum(t.logical_attention_pairs for t in trees),
    ]
    unique, written = (sum(t.unique_tokens for t in trees), sum(t.logical_tokens for t in trees))
    ratio = logical / packed if packed else 1.0
    group_ratios = {r.group_id: r.ratio(dims) for r in reports}
    values = asdict(settings)
    return {
        "model": asdict(dims),
        "settings": values.pop("sizes") | values,
        "groups": len(groups),
        "samples": sum(tree.num_samples for tree in trees),
        "group_size": summary(tree.num_samples for tree in trees),
        "prompt_len": summary(n for r in reports for n in r.prompt_lens),
        "response_len": summary(n for r in reports for n in r.response_lens),
        "rollouts": rollout_report(groups, trees),
        "depth": max(tree.depth for tree in trees),
        "unique_tokens": unique,
        "logical_tokens": written,
        "reuse_ratio": written / unique,
        "split_tokens": split_tokens,
        "attention_pairs": pair_sums[0],
        "logical_attention_pairs": pair_sums[1],
        "step_flops": {"packed": packed, "written_out": logical},
        "predicted_step_time_ratio": ratio,
        "predicted_seconds": _step_seconds(kept, dims, waves, settings),
        "recommended_max_tokens": recommended,
        "max_tokens": max_tokens,
        "row_budget": row_budget(max_tokens, settings.sizes.row_multiple),
        "rows": sum(len(wave.rows) + len(wave.prefix_rows) for wave in waves),
        "memory": stage_memory(waves, dims, settings),
        "does_not_fit": unfit,
        "does_not_pay": [name for name, r in group_ratios.items() if r < PAYS_FROM],
        "pays": ratio >= PAYS_FROM and dims.training_refusal is None,
        "training_refuses": dims.training_refusal,
        "group_ratios": group_ratios,
        "group_reuse": [t.logical_tokens / t.unique_tokens for t in trees],
    }


def predict_at(
    groups: Sequence[Group], dims: ModelDims, settings: Settings, budgets: Sequence[int]
) -> list[float | None]:
    """Predicted step-time ratio for every token budget; None where a sample does not fit.

    Raises:
        ValueError: as ``make_report`` does.
    """
    raise_problems(setting_problems(settings, dims))
    reports = [_report_group(group, settings) for group in groups]
    ratios: list[float | None] = []
    for budget in budgets:
        try:
            packed, logical, _ = _step_flops(reports, dims, budget, settings)
        except ValueError:
            ratios.append(None)
        else:
            ratios.append(logical / packed)
    return ratios


def _too_long(groups: Sequence[Group], dims: ModelDims) -> Iterator[str]:
    lens = {group.group_id: max(len(s.tokens) for s in group.samples) for group in groups}
    longest = max(lens, key=lambda name: lens[name])
    if dims.max_positions is not None and lens[longest] > dims.max_positions:
        yield (
            f"group {longest!r} has a sample of {lens[longest]} tokens, the model was made for "
            f"max_position_embeddings={dims.max_positions}: training refuses it; shorten it, or "
            "raise max_position_embeddings in a copy of the model's config to train beyond that"
        )


def _report_group(group: Group, settings: Settings) -> GroupReport:
    shared = group if settings.replays_routes else without_routes(group)
    shape, samples = group_shape(shared, settings.min_shared), group.samples
    places = pack_trees([shape.tree]).logical_to_packed.split([len(s.tokens) for s in samples])
    return GroupReport(
        prompt_lens=tuple(len(s.prompt_ids) for s in samples),
        response_lens=tuple(len(s.response_ids) for s in samples),
        shape=shape,
        trained=tuple(p[len(s.prompt_ids) :][s.loss_mask] for p, s in zip(places, samples)),
    )


def _plan_rows(
    shapes: Sequence[GroupShape], dims: ModelDims, max_tokens: int, settings: Settings
) -> list[PackPlan]:
    """The recipe's own plan of one step on one data-parallel rank, with its defaults."""
    residency = ResidencyConfig(
        choice="auto",
        mode=RESIDENT_MODE,
        max_resident_tokens=max_tokens,
        num_stages=settings.sizes.pp,
    )
    cost_model = product_flops_on(CARDS[settings.card], dims.cost_model)
    waves = plan_waves(
        shapes,
        max_tokens,
        residency,
        cost_model=cost_model,
        pad_to_multiple=settings.sizes.row_multiple,
    )
    return [with_rows_for_stages(wave, settings.sizes.pp, cost_model) for wave in waves]


def _step_flops(
    reports: Sequence[GroupReport], dims: ModelDims, max_tokens: int, settings: Settings
) -> tuple[float, float, list[PackPlan]]:
    """FLOPs packed into rows of the budget and written out, and the waves of rows."""
    if not reports:
        return 0.0, 0.0, []
    shapes = [report.shape for report in reports]
    cost, packed = dims.cost_model, 0.0
    waves = _plan_rows(shapes, dims, max_tokens, settings)
    for wave in waves:
        for row in wave.rows:
            for part in row:
                predicted = reports[part.group].predicted_tokens(part.samples)
                packed += packed_flops(part_tree(shapes, part), predicted, cost, FORWARD_BACKWARD)
        for groups in wave.prefix_rows:
            for group in groups:
                packed += packed_flops(shapes[group].prefixes, 0, cost, FORWARD_BACKWARD)
    logical = sum(written_out_flops(s.tree, s.loss_tokens, cost, FORWARD_BACKWARD) for s in shapes)
    return packed, logical, waves


def _step_seconds(
    reports: Sequence[GroupReport],
    dims: ModelDims,
    waves: Sequence[PackPlan],
    settings: Settings,
) -> dict[str, float]:
    """Of the packed rows on a card, by what takes them, and in total."""
    sizes, cost = settings.sizes, dims.cost_model
    work = StepWork.of_waves(
        waves,
        cost,
        dims.attention,
        lambda part: reports[part.group].predicted_tokens(part.samples),
    )
    time = predict_step(
        work,
        CARDS[settings.card],
        cost=cost,
        hidden_size=dims.hidden_size,
        vocab_size=dims.vocab_size,
        num_layers=dims.num_layers,
        optimizer_parameters=dims.num_parameters / (sizes.tp * sizes.pp),
        passes=FORWARD_BACKWARD,
        tp_size=sizes.tp,
        sequence_parallel=sizes.sp,
        pp_size=sizes.pp,
        cp_size=sizes.cp,
        exchanged_values=dims.exchanged_values(sizes),
        num_attention_layers=dims.num_attention_layers,
        num_parts=dims.num_parts,
    )
    return asdict(time) | {"total": time.total}


def _why_unfit(
    report: GroupReport, dims: ModelDims, max_tokens: int, settings: Settings
) -> dict[str, Any] | None:
    """What would be done with a group that exceeds the budget; None when it fits."""
    unique = report.tree.unique_tokens
    if unique <= row_budget(max_tokens, settings.sizes.row_multiple):
        return None
    fields = {"group_id": report.group_id, "unique_tokens": unique}
    try:
        (wave,) = _plan_rows([report.shape], dims, max_tokens, settings)
    except ValueError as error:
        return {**fields, "parts": None, "repeated_tokens": None, "action": str(error)}
    trees = [part_tree(wave.shapes, part) for row in wave.rows for part in row]
    encoded, why = sum(tree.unique_tokens for tree in trees), "which repeat what they share"
    if wave.prefix_rows:
        encoded += report.shape.resident_tokens
        why = f"beside {report.shape.resident_tokens} resident tokens of its prompt"
    return {
        **fields,
        "parts": len(wave.rows),
        "repeated_tokens": encoded - unique,
        "action": f"divided into {len(wave.rows)} rows, {why}",
    }
