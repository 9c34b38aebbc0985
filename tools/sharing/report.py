"""The arithmetic of ``plan_sharing``: from lengths to reuse, time, memory and a token budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_pg import PrefixTree
from megatron_pg.data import (
    Group,
    GroupShape,
    PackPlan,
    ResidencyConfig,
    group_shape,
    part_tree,
    plan_waves,
)
from tools.flops import FORWARD_BACKWARD, packed_flops, written_out_flops
from tools.sharing.model import ModelDims

# Below this a group's own gain is within the noise of a step.
PAYS_FROM = 1.03
# Of resident prompts, as it is when nothing is said.
_MODE = ResidencyConfig.mode


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the step would be run.

    Attributes:
        tp, pp: parallel sizes.
        max_tokens: budget of a row; the recommended one when None.
        min_shared: share every run of at least that many tokens; None shares the prompt.
        bytes_per_value: of activations, 2 for bf16.
        activation_gib: memory of one rank for activations, when known.
    """

    tp: int = 1
    pp: int = 1
    max_tokens: int | None = None
    min_shared: int | None = None
    bytes_per_value: int = 2
    activation_gib: float | None = None


@dataclass(frozen=True)
class GroupReport:
    """One group on its own."""

    group_id: str
    prompt_len: int
    response_lens: tuple[int, ...]
    shape: GroupShape
    predicted_tokens: float
    ratio: float

    @property
    def tree(self) -> PrefixTree:
        return self.shape.tree


def make_report(groups: Sequence[Group], dims: ModelDims, settings: Settings) -> dict[str, Any]:
    """Everything that the command prints, as plain values.

    Raises:
        ValueError: if layers do not divide into pipeline stages.
    """
    if dims.num_layers % settings.pp:
        raise ValueError(f"{dims.num_layers} layers do not divide into pp={settings.pp} stages")
    reports = [_report_group(group, dims, settings) for group in groups]
    trees = [report.tree for report in reports]
    recommended = _recommend_max_tokens(trees, dims, settings)
    max_tokens = settings.max_tokens or recommended
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
    return {
        "model": asdict(dims),
        "settings": asdict(settings),
        "groups": len(groups),
        "samples": sum(tree.num_samples for tree in trees),
        "group_size": _summary(tree.num_samples for tree in trees),
        "prompt_len": _summary(r.prompt_len for r in reports),
        "response_len": _summary(n for r in reports for n in r.response_lens),
        "depth": max(tree.depth for tree in trees),
        "unique_tokens": unique,
        "logical_tokens": written,
        "reuse_ratio": written / unique,
        "attention_pairs": pair_sums[0],
        "logical_attention_pairs": pair_sums[1],
        "step_flops": {"packed": packed, "written_out": logical},
        "predicted_step_time_ratio": ratio,
        "recommended_max_tokens": recommended,
        "max_tokens": max_tokens,
        "rows": sum(len(wave.rows) + len(wave.prefix_rows) for wave in waves),
        "memory": _memory(waves, written / unique, dims, settings),
        "does_not_fit": unfit,
        "does_not_pay": [r.group_id for r in reports if r.ratio < PAYS_FROM],
        "pays": ratio >= PAYS_FROM,
        "group_ratios": {r.group_id: r.ratio for r in reports},
        "group_reuse": [t.logical_tokens / t.unique_tokens for t in trees],
    }


def predict_at(
    groups: Sequence[Group], dims: ModelDims, settings: Settings, budgets: Sequence[int]
) -> list[float | None]:
    """Predicted step-time ratio for every token budget; None where a sample does not fit."""
    reports = [_report_group(group, dims, settings) for group in groups]
    ratios: list[float | None] = []
    for budget in budgets:
        try:
            packed, logical, _ = _step_flops(reports, dims, budget, settings)
        except ValueError:
            ratios.append(None)
        else:
            ratios.append(logical / packed)
    return ratios


def _report_group(group: Group, dims: ModelDims, settings: Settings) -> GroupReport:
    shape = group_shape(group, settings.min_shared)
    prompt_len = min(len(sample.prompt_ids) for sample in group.samples)
    predicted = shape.loss_tokens * _distinct_share(shape.tree, prompt_len)
    cost = dims.cost_model
    packed = packed_flops(shape.tree, predicted, cost, FORWARD_BACKWARD)
    logical = written_out_flops(shape.tree, shape.loss_tokens, cost, FORWARD_BACKWARD)
    lens = tuple(len(sample.response_ids) for sample in group.samples)
    return GroupReport(group.group_id, prompt_len, lens, shape, predicted, logical / packed)


def _distinct_share(tree: PrefixTree, prompt_len: int) -> float:
    """Distinct response tokens over response tokens of all samples."""
    ends = tree.segment_positions + tree.segment_lens
    lens = np.clip(ends - np.maximum(tree.segment_positions, prompt_len), 0, None)
    return float(lens.sum() / max((lens * tree.segment_multiplicity).sum(), 1))


def _plan_rows(
    shapes: Sequence[GroupShape], dims: ModelDims, max_tokens: int, settings: Settings
) -> list[PackPlan]:
    """The recipe's own plan of one step on one data-parallel rank, with its defaults."""
    residency = ResidencyConfig(
        choice="auto", mode=_MODE, max_resident_tokens=max_tokens, num_stages=settings.pp
    )
    return plan_waves(
        shapes, max_tokens, residency, cost_model=dims.cost_model, pad_to_multiple=settings.tp
    )


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
                tree = part_tree(shapes, part)
                trained = int(shapes[part.group].loss_lens[list(part.samples)].sum())
                predicted = trained * _distinct_share(tree, reports[part.group].prompt_len)
                packed += packed_flops(tree, predicted, cost, FORWARD_BACKWARD)
        for groups in wave.prefix_rows:
            for group in groups:
                packed += packed_flops(shapes[group].prefixes, 0, cost, FORWARD_BACKWARD)
    logical = sum(written_out_flops(s.tree, s.loss_tokens, cost, FORWARD_BACKWARD) for s in shapes)
    return packed, logical, waves


def _recommend_max_tokens(trees: Sequence[PrefixTree], dims: ModelDims, settings: Settings) -> int:
    """Room for the largest group, or what the memory holds where that is less."""
    largest = max(tree.unique_tokens for tree in trees)
    budget = -(-largest // 1024) * 1024
    if settings.activation_gib is not None:
        memory = dims.memory_model(settings.bytes_per_value, settings.tp)
        # The first pipeline stage keeps one row for every stage.
        held = _tokens_held(memory.activations * settings.pp, dims, settings)
        if held < largest:
            # Groups are divided, and prompts of up to one row's tokens are resident beside them.
            resident = memory.resident(_MODE)
            held = _tokens_held(memory.activations * settings.pp + resident, dims, settings)
        budget = min(budget, held)
    return -(-budget // settings.tp) * settings.tp


def _tokens_held(bytes_per_layer: int, dims: ModelDims, settings: Settings) -> int:
    """Tokens of a row that the memory holds, at so many bytes for each in one layer."""
    assert settings.activation_gib is not None
    layers = dims.num_layers // settings.pp
    held = int(settings.activation_gib * 2**30 / (bytes_per_layer * layers))
    return max(held // settings.tp * settings.tp, settings.tp)


def _why_unfit(
    report: GroupReport, dims: ModelDims, max_tokens: int, settings: Settings
) -> dict[str, Any] | None:
    """What would be done with a group that exceeds the budget; None when it fits."""
    unique = report.tree.unique_tokens
    if unique <= max_tokens:
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


def _memory(
    waves: Sequence[PackPlan], reuse_ratio: float, dims: ModelDims, settings: Settings
) -> list[dict[str, Any]]:
    """Peak of every pipeline stage under 1F1B, in the wave that takes most; no recompute."""
    memory = dims.memory_model(settings.bytes_per_value, settings.tp)
    layers = dims.num_layers // settings.pp
    stages = []
    for stage in range(settings.pp):
        peaks = []
        for wave in waves:
            lens = [wave.row_layout(number).total_tokens for number in range(len(wave.rows))]
            in_flight = min(settings.pp - stage, len(lens))
            tokens = in_flight * max(lens, default=0)
            resident = wave.prefix_tokens * layers * memory.resident(_MODE)
            total = tokens * layers * memory.activations + resident
            peaks.append((total, in_flight, tokens, resident))
        _, in_flight, tokens, resident = max(peaks, default=(0, 1, 0, 0))
        activation = tokens * layers * memory.activations
        stages.append(
            {
                "stage": stage,
                "rows_in_flight": in_flight,
                "activation_bytes": activation,
                "resident_bytes": resident,
                "written_out_activation_bytes": int(activation * reuse_ratio),
                "kv_bytes": tokens * layers * memory.kv,
            }
        )
    return stages


def _summary(values: Iterable[int]) -> dict[str, float]:
    array = np.array(list(values))
    return {
        "min": int(array.min()),
        "median": float(np.median(array)),
        "mean": float(array.mean()),
        "max": int(array.max()),
    }
