"""NeMo-RL's training logs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .record import Converter, FormatError, NameGroup, Row, take, take_reward


def nemo_rl_converter(
    records: Sequence[Row], name_group: NameGroup, reward_key: Sequence[str]
) -> Converter:
    """For a NeMo-RL training log; the prompt is what precedes the first trained token.

    Values may stand in lists of length one, as NeMo-RL writes them. Padding past ``input_lengths``
    is dropped. A sample that is masked as a whole keeps its tokens and trains none. One without a
    trained token has an empty response if its tokens are the prompt of another one.
    """
    prompts = set()
    for record in map(_without_lists, records):
        tokens, mask = record.get("token_ids"), record.get("token_loss_mask")
        if isinstance(tokens, list) and isinstance(mask, list) and any(mask):
            start = next(i for i, flag in enumerate(mask) if flag)
            prompts.add(json.dumps(tokens[:start]))

    def convert(record: Row) -> Row:
        record = _without_lists(record)
        length = take(record, "input_lengths", int)
        tokens = take(record, "token_ids", list)
        mask = take(record, "token_loss_mask", list)
        if not 0 < length <= min(len(tokens), len(mask)):
            raise FormatError(
                "input_lengths",
                f"is {length}, there are {len(tokens)} token_ids and {len(mask)} token_loss_mask",
            )
        start = next((i for i, flag in enumerate(mask[:length]) if flag), length)
        if start == length and json.dumps(tokens[:length]) not in prompts:
            raise FormatError("token_loss_mask", "trains no token, so the prompt's end is unknown")
        is_trained = record.get("sample_loss_mask", 1) != 0
        has_filtered = record.get("filtered_rewards") is not None
        known = {"input_lengths", "token_ids", "token_loss_mask", "sample_loss_mask", "advantages"}
        known |= {"generation_logprobs", "prev_logprobs", "rewards", "filtered_rewards"}
        return {
            "prompt_ids": tokens[:start],
            "response_ids": tokens[start:length],
            "loss_mask": [_as_flag(flag) if is_trained else 0 for flag in mask[start:length]],
            "reward": take_reward(
                record, "filtered_rewards" if has_filtered else "rewards", start < length
            ),
            "rollout_logprobs": _slice(record.get("generation_logprobs"), start, length),
            "old_logprobs": _slice(record.get("prev_logprobs"), start, length),
            "advantage": _slice(record.get("advantages"), start, length),
            "group_id": name_group(json.dumps(tokens[:start])),
            "metadata": {"nemo_rl": {k: v for k, v in record.items() if k not in known}},
        }

    return convert


def _without_lists(record: Row) -> Row:
    if not isinstance(record.get("input_lengths"), list):
        return record
    return {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in record.items()
    }


def _slice(values: Any, start: int, end: int) -> Any:
    return values[start:end] if isinstance(values, list) else values


def _as_flag(flag: Any) -> Any:
    return int(flag) if flag in (0, 1) else flag
