"""TRL's tables of completions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from .record import Converter, FormatError, NameGroup, Row, sum_rewards


def trl_converter(
    records: Sequence[Row], name_group: NameGroup, reward_key: Sequence[str]
) -> Converter:
    """For a TRL completions table; the reward is the sum of the columns ``reward_key``.

    Without ``reward_key`` the table must have one column of numbers besides TRL's own. A null is
    what a reward function gave that does not apply to the sample: it adds nothing to the others.
    """
    known = {"step", "prompt", "completion", "advantage"}
    columns = {
        name: [value for value in (record.get(name) for record in records) if not _is_null(value)]
        for name in (records[0] if records else {})
        if name not in known
    }
    numbers = [n for n, v in columns.items() if v and set(map(type, v)) <= {int, float, bool}]
    parts = list(reward_key) or numbers or [name for name, values in columns.items() if not values]
    if not reward_key and len(parts) != 1:
        told = f"may be any of the columns {parts}; keep one of them in the file"
        if not parts:
            told = f"is missing: no column of {[*columns]} holds numbers; add one"
        raise FormatError("reward", f"{told}, or name those to be summed in reward_key")

    def convert(record: Row) -> Row:
        rewards = {k: 0 if _is_null(v) else v for k, v in record.items() if k in parts}
        if record.get("completion") and all(_is_null(record.get(part)) for part in rewards):
            message = f"is null in {', '.join(parts)}; score the sample, or leave it out"
            raise FormatError("reward", message)
        return {
            "prompt": record.get("prompt"),
            "response": record.get("completion"),
            "reward": sum_rewards(rewards, "reward", parts),
            "advantage": record.get("advantage"),
            "group_id": name_group(
                json.dumps([record.get("step"), record.get("prompt")], default=repr)
            ),
            "metadata": {"trl": {k: v for k, v in record.items() if k not in known}},
        }

    return convert


def _is_null(value: Any) -> bool:
    # pandas writes a null among numbers as NaN.
    return value is None or (isinstance(value, float) and math.isnan(value))
