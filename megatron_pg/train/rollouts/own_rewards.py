"""What rewards say beside their number: the other entries of a reward that is a dict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from ...data import Group, Sample
from ...parallel import from_all_ranks

Sums = dict[str, tuple[float, int]]
"""Sum and number of samples by name."""
# Of the rewards themselves, see ``METRICS``.
_TAKEN = re.compile(r"mean|std|max|min|kl_penalty|(.*/)?(mean|pass)@\d+", re.DOTALL)


def own_rewards(sample: Sample) -> dict[str, float]:
    """The numbers by name in ``metadata["reward_metrics"]``, where it holds some.

    A recorded row may have under this name whatever it likes.
    """
    found = sample.metadata.get("reward_metrics")
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {
        name: float(value)
        for name, value in pairs
        if isinstance(name, str) and isinstance(value, int | float) and math.isfinite(value)
    }


def own_reward_sums(groups: Iterable[Group]) -> Sums:
    """Sums over the samples that carry such numbers."""
    sums: Sums = {}
    for sample in (sample for group in groups for sample in group.samples):
        for name, value in own_rewards(sample).items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + value, count + 1
    return sums


def mean_rewards(parts: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, float]:
    """Mean by name over the samples of all parts.

    Raises:
        ValueError: if a reward calls one of its numbers as a metric is called.
    """
    found = {}
    for name in sorted({name for part in parts for name in part}):
        if _TAKEN.fullmatch(name):
            raise ValueError(
                f"a reward gives a number called {name!r} beside the reward, but reward/{name} "
                "is a metric of all rewards; give it another name"
            )
        of_parts = [part[name] for part in parts if name in part]
        found[name] = sum(total for total, _ in of_parts) / sum(count for _, count in of_parts)
    return found


def own_reward_metrics(groups: Mapping[int, Group]) -> dict[str, float]:
    """``reward/<name>`` over the groups of all ranks; a collective.

    Raises:
        ValueError: on every rank, if a reward calls one of its numbers as a metric is called.
    """
    parts = from_all_ranks(lambda: own_reward_sums(groups.values()))
    return {f"reward/{name}": value for name, value in mean_rewards(parts).items()}
