"""Which groups go together: reading, costing, packing and balancing them."""

from .balance import balance_groups, equalize_num_microbatches
from .checksum import content_checksum
from .cost import CostModel
from .memory import MemoryModel
from .pack import carried_fields, make_microbatch, make_microbatches, make_wave, pack_groups
from .plan import (
    GroupSplit,
    PackPlan,
    RowPart,
    part_shape,
    part_tree,
    plan_rows,
    row_budget,
    split_group,
)
from .readers import read_rollouts, write_rollouts
from .residency import ResidencyConfig, plan_waves, step_cost
from .shape import GroupShape, group_shape, group_tree, select_samples
from .types import Group, Microbatch, PrefixRow, Sample, Status, Wave, without_aborted
from .values import response_problems

__all__ = [
    "CostModel",
    "Group",
    "GroupShape",
    "GroupSplit",
    "MemoryModel",
    "Microbatch",
    "PackPlan",
    "PrefixRow",
    "ResidencyConfig",
    "RowPart",
    "Sample",
    "Status",
    "Wave",
    "balance_groups",
    "carried_fields",
    "content_checksum",
    "equalize_num_microbatches",
    "group_shape",
    "group_tree",
    "make_microbatch",
    "make_microbatches",
    "make_wave",
    "pack_groups",
    "part_shape",
    "part_tree",
    "plan_rows",
    "plan_waves",
    "read_rollouts",
    "response_problems",
    "row_budget",
    "select_samples",
    "split_group",
    "step_cost",
    "without_aborted",
    "write_rollouts",
]
