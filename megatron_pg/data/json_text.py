"""JSON that means the same to whoever reads it, in whatever process."""

from __future__ import annotations

import json
from typing import Any

from .values import TOO_DEEP, nesting_problem


def parse_json_text(text: str | bytes) -> Any:
    """The value of a JSON text; bytes are UTF-8.

    Raises:
        ValueError: if it is no such text, an object has a key twice, or lists and objects are
            nested more than ``MAX_NESTING`` deep.
    """
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(decoded, object_pairs_hook=unique_keys)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if wrong := nesting_problem(value):
        raise ValueError(wrong)
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its pairs, for ``json.loads``; of two values readers take one or the other.

    Raises:
        ValueError: on a key that stands there twice.
    """
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return record
