"""Rows of a verl batch: groups, order, and what is found without verl's names for prompts."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("verl", reason="verl is installed in its own lane")

import megatron_pg.adapters.verl as plugin  # noqa: E402
from megatron_pg.adapters.verl.grouping import find_groups  # noqa: E402

pytestmark = pytest.mark.verl


def test_names() -> None:
    assert plugin.__all__ == [
        "VENDOR",
        "PrefixGroupedMegatronEngine",
        "PrefixGroupedTrainerColocateAsync",
        "PrefixGroupedTrainerSeparateAsync",
        "PrefixGroupedTrainerSync",
    ]
    assert all(hasattr(plugin, name) for name in plugin.__all__)


PROMPTS = [[5, 6], [5, 6, 7, 8], [5], [9], [5, 6], [6, 5], [9, 1], [256, 5]]


@pytest.mark.parametrize(
    ("prompts", "groups"),
    [
        (PROMPTS, [[0, 1, 2, 4], [3, 6], [5], [7]]),
        # Another token's bytes are no start of a token.
        ([[1], [257], [1, 2]], [[0, 2], [1]]),
        ([[3, 1], [3, 2], [3, 1, 4]], [[0, 2], [1]]),
    ],
)
def test_a_whole_prompt_at_the_start_is_a_group(
    prompts: list[list[int]], groups: list[list[int]]
) -> None:
    sequences = [torch.tensor(prompt + [30 + i]) for i, prompt in enumerate(prompts)]
    assert find_groups(sequences, [len(p) for p in prompts]) == groups


def test_two_uids_are_never_one_group() -> None:
    sequences = [torch.tensor([1, 2, 3])] * 4
    assert find_groups(sequences, [2] * 4, ["b", "a", "b", "c"]) == [[0, 2], [1], [3]]
