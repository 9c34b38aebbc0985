"""What the formats of other trainers have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...values import show

Row = dict[str, Any]
# Group id for whatever the rows of a group have in common.
NameGroup = Callable[[str], str]
# record -> row. Raises: FormatError.
Converter = Callable[[Row], Row]
# (all records of a file, name_group, reward_key) -> converter. Raises: FormatError.
MakeConverter = Callable[[Sequence[Row], NameGroup, Sequence[str]], Converter]


class FormatError(ValueError):
    """A record, or a whole file, lacks what its format promises.

    Args:
        field: the record's field.
        message: what is wrong with it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message


def take(record: Row, field: str, kind: type) -> Any:
    """A value of exactly this type. Raises: FormatError."""
    value = record.get(field)
    if type(value) is not kind:
        found = "is missing" if value is None else f"is a {type(value).__name__}"
        raise FormatError(field, f"{found}, must be a {kind.__name__}")
    return value


def take_reward(record: Row, field: str, is_needed: bool) -> Any:
    """What stands under ``field``. Raises: FormatError if it is needed and nothing does."""
    if is_needed and record.get(field) is None:
        message = f"is missing or null under {field!r}; score the sample, or leave it out"
        raise FormatError("reward", message)
    return record.get(field)


def sum_rewards(reward: Any, field: str, reward_key: Sequence[str]) -> Any:
    """A reward, or the sum of some parts of it. Raises: FormatError if it has no such parts."""
    if not isinstance(reward, dict):
        return reward
    missing = [key for key in reward_key if key not in reward]
    if missing or not reward_key:
        named = f"no {missing[0]!r}" if missing else "several parts"
        raise FormatError(
            field,
            f"has {named} in {sorted(map(str, reward))}; write the number to be used as {field!r}, "
            "or name those to be summed in reward_key",
        )
    values = [reward[key] for key in reward_key]
    wrong = [value for value in values if type(value) not in (int, float, bool)]
    # The parser names a value that is no number.
    return wrong[0] if wrong else sum(values)


def take_id(record: Row, field: str) -> int | str | None:
    """An id, or None. Raises: FormatError if it is something else."""
    value = record.get(field)
    if value is None or isinstance(value, str) or (type(value) is int and abs(value) < 2**63):
        return value
    raise FormatError(field, f"must be an integer, got {show(value)}")
