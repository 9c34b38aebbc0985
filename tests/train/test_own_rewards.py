"""Numbers that rewards give beside the reward, over all ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.data import Group, Sample  # noqa: E402
from megatron_pg.train.rollouts.own_rewards import own_reward_metrics, own_rewards  # noqa: E402
from tests.ranks import Pool, process_group  # noqa: E402


def sample(reward_metrics: Any) -> Sample:
    ids, mask = torch.tensor([3]), torch.ones(1, dtype=torch.bool)
    metadata = {} if reward_metrics is None else {"reward_metrics": reward_metrics}
    return Sample(prompt_ids=ids, response_ids=ids, reward=0.0, loss_mask=mask, metadata=metadata)


def over_ranks(parts: list[list[Any]]) -> dict[str, float] | str:
    """Of ranks whose groups have these numbers, one a sample."""
    with process_group():
        own = parts[torch.distributed.get_rank()]
        groups = {i: Group(str(i), (sample(one),)) for i, one in enumerate(own)}
        try:
            return own_reward_metrics(groups)
        except ValueError as error:
            return str(error)


PARTS = [[{"form": 1.0, "len": 3}, {"form": 0.0}, None], [{"form": True}, {"only": 0.5}], []]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_means_are_over_the_samples_that_have_them(ranks: Pool, num_ranks: int) -> None:
    given = [one for part in PARTS[:num_ranks] for one in part if one]
    want = {}
    for name in sorted({name for one in given for name in one}):
        values = [float(one[name]) for one in given if name in one]
        want[f"reward/{name}"] = sum(values) / len(values)
    assert ranks.run(num_ranks, over_ranks, PARTS) == [want] * num_ranks
    assert ("reward/only" in want) == (num_ranks > 1)


TAKEN = ["mean", "std", "kl_penalty", "mean@4", "pass@1", "digits/reward/pass@16", "a\n/mean@2"]


@pytest.mark.parametrize("name", TAKEN)
def test_the_names_of_other_metrics_are_refused_on_every_rank(ranks: Pool, name: str) -> None:
    told = ranks.run(2, over_ranks, [[{"form": 1.0}], [{name: 2.0}]])
    assert told[0] == told[1] and f"called {name!r}" in told[0] and "another name" in told[0]


@pytest.mark.parametrize("name", ["mean@", "mean@k", "pass", "pass@1/a", "means", "my_pass@1"])
def test_names_that_only_resemble_them_are_free(ranks: Pool, name: str) -> None:
    assert ranks.run(1, over_ranks, [[{name: 2.0}]]) == [{f"reward/{name}": 2.0}]


@pytest.mark.parametrize(
    "given",
    [None, "text", 3, [1.0], {}, {"a": "b"}, {"a": None}, {1: 2.0}, {"a": math.nan}, {"a": [1.0]}],
)
def test_what_is_no_number_by_name_is_none_of_them(given: Any) -> None:
    assert own_rewards(sample(given)) == {}
