"""slime's and miles' rollouts, as ``--save-debug-rollout-data`` stores them."""

from __future__ import annotations

from collections.abc import Sequence

from ...values import shorten
from .record import Converter, FormatError, NameGroup, Row, sum_rewards, take, take_id


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
        file_id, sample = take_id(record, "rollout_id"), record["sample"]
        tokens = take(sample, "tokens", list)
        length = take(sample, "response_length", int)
        index, group_index = take_id(sample, "index"), take_id(sample, "group_index")
        rollout = take_id(sample, "rollout_id")
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
            "reward": sum_rewards(sample.get("reward"), "reward", reward_key),
            "loss_mask": sample.get("loss_mask"),
            "rollout_logprobs": sample.get("rollout_log_probs"),
            "routed_experts": sample.get("rollout_routed_experts"),
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


def _join_ids(*ids: int | str | None) -> str | None:
    return None if ids[-1] is None else "/".join(str(i) for i in ids if i is not None)
