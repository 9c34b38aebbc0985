"""Which sample of which group stands in which row of which replica."""

from .balance import balance_costs, balance_groups, equalize_num_microbatches, with_num_rows
from .plan import PackPlan, RowPart, part_shape, part_tokens, part_tree, plan_rows, row_budget
from .residency import ResidencyChoice, ResidencyConfig, group_cost, plan_waves, step_cost
from .split import split_group
from .stages import with_rows_for_stages

__all__ = [
    "PackPlan",
    "ResidencyChoice",
    "ResidencyConfig",
    "RowPart",
    "balance_costs",
    "balance_groups",
    "equalize_num_microbatches",
    "group_cost",
    "part_shape",
    "part_tokens",
    "part_tree",
    "plan_rows",
    "plan_waves",
    "row_budget",
    "split_group",
    "step_cost",
    "with_num_rows",
    "with_rows_for_stages",
]
