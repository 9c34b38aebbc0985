"""How many rows keep the stages of a pipeline busy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

import numpy as np

from ..cost import CostModel
from ..shape import GroupShape
from .balance import halve_row
from .plan import PackPlan, Row, RowPart, in_order, part_shape, part_tokens, row_cost

# Kernels over fewer tokens leave a part of a card idle, which no cost counts.
_LEAST_TOKENS = 4096
# Beyond as many a stage, less than a sixteenth of the stages' time is idle.
_MOST_ROWS_PER_STAGE = 16


def with_rows_for_stages(plan: PackPlan, num_stages: int, cost_model: CostModel) -> PackPlan:
    """The plan with its dearest rows divided while that makes the pass over all stages shorter.

    With S stages, rows of cost c_i take ``(sum(c_i) + (S - 1) max(c_i)) / S`` (see ``step_cost``).
    A row of several parts is divided between them, which repeats nothing; a row of one part between
    its samples, which repeats what they share. Rows of fewer than 8,192 tokens stay.

    Args:
        plan: of one rank; fillers are kept.
        num_stages: of the pipeline.
        cost_model: of a row.
    """
    heap = [(-row_cost(plan.shapes, row, cost_model), row) for row in plan.rows if row]
    if num_stages == 1 or not heap:
        return plan
    heapify(heap)
    total, best, count = -sum(cost for cost, _ in heap), list(heap), len(heap)
    least = total + (num_stages - 1) * -heap[0][0]
    while len(heap) < _MOST_ROWS_PER_STAGE * num_stages:
        halves = _halves(plan.shapes, heap[0][1], cost_model)
        if halves is None:
            break
        total += heappop(heap)[0]
        for half in halves:
            cost = row_cost(plan.shapes, half, cost_model)
            total += cost
            heappush(heap, (-cost, half))
        if (time := total + (num_stages - 1) * -heap[0][0]) < least:
            least, best = time, list(heap)
    if len(best) == count:
        return plan
    rows = in_order([row for _, row in best], [-cost for cost, _ in best])
    return replace(plan, rows=rows + ((),) * plan.num_fillers)


def _halves(
    shapes: Sequence[GroupShape], row: Row, cost_model: CostModel
) -> tuple[Row, Row] | None:
    """Of a dear row; None where it is one sample or would become too short."""
    if sum(part_tokens(shapes, part) for part in row) < 2 * _LEAST_TOKENS:
        return None
    if len(row) > 1:
        return halve_row(shapes, row, cost_model)
    return _halve_part(shapes, row[0]) if len(row[0].samples) > 1 else None


def _halve_part(shapes: Sequence[GroupShape], part: RowPart) -> tuple[Row, Row]:
    """Two rows with neighbours in the tree kept together, cut where half of the tokens stand."""
    tree = part_shape(shapes, part).tree
    order = sorted(part.samples, key=lambda sample: (tree.sample_segments[sample], sample))
    lens = tree.sample_lens[order]
    cut = 1 + int(np.abs(2 * np.cumsum(lens)[:-1] - lens.sum()).argmin())
    first, second = tuple(sorted(order[:cut])), tuple(sorted(order[cut:]))
    return (replace(part, samples=first),), (replace(part, samples=second),)
