"""What the rows of a rollout share, among themselves and with other rollouts of the group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_pg import PrefixTree
from megatron_pg.data import Group, select_samples


def rollout_report(groups: Sequence[Group], trees: Sequence[PrefixTree]) -> dict[str, Any]:
    """Tokens of rollouts that are recorded as several rows: turns, sub-agents, contexts.

    Args:
        groups: whose samples are the rows; one without ``rollout_id`` is a rollout of its own.
        trees: what each group shares.

    Returns:
        Plain values by name:

        * ``count``: rollouts; ``several_rows``: those of more than one row.
        * ``rows``: smallest, median, mean and largest number of rows of a rollout.
        * ``logical_tokens``: of all rows written out.
        * ``shared_within``: of these, tokens that another row of the same rollout holds already.
          Written out they grow with the square of a rollout's turns.
        * ``shared_across``: of the rest, tokens that another rollout of the group holds already.
        * ``unique_tokens``: what is left, and encoded when every group stands in one row.
        * ``growth``: smallest, median, mean and largest ratio of a rollout's rows written out to
          its own tokens, 1 for a rollout of one row.
    """
    rows: list[int] = []
    logical: list[int] = []
    own: list[int] = []
    for group, tree in zip(groups, trees, strict=True):
        numbers = group.rollouts.numpy()
        for number in range(int(numbers.max()) + 1):
            members = np.nonzero(numbers == number)[0].tolist()
            rows.append(len(members))
            logical.append(int(tree.sample_lens[members].sum()))
            own.append(select_samples(tree, members).unique_tokens)
    unique = sum(tree.unique_tokens for tree in trees)
    return {
        "count": len(rows),
        "several_rows": sum(count > 1 for count in rows),
        "rows": summary(rows),
        "logical_tokens": sum(logical),
        "shared_within": sum(logical) - sum(own),
        "shared_across": sum(own) - unique,
        "unique_tokens": unique,
        "growth": summary(a / b for a, b in zip(logical, own)),
    }


def summary(values: Iterable[float]) -> dict[str, float]:
    """Smallest, median, mean and largest of some values."""
    array = np.array(list(values))
    return {
        "min": array.min().item(),
        "median": float(np.median(array)),
        "mean": float(array.mean()),
        "max": array.max().item(),
    }
