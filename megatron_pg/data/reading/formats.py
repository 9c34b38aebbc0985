"""Rollouts that other trainers write, as rows of our schema.

A converter is made for one file from all its records; it takes one record and returns a row for
``schema.RowParser``. Values that it does not understand are passed on, so that the parser names
them. Fields without a place in the schema go to ``metadata``.

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
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..values import shorten, show

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


def slime_converter(
    records: Sequence[Row], name_group: NameGroup, reward_key: Sequence[str]
) -> Converter:
    """For records ``{"rollout_id": of the file, "sample": slime's Sample.to_dict()}``.

    The prompt is what precedes the last ``response_length`` tokens. Samples of one ``group_index``
    form a group. Samples of one ``rollout_id`` (turns, sub-agents, compacted contexts) share its
    reward, which counts once. ``remove_sample`` leaves no token trained, the reward counts. A
    failed sample counts as aborted; a pending one is refused. A sample that was aborted before it
    had any tokens takes the prompt of its group.
    """
    prompts: dict[int | str, list[int]] = {}
    for record in records:
        sample = record["sample"]
        tokens, length = sample.get("tokens"), sample.get("response_length")
        group_index = sample.get("group_index")
        is_whole = isinstance(tokens, list) and type(length) is int and 0 <= length < len(tokens)
        if is_whole and isinstance(group_index, int | str):
            prompts.setdefault(group_index, tokens[: len(tokens) - length])

    groups: dict[int | str, int | str | None] = {}

    def convert(record: Row) -> Row:
        file_id, sample = _id(record, "rollout_id"), record["sample"]
        tokens = _take(sample, "tokens", list)
        length = _take(sample, "response_length", int)
        index, group_index = _id(sample, "index"), _id(sample, "group_index")
        rollout = _id(sample, "rollout_id")
        if rollout is not None and groups.setdefault(rollout, group_index) != group_index:
            raise FormatError(
                "rollout_id",
                f"is {rollout!r} in group_index {groups[rollout]!r} and {group_index!r}; a rollout "
                "answers one prompt, leave it out of samples that count by themselves",
            )
        if not tokens and length == 0:
            tokens = prompts.get(group_index, []) if group_index is not None else []
            if not tokens:
                message = "is empty, as in all samples of its group; leave the sample out"
                raise FormatError("tokens", message)
        if not 0 <= length < len(tokens):
            raise FormatError(
                "response_length",
                f"is {shorten(length)}, must lie in [0, {len(tokens)}), the tokens",
            )
        status = sample.get("status")
        kept = ("label", "metadata", "status")
        row: Row = {
            "prompt_ids": tokens[: len(tokens) - length],
            "response_ids": tokens[len(tokens) - length :],
            "reward": _sum_rewards(sample.get("reward"), "reward", reward_key),
            "loss_mask": sample.get("loss_mask"),
            "rollout_logprobs": sample.get("rollout_log_probs"),
            "status": "aborted" if status == "failed" else status,
            "sample_id": _join_ids(file_id, index),
            "group_id": _join_ids(file_id, group_index),
            "rollout_id": _join_ids(file_id, rollout),
            "metadata": {"slime": {name: sample.get(name) for name in kept}},
        }
        if sample.get("remove_sample"):
            mask = row["loss_mask"]
            row["loss_mask"] = [0] * (len(mask) if isinstance(mask, list) else length)
        return row

    return convert


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
        length = _take(record, "input_lengths", int)
        tokens = _take(record, "token_ids", list)
        mask = _take(record, "token_loss_mask", list)
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
            "reward": _take_reward(
                record, "filtered_rewards" if has_filtered else "rewards", start < length
            ),
            "rollout_logprobs": _slice(record.get("generation_logprobs"), start, length),
            "old_logprobs": _slice(record.get("prev_logprobs"), start, length),
            "advantage": _slice(record.get("advantages"), start, length),
            "group_id": name_group(json.dumps(tokens[:start])),
            "metadata": {"nemo_rl": {k: v for k, v in record.items() if k not in known}},
        }

    return convert


def verl_converter(
    records: Sequence[Row], name_group: NameGroup, reward_key: Sequence[str]
) -> Converter:
    """For a verl generation dump: ``input``, ``output``, ``score``."""
    known = ("input", "output", "score")

    def convert(record: Row) -> Row:
        return {
            "prompt": record.get("input"),
            "response": record.get("output"),
            "reward": _take_reward(record, "score", bool(record.get("output"))),
            "group_id": name_group(json.dumps([record.get("step"), record.get("input")])),
            "metadata": {"verl": {k: v for k, v in record.items() if k not in known}},
        }

    return convert


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
            "reward": _sum_rewards(rewards, "reward", parts),
            "advantage": record.get("advantage"),
            "group_id": name_group(
                json.dumps([record.get("step"), record.get("prompt")], default=repr)
            ),
            "metadata": {"trl": {k: v for k, v in record.items() if k not in known}},
        }

    return convert


CONVERTERS: dict[str, MakeConverter] = {
    "slime": slime_converter,
    "nemo_rl": nemo_rl_converter,
    "verl": verl_converter,
    "trl": trl_converter,
}
# Formats whose reward may have several parts.
READS_REWARD_KEY = ("slime", "trl")


def _take(record: Row, field: str, kind: type) -> Any:
    value = record.get(field)
    if type(value) is not kind:
        found = "is missing" if value is None else f"is a {type(value).__name__}"
        raise FormatError(field, f"{found}, must be a {kind.__name__}")
    return value


def _take_reward(record: Row, field: str, is_needed: bool) -> Any:
    if is_needed and record.get(field) is None:
        message = f"is missing or null under {field!r}; score the sample, or leave it out"
        raise FormatError("reward", message)
    return record.get(field)


def _sum_rewards(reward: Any, field: str, reward_key: Sequence[str]) -> Any:
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


def _id(record: Row, field: str) -> int | str | None:
    value = record.get(field)
    if value is None or isinstance(value, str) or (type(value) is int and abs(value) < 2**63):
        return value
    raise FormatError(field, f"must be an integer, got {show(value)}")


def _join_ids(*ids: int | str | None) -> str | None:
    return None if ids[-1] is None else "/".join(str(i) for i in ids if i is not None)


def _is_null(value: Any) -> bool:
    # pandas writes a null among numbers as NaN.
    return value is None or (isinstance(value, float) and math.isnan(value))


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
