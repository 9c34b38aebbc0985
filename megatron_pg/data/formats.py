"""Rollouts that other trainers write, as rows of our schema.

Every converter takes the fields of one record and returns a row for ``schema.RowParser``; values
that it does not understand are passed on, so that the parser names them. Fields without a place in
the schema go to ``metadata``.

===========  ==============================================  ============================
format       written by                                      one group
===========  ==============================================  ============================
``slime``    ``--save-debug-rollout-data`` (``torch.save``)  ``group_index`` of a rollout
``nemo_rl``  ``train_data_step*.jsonl``                      equal prompts of a file
``verl``     ``trainer.rollout_data_dir`` (text only)        equal inputs of a step
``trl``      ``log_completions=True`` (parquet, text only)   equal prompts of a step
===========  ==============================================  ============================

The last two hold decoded text. Tokenizing it anew need not give the tokens that were sampled (verl
and TRL drop special tokens), so their logprobs have to be recomputed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
# Group id for whatever the rows of a group have in common.
NameGroup = Callable[[str], str]
# (record, name_group, reward_key) -> row. Raises: FormatError.
Converter = Callable[[Row, NameGroup, Sequence[str]], Row]


class FormatError(ValueError):
    """A record lacks what its format promises.

    Args:
        field: the record's field.
        message: what is wrong with it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field = field
        self.message = message


def convert_slime(record: Row, name_group: NameGroup, reward_key: Sequence[str]) -> Row:
    """Row of a slime ``Sample.to_dict()``; the prompt is what precedes ``response_length`` tokens.

    A reward that is a dict needs ``reward_key``. ``remove_sample`` leaves no token trained. A
    failed sample counts as aborted; a pending one is refused.
    """
    tokens = _take(record, "tokens", list)
    response_len = _take(record, "response_length", int)
    if not 0 < response_len < len(tokens):
        raise FormatError(
            "response_length", f"is {response_len}, must lie in (0, {len(tokens)}), the tokens"
        )
    status = record.get("status")
    row: Row = {
        "prompt_ids": tokens[: len(tokens) - response_len],
        "response_ids": tokens[len(tokens) - response_len :],
        "reward": _sum_rewards(record.get("reward"), "reward", reward_key),
        "loss_mask": record.get("loss_mask"),
        "rollout_logprobs": record.get("rollout_log_probs"),
        "status": "aborted" if status == "failed" else status,
        "sample_id": _join_ids(record.get("rollout_id"), record.get("index")),
        "group_id": _join_ids(record.get("rollout_id"), record.get("group_index")),
        "metadata": {"slime": {name: record.get(name) for name in ("label", "metadata", "status")}},
    }
    if record.get("remove_sample"):
        row["loss_mask"] = [0] * response_len
    return row


def convert_nemo_rl(record: Row, name_group: NameGroup, reward_key: Sequence[str]) -> Row:
    """Row of a NeMo-RL training log; the prompt is what precedes the first trained token.

    Values may stand in lists of length one, as NeMo-RL writes them. Padding past ``input_lengths``
    is dropped. A sample that is masked as a whole keeps its tokens and trains none.
    """
    if isinstance(record.get("input_lengths"), list):
        record = {
            name: value[0] if isinstance(value, list) and len(value) == 1 else value
            for name, value in record.items()
        }
    length = _take(record, "input_lengths", int)
    tokens = _take(record, "token_ids", list)
    mask = _take(record, "token_loss_mask", list)
    if not 0 < length <= min(len(tokens), len(mask)):
        raise FormatError(
            "input_lengths",
            f"is {length}, there are {len(tokens)} token_ids and {len(mask)} token_loss_mask",
        )
    start = next((i for i, flag in enumerate(mask[:length]) if flag), None)
    if start is None:
        raise FormatError("token_loss_mask", "trains no token, so the prompt's end is unknown")
    rewards = "filtered_rewards" if record.get("filtered_rewards") is not None else "rewards"
    is_trained = record.get("sample_loss_mask", 1) != 0
    known = {"input_lengths", "token_ids", "token_loss_mask", "sample_loss_mask", "advantages"}
    known |= {"generation_logprobs", "prev_logprobs", "rewards", "filtered_rewards"}
    return {
        "prompt_ids": tokens[:start],
        "response_ids": tokens[start:length],
        "loss_mask": [_as_flag(flag) if is_trained else 0 for flag in mask[start:length]],
        "reward": record.get(rewards),
        "rollout_logprobs": _slice(record.get("generation_logprobs"), start, length),
        "old_logprobs": _slice(record.get("prev_logprobs"), start, length),
        "advantage": _slice(record.get("advantages"), start, length),
        "group_id": name_group(json.dumps(tokens[:start])),
        "metadata": {"nemo_rl": {k: v for k, v in record.items() if k not in known}},
    }


def convert_verl(record: Row, name_group: NameGroup, reward_key: Sequence[str]) -> Row:
    """Row of a verl generation dump: ``input``, ``output``, ``score``."""
    known = ("input", "output", "score")
    return {
        "prompt": record.get("input"),
        "response": record.get("output"),
        "reward": record.get("score"),
        "group_id": name_group(json.dumps([record.get("step"), record.get("input")])),
        "metadata": {"verl": {k: v for k, v in record.items() if k not in known}},
    }


def convert_trl(record: Row, name_group: NameGroup, reward_key: Sequence[str]) -> Row:
    """Row of a TRL completions table; the reward is the sum of the columns ``reward_key``.

    Without ``reward_key`` the table must have one numeric column besides TRL's own.
    """
    known = {"step", "prompt", "completion", "advantage"}
    if not reward_key:
        others = {k: v for k, v in record.items() if k not in known}
        reward_key = [k for k, v in others.items() if type(v) in (int, float)]
        if len(reward_key) != 1:
            raise FormatError(
                "reward",
                f"may be any of the columns {reward_key}; keep one of them in the file, or call "
                "read_rollouts(..., reward_key=) with those to be summed",
            )
    return {
        "prompt": record.get("prompt"),
        "response": record.get("completion"),
        "reward": _sum_rewards(record, "reward", reward_key),
        "advantage": record.get("advantage"),
        "group_id": name_group(json.dumps([record.get("step"), record.get("prompt")])),
        "metadata": {"trl": {k: v for k, v in record.items() if k not in known}},
    }


CONVERTERS: dict[str, Converter] = {
    "slime": convert_slime,
    "nemo_rl": convert_nemo_rl,
    "verl": convert_verl,
    "trl": convert_trl,
}


def _take(record: Row, field: str, kind: type) -> Any:
    value = record.get(field)
    if type(value) is not kind:
        found = "is missing" if value is None else f"is a {type(value).__name__}"
        raise FormatError(field, f"{found}, must be a {kind.__name__}")
    return value


def _sum_rewards(reward: Any, field: str, reward_key: Sequence[str]) -> Any:
    if not isinstance(reward, dict):
        return reward
    missing = [key for key in reward_key if key not in reward]
    if missing or not reward_key:
        named = f"no {missing[0]!r}" if missing else "several parts"
        raise FormatError(
            field,
            f"has {named} in {sorted(reward)}; write the number to be used as {field!r}, or call "
            "read_rollouts(..., reward_key=) with those to be summed",
        )
    values = [reward[key] for key in reward_key]
    wrong = [value for value in values if type(value) not in (int, float)]
    # The parser names a value that is no number.
    return wrong[0] if wrong else sum(values)


def _join_ids(*ids: Any) -> str | None:
    return None if ids[-1] is None else "/".join(str(i) for i in ids if i is not None)


def _slice(values: Any, start: int, end: int) -> Any:
    return values[start:end] if isinstance(values, list) else values


def _as_flag(flag: Any) -> Any:
    return int(flag) if flag in (0, 1) else flag
