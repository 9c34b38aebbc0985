"""Rows of all files, checked against each other and put into groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..types import OPTIONAL_TOKEN_VALUES, Group, Sample
from .problems import Problems
from .schema import ParsedRow


class PlacedRow(NamedTuple):
    """A row, where it stands, and what its ids are unique in: a file, or "" for all files."""

    where: str
    scope: str
    row: ParsedRow

    @property
    def group(self) -> tuple[str, str | bytes]:
        """Equal for the rows of one group."""
        return self.scope, self.row.prompt_key if self.row.group_id is None else self.row.group_id

    @property
    def rollout(self) -> tuple[Any, Any]:
        """Equal for the rows of one rollout of a group."""
        return self.group, self.row.sample.rollout_id or (self.where,)


def check_rows(rows: Sequence[PlacedRow], problems: Problems) -> None:
    """Note what only shows between rows."""
    first_of_scope: dict[str, PlacedRow] = {}
    for placed in rows:
        first = first_of_scope.setdefault(placed.scope, placed)
        if (placed.row.group_id is None) != (first.row.group_id is None):
            message = f"must be on every row or on none; compare {first.where}"
            problems.add(placed.where, message, "group_id")
    _check_sample_ids(rows, problems)
    _check_prompts(rows, problems)
    _check_rollouts(rows, problems)
    _check_token_values(rows, problems)


def group_rows(rows: Sequence[PlacedRow]) -> list[Group]:
    """The groups of rows that ``check_rows`` found nothing wrong with.

    An id that several scopes use becomes ``scope:id``.
    """
    members: dict[tuple[str, str | bytes], list[Sample]] = {}
    for placed in rows:
        members.setdefault(placed.group, []).append(placed.row.sample)
    uses = Counter(key for _, key in members)
    groups: dict[str, Group] = {}
    for number, ((scope, key), samples) in enumerate(members.items()):
        name = f"prompt-{number}"
        if isinstance(key, str):
            name = f"{scope}:{key}" if uses[key] > 1 else key
        while name in groups:  # an id that looks like a name of ours
            name += "'"
        groups[name] = Group(name, tuple(samples))
    return list(groups.values())


def _check_sample_ids(rows: Sequence[PlacedRow], problems: Problems) -> None:
    ids: dict[tuple[str, str], PlacedRow] = {}
    for placed in rows:
        sample = placed.row.sample
        if sample.sample_id is None:
            continue
        earlier = ids.setdefault((placed.scope, sample.sample_id), placed)
        if earlier.rollout == placed.rollout:
            continue
        message = (
            f"{sample.sample_id!r} is also that of {earlier.where}; rename one, or give parts of "
            "one rollout their rollout_id"
        )
        problems.add(placed.where, message, "sample_id")


def _check_prompts(rows: Sequence[PlacedRow], problems: Problems) -> None:
    """Rollouts of one prompt share at least a first token; else ids joined what is not one.

    Within a rollout a sub-agent may begin with tokens of its own.
    """
    first_tokens: dict[Any, dict[bytes, None]] = {}
    for placed in rows:
        first_tokens.setdefault(placed.rollout, {})[placed.row.first_token] = None
    first_of_group: dict[Any, PlacedRow] = {}
    told = set()
    for placed in rows:
        first = first_of_group.setdefault(placed.group, placed)
        own, others = first_tokens[placed.rollout], first_tokens[first.rollout]
        if own.keys().isdisjoint(others) and placed.rollout not in told:
            told.add(placed.rollout)
            message = (
                f"{placed.row.group_id!r} is also that of {first.where}, whose prompt has not even "
                "the first token in common; give every prompt a group_id of its own"
            )
            if not placed.scope:
                message += ", or group each file by itself (group_across_files=False)"
            problems.add(placed.where, message, "group_id")


def _check_rollouts(rows: Sequence[PlacedRow], problems: Problems) -> None:
    """Rows of one rollout stand in one group and, unless they carry advantages, share a reward."""
    first_of_id: dict[Any, PlacedRow] = {}
    first_of_rollout: dict[Any, PlacedRow] = {}
    for placed in rows:
        sample = placed.row.sample
        if sample.rollout_id is None:
            continue
        earlier = first_of_id.setdefault((placed.scope, sample.rollout_id), placed)
        if placed.row.group_id is None and earlier.group != placed.group:
            message = (
                f"{sample.rollout_id!r} is also that of {earlier.where}, whose prompt is another; "
                "without ids, equal prompts make a group: give all rows a group_id"
            )
            problems.add(placed.where, message, "rollout_id")
        if sample.status == "aborted" or sample.advantages is not None:
            continue
        first = first_of_rollout.setdefault(placed.rollout, placed)
        reward = first.row.sample.reward
        if sample.reward != reward:
            message = (
                f"{sample.rollout_id!r} is also that of {first.where}, whose reward is {reward}, "
                f"not {sample.reward}: parts of one rollout share its reward; leave the id out "
                "of samples that count by themselves"
            )
            problems.add(placed.where, message, "rollout_id")


def _check_token_values(rows: Sequence[PlacedRow], problems: Problems) -> None:
    first_of_group: dict[tuple[str, str | bytes], PlacedRow] = {}
    for placed in rows:
        sample = placed.row.sample
        if not sample.num_loss_tokens:
            continue
        first = first_of_group.setdefault(placed.group, placed)
        for name in (*OPTIONAL_TOKEN_VALUES, "loss_weight", "routed_experts"):
            if (getattr(sample, name) is None) != (getattr(first.row.sample, name) is None):
                field = "advantage" if name == "advantages" else name
                message = f"must be on all rows of a group or on none; compare {first.where}"
                problems.add(placed.where, message, field)
