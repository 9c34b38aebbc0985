"""Rows of a pipeline: as many as pay, none shorter than a card wants, every sample once."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_pg.data import (
    CostModel,
    GroupShape,
    PackPlan,
    ResidencyConfig,
    group_cost,
    plan_rows,
    plan_waves,
    step_cost,
    with_rows_for_stages,
)
from megatron_pg.tree import PrefixTree

COST = CostModel()


def groups(*stars: tuple[int, list[int]]) -> list[GroupShape]:
    return [
        GroupShape(str(i), PrefixTree.from_group(p, r), np.array(r), np.full(len(r), p))
        for i, (p, r) in enumerate(stars)
    ]


def time(plan: PackPlan, num_stages: int) -> float:
    residency = ResidencyConfig(max_resident_tokens=1, num_stages=num_stages)
    return step_cost([plan], residency, COST)


def samples(plan: PackPlan) -> list[tuple[int, int]]:
    return sorted((p.group, i) for row in plan.rows for p in row for i in p.samples)


@pytest.mark.parametrize("num_stages", [2, 4, 8])
@pytest.mark.parametrize("prompt", [64, 6000])
def test_dear_rows_are_divided_while_the_pass_gets_shorter(num_stages: int, prompt: int) -> None:
    shapes = groups(*[(prompt, [3000] * 16)] * 3)
    plan = plan_rows(shapes, 64000)
    more = with_rows_for_stages(plan, num_stages, COST)
    assert len(more.rows) > len(plan.rows) and samples(more) == samples(plan)
    assert time(more, num_stages) < time(plan, num_stages)
    for row in range(len(more.rows)):
        assert more.row_layout(row).unique_tokens >= 4096
    # A longer prompt is repeated less often.
    if prompt == 6000:
        shorter = plan_rows(groups(*[(64, [3000] * 16)] * 3), 64000)
        assert len(more.rows) <= len(with_rows_for_stages(shorter, num_stages, COST).rows)


def test_rows_stay_where_nothing_is_gained() -> None:
    whole = plan_rows(groups((100, [9000]), (100, [9000]), (100, [9000])), 9200)
    short = plan_rows(groups((100, [500] * 8)), 9000)
    for plan in (whole, short):
        assert with_rows_for_stages(plan, 8, COST) is plan
    divisible = plan_rows(groups((100, [9000] * 4)), 40000)
    assert with_rows_for_stages(divisible, 1, COST) is divisible
    # What samples share costs more than an idle stage.
    shared = plan_rows(groups((60000, [100, 100])), 61000)
    assert with_rows_for_stages(shared, 2, COST) is shared


def test_groups_are_taken_apart_before_samples_and_fillers_stay() -> None:
    shapes = groups((5000, [3000]), (5000, [3000]), (5000, [3000]), (5000, [3000]))
    plan = plan_rows(shapes, 32000)
    assert len(plan.rows) == 1
    more = with_rows_for_stages(PackPlan(plan.shapes, (*plan.rows, ())), 4, COST)
    assert sorted(len(row) for row in more.rows) == [0, 1, 1, 1, 1] and more.rows[-1] == ()
    assert sum(more.row_costs(COST)) == pytest.approx(sum(plan.row_costs(COST)))


@pytest.mark.parametrize("choice", ["auto", "always", "never"])
@pytest.mark.parametrize("mode", ["retain", "recompute"])
@pytest.mark.parametrize(
    "star", [(100, [50] * 4), (900, [300] * 6), (90, [700, 600, 900, 100]), (5, [500, 501])]
)
def test_a_group_costs_what_its_plan_does(
    choice: str, mode: str, star: tuple[int, list[int]]
) -> None:
    """In rows of 1,300 tokens: whole, cut, or with its prompt resident."""
    (shape,) = groups(star)
    residency = ResidencyConfig(choice=choice, mode=mode, max_resident_tokens=1300)  # type: ignore[arg-type]
    waves = plan_waves([shape], 1300, residency, cost_model=COST)
    cost = group_cost(shape, 1300, residency, COST)
    assert cost == pytest.approx(step_cost(waves, residency, COST) / 3)
    assert (cost > shape.cost(COST) * 1.0001) == (shape.tree.unique_tokens > 1300)


def test_a_group_that_fits_in_no_way_costs_what_it_is() -> None:
    (shape,) = groups((10, [2000, 5]))
    residency = ResidencyConfig(choice="auto", max_resident_tokens=1300)
    assert group_cost(shape, 1300, residency, COST) == shape.cost(COST)
