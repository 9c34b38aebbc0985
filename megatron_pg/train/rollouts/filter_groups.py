"""DAPO's dynamic sampling: a step asks for groups until enough have spread in their rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...data import Group, without_aborted
from ...parallel import from_all_ranks
from ...rollout import RecordedRollouts
from ..config import FilterGroupsConfig
from .shared_stream import SharedStream


@dataclass(frozen=True)
class _Told:
    """What every rank knows of a group that one of them has."""

    has_spread: bool
    reward: float
    num_rollouts: int

    @classmethod
    def of(cls, group: Group) -> _Told:
        """Aborted samples were not judged; all samples of a rollout have its reward."""
        rewards = [
            reward
            for kept in without_aborted([group])
            for reward in dict(
                zip(kept.rollouts.tolist(), (s.reward for s in kept.samples))
            ).values()
        ]
        return cls(len(set(rewards)) > 1, sum(rewards), len(rewards))


def groups_with_spread(
    stream: SharedStream, num_groups: int, settings: FilterGroupsConfig
) -> tuple[dict[int, Group], dict[str, float]]:
    """The next ``num_groups`` groups whose rewards are not all equal; every rank takes part.

    The first ones in the order of the stream, whichever ranks have them; what is left over of the
    last batch is dropped. At the limit the step is filled up with groups without spread, if it is
    to be trained.

    Args:
        stream: of the run; moves on by ``num_groups`` for every batch.
        num_groups: of the step.
        settings: the limit, and what happens there.

    Returns:
        This rank's groups by number within the step, and ``filter_groups/`` metrics.

    Raises:
        ValueError: on every rank, at the limit, if told so.
    """
    return _with_spread(stream.next_groups, _tell, num_groups, settings)


def recorded_with_spread(
    recorded: RecordedRollouts, num_groups: int, settings: FilterGroupsConfig
) -> list[Group]:
    """``groups_with_spread`` of recorded groups, in one process."""

    def next_groups(count: int) -> dict[int, Group]:
        return dict(enumerate(recorded.next_groups(count)))

    groups, _ = _with_spread(next_groups, dict, num_groups, settings)
    return [groups[place] for place in sorted(groups)]


def _with_spread(
    next_groups: Callable[[int], dict[int, Group]],
    tell: Callable[[Mapping[int, _Told]], dict[int, _Told]],
    num_groups: int,
    settings: FilterGroupsConfig,
) -> tuple[dict[int, Group], dict[str, float]]:
    own: list[Group | None] = []
    told: list[_Told] = []
    batches = 0
    while sum(one.has_spread for one in told) < num_groups:
        if batches == settings.max_num_gen_batches:
            _check_limit(told, num_groups, settings)
            break
        mine = next_groups(num_groups)
        batch = tell({number: _Told.of(group) for number, group in mine.items()})
        told += [batch[number] for number in sorted(batch)]
        own += [mine.get(number) for number in sorted(batch)]
        batches += 1
        # Groups that cannot be chosen any more are many, each with its texts.
        kept = set(_chosen(told, num_groups))
        own = [group if i in kept else None for i, group in enumerate(own)]
    chosen = enumerate(own[i] for i in _chosen(told, num_groups))
    groups = {place: group for place, group in chosen if group is not None}
    return groups, _metrics(told, num_groups, batches)


def _chosen(told: list[_Told], num_groups: int) -> list[int]:
    """Places of the groups with spread, then of others, at most ``num_groups``, in order."""
    with_spread = [i for i, one in enumerate(told) if one.has_spread][:num_groups]
    others = [i for i, one in enumerate(told) if not one.has_spread]
    return sorted(with_spread + others[: num_groups - len(with_spread)])


def _metrics(told: list[_Told], num_groups: int, batches: int) -> dict[str, float]:
    with_spread = sum(one.has_spread for one in told)
    num_rollouts = sum(one.num_rollouts for one in told)
    metrics = {
        "filter_groups/batches": float(batches),
        "filter_groups/without_spread": float(len(told) - with_spread),
        "filter_groups/surplus": float(max(with_spread - num_groups, 0)),
    }
    if num_rollouts:
        metrics["filter_groups/reward"] = sum(one.reward for one in told) / num_rollouts
    return metrics


def _check_limit(told: list[_Told], num_groups: int, settings: FilterGroupsConfig) -> None:
    if settings.at_limit == "raise":
        raise ValueError(
            f"algorithm.filter_groups.max_num_gen_batches={settings.max_num_gen_batches}: of "
            f"{len(told)} groups {sum(one.has_spread for one in told)} have spread in their "
            f"rewards, a step needs {num_groups}; the prompts are too hard or too easy: change "
            "them, raise the limit, or set algorithm.filter_groups.at_limit=train"
        )


def _tell(own: Mapping[int, _Told]) -> dict[int, _Told]:
    parts = from_all_ranks(lambda: dict(own))
    return {number: told for part in parts for number, told in part.items()}
