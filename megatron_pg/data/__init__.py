"""Which groups go together: reading, costing, packing and balancing them."""

from .balance import balance_groups, equalize_num_microbatches
from .cost import CostModel
from .pack import carried_fields, make_microbatch, make_microbatches, pack_groups
from .plan import GroupSplit, PackPlan, RowPart, plan_rows, split_group
from .readers import read_rollouts, write_rollouts
from .shape import GroupShape, group_shape, group_tree, select_samples
from .types import Group, Microbatch, Sample, Status

__all__ = [
    "CostModel",
    "Group",
    "GroupShape",
    "GroupSplit",
    "Microbatch",
    "PackPlan",
    "RowPart",
    "Sample",
    "Status",
    "balance_groups",
    "carried_fields",
    "equalize_num_microbatches",
    "group_shape",
    "group_tree",
    "make_microbatch",
    "make_microbatches",
    "pack_groups",
    "plan_rows",
    "read_rollouts",
    "select_samples",
    "split_group",
    "write_rollouts",
]
