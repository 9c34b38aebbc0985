"""verl's dumps of generations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .record import Converter, FormatError, NameGroup, Row, take_reward

# The prompt's id, the session's and the number of its output.
Key = tuple[str, str, int]


def verl_converter(
    records: Sequence[Row], name_group: NameGroup, reward_key: Sequence[str]
) -> Converter:
    """For a verl generation dump: ``input``, ``output``, ``score``.

    Rows with equal inputs of a step form a group, unless ``uid`` is ``{uid}_{session}_{index}``, as
    the trainer writes it whose sessions may have several outputs: then a prompt is a group, and a
    session a rollout with the reward of its last output.
    """
    known = ("input", "output", "score")
    keys = [_key(record.get("uid")) for record in records]
    if any(keys) and not all(keys):
        raise FormatError(
            "uid", "names prompt, session and output of some rows only; of all or none"
        )
    last: dict[Any, tuple[int, Row]] = {}
    for record, key in zip(records, keys):
        if key is not None:
            session = str(record.get("step")), *key[:2]
            number = last.get(session, (-1, record))[0]
            if key[2] > number:
                last[session] = key[2], record

    def convert(record: Row) -> Row:
        key = _key(record.get("uid"))
        prompt, scored, rollout = record.get("input"), record, None
        if key is not None:
            prompt, rollout = key[0], "_".join(key[:2])
            scored = last[str(record.get("step")), *key[:2]][1]
        return {
            "prompt": record.get("input"),
            "response": record.get("output"),
            "reward": take_reward(scored, "score", bool(record.get("output"))),
            "group_id": name_group(json.dumps([record.get("step"), prompt])),
            "rollout_id": rollout,
            "metadata": {"verl": {k: v for k, v in record.items() if k not in known}},
        }

    return convert


def _key(uid: Any) -> Key | None:
    parts = uid.rsplit("_", 2) if isinstance(uid, str) else []
    if len(parts) < 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        return None
    return parts[0], parts[1], int(parts[2])
