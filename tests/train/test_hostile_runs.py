"""Runs that are killed, stopped, starved of disk or doubled at any moment; see ``disturbances``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from tests.hostile import seeds  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train.disturbances import (  # noqa: E402
    KINDS,
    check_disturbed,
    check_full_disk,
    count_events,
    kind_of,
)
from tests.train.test_runs import prepare  # noqa: E402

SEEDS = seeds(cost=20)
FILES = [
    "metrics.jsonl",
    "tensorboard",
    ".distcp",
    ".distcp in the background",
    ".metadata",
    "progress.json",
    "latest_checkpointed_iteration.txt",
    "hf_step_4",
    "summary.json",
    "reward.png",
]


def prepare_runs(folder: Path) -> None:
    prepare(
        folder,
        algorithm__ppo_epochs=1,
        algorithm__num_minibatches=1,
        algorithm__policy={},
        run__groups_per_step=2,
        run__num_steps=4,
        run__save_interval=1,
        run__export_hf=True,
        run__tensorboard=True,
        prefix_group__max_tokens_per_microbatch=200,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    prepare_runs(folder)
    return folder


@pytest.fixture(scope="module")
def events_of(ranks: Pool, folder: Path) -> Callable[[int], list[int]]:
    """Events of a run that nobody disturbs, by rank, on so many ranks."""
    return cache(lambda num_ranks: count_events(ranks, folder, num_ranks))


@pytest.mark.parametrize("seed", [pytest.param(s, id=f"{s}-{kind_of(s)}") for s in SEEDS])
def test_a_disturbed_run_goes_on_bit_for_bit(
    ranks: Pool, folder: Path, events_of: Callable[[int], list[int]], seed: int
) -> None:
    check_disturbed(ranks, folder, seed, events_of)


def test_every_kind_of_disturbance_occurs() -> None:
    assert {kind_of(seed) for seed in SEEDS} == set(KINDS)


@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_is_one_message(ranks: Pool, folder: Path, file: str) -> None:
    check_full_disk(ranks, folder, file)
