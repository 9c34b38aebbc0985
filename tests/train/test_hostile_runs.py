"""Runs that are killed, stopped, starved of disk or doubled at any moment; see the worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from tests.hostile import seeds  # noqa: E402
from tests.train.hostile_runs_worker import KINDS  # noqa: E402
from tests.train.test_runs import prepare  # noqa: E402
from tests.utils import run_ranks  # noqa: E402

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
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    prepare_runs(folder)
    arguments = [*map(str, SEEDS), *FILES]
    output = run_ranks(
        "tests.train.hostile_runs_worker", 1, str(folder), *arguments, timeout=60 * len(arguments)
    )
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {line["argument"]: line for line in lines}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_disturbed_run_goes_on_bit_for_bit(seed: int, outcomes: dict[str, Any]) -> None:
    assert outcomes[str(seed)]["wrong"] is None, outcomes[str(seed)]["wrong"]


def test_every_kind_of_disturbance_occurs(outcomes: dict[str, Any]) -> None:
    cases = {line["case"].split(" of rank ")[0] for line in outcomes.values() if "case" in line}
    assert cases == set(KINDS)


@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_is_one_message(file: str, outcomes: dict[str, Any]) -> None:
    assert outcomes[file]["wrong"] is None, outcomes[file]["wrong"]
