"""Files as records, records as rows, rows as groups: recorded rollouts, and what prompts share."""

from .problems import Problems
from .readers import RolloutFormat, read_rollouts, write_rollouts
from .records import read_json_records, read_jsonl_records, read_parquet_records
from .text import check_prompt

__all__ = [
    "Problems",
    "RolloutFormat",
    "check_prompt",
    "read_json_records",
    "read_jsonl_records",
    "read_parquet_records",
    "read_rollouts",
    "write_rollouts",
]
