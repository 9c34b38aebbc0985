"""Which groups go together: reading, costing, packing and balancing them."""

from .balance import balance_costs, balance_groups, equalize_num_microbatches, with_num_rows
from .checksum import content_checksum
from .cost import CostModel, active_ffn_hidden_size
from .heads import AttentionSizes
from .memory import MemoryModel
from .pack import carried_fields, make_microbatches, make_wave, pack_groups, token_values
from .plan import (
    PackPlan,
    RowPart,
    part_shape,
    part_tree,
    plan_rows,
    row_budget,
    split_group,
)
from .reading import (
    Problems,
    check_prompt,
    read_json_records,
    read_jsonl_records,
    read_parquet_records,
    read_rollouts,
    write_rollouts,
)
from .residency import ResidencyConfig, plan_waves, step_cost
from .route_forms import decode_routes, encode_routes
from .routes import RouteShape, route_problem, routes_of_samples, without_routes
from .rows import Microbatch, PackedRow, PrefixRow, TokenValues, Wave
from .shape import GroupShape, group_shape, group_tree, select_samples
from .types import UNKNOWN_ROUTE, Group, Sample, Status, without_aborted
from .values import response_problems, reward_problem, shorten, show

__all__ = [
    "AttentionSizes",
    "CostModel",
    "Group",
    "GroupShape",
    "MemoryModel",
    "Microbatch",
    "PackPlan",
    "PackedRow",
    "PrefixRow",
    "Problems",
    "ResidencyConfig",
    "RouteShape",
    "RowPart",
    "Sample",
    "Status",
    "TokenValues",
    "UNKNOWN_ROUTE",
    "Wave",
    "active_ffn_hidden_size",
    "balance_costs",
    "balance_groups",
    "carried_fields",
    "check_prompt",
    "content_checksum",
    "decode_routes",
    "encode_routes",
    "equalize_num_microbatches",
    "group_shape",
    "group_tree",
    "make_microbatches",
    "make_wave",
    "pack_groups",
    "part_shape",
    "part_tree",
    "plan_rows",
    "plan_waves",
    "read_json_records",
    "read_jsonl_records",
    "read_parquet_records",
    "read_rollouts",
    "response_problems",
    "reward_problem",
    "route_problem",
    "routes_of_samples",
    "row_budget",
    "select_samples",
    "shorten",
    "show",
    "split_group",
    "step_cost",
    "token_values",
    "with_num_rows",
    "without_aborted",
    "without_routes",
    "write_rollouts",
]
