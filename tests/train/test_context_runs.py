"""Runs whose rows context-parallel ranks divide, against the same runs on one rank."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from megatron_pg.train import TrainConfig, load_config  # noqa: E402
from megatron_pg.train.__main__ import main  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import family_runs, held_out, runs, tiny  # noqa: E402
from tests.train.layouts import NUM_RANKS  # noqa: E402

# Of metrics between layouts; a few sums are near zero.
NEAR: dict[str, Any] = dict(rel=2e-4, abs=2e-6)


def metrics_of(out: Path) -> list[dict[str, float]]:
    """Of every step and evaluation, but times and how rows are laid out."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    left_out = ("time", "perf", "packing", "pipeline")
    return [
        {
            name: value
            for name, value in json.loads(line).items()
            if name.split("/")[0] not in left_out and name != "tokens/padded"
        }
        for line in lines
    ]


def assert_alike(ours: Path, want: Path) -> None:
    for mine, theirs in zip(metrics_of(ours), metrics_of(want), strict=True):
        assert mine.keys() == theirs.keys()
        differing = {
            n: (mine[n], x) for n, x in theirs.items() if mine[n] != pytest.approx(x, **NEAR)
        }
        assert not differing


def on(ranks: Pool, config: TrainConfig, layout: str, folder: Path) -> Path:
    own = runs.on_layout(config, layout, folder / layout)
    ranks.run(NUM_RANKS[layout], runs.train, own, log=folder / f"{layout}.log", timeout=300)
    return folder / layout


def test_what_replicas_agree_on_is_what_one_rank_finds(ranks: Pool, tmp_path: Path) -> None:
    """Dynamic sampling a step ahead, judged on the way, and the best weights kept."""
    config = held_out.config_of(
        tmp_path,
        algorithm__filter_groups={"enable": True},
        algorithm__policy={"importance_mode": "token_truncate"},
        run__rollout_ahead=True,
        run__num_steps=4,
        run__eval_prompts=3,
        run__eval_interval=1,
        run__keep_best=True,
        run__log_generations_interval=1,
    )
    one, cp2 = (on(ranks, config, layout, tmp_path) for layout in ("one", "cp2"))
    assert_alike(cp2, one)
    for out in (one, cp2):
        steps = [m for m in metrics_of(out) if "actor/loss" in m]
        assert [m["rollout/lag_steps"] for m in steps] == [0, 1, 1, 1]
        assert all(m["filter_groups/batches"] == 2 for m in steps)
        assert (out / "checkpoints" / "iter_0000002").is_dir(), "the best of HELD_OUT"
    names = [sorted(p.name for p in (out / "generations").iterdir()) for out in (one, cp2)]
    assert names[0] == names[1] and names[0]


@pytest.fixture(scope="module")
def replayed(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    """A run on one rank: two epochs of two minibatches, in groups larger than a row."""
    folder = tmp_path_factory.mktemp("replayed")
    config = family_runs.prepare(
        folder,
        "qwen3_moe",
        algorithm__router_replay="R2",
        algorithm__ppo_epochs=2,
        algorithm__use_kl_in_reward=True,
        prefix_group__max_tokens_per_microbatch=24,
        prefix_group__prefix_resident="always",
        run__num_steps=3,
        run__self_check_interval=1,
    )
    return config, on(ranks, config, "one", folder)


@pytest.mark.parametrize("layout", ["cp2_ep2", "cp2_pp2"])
def test_routes_that_the_old_policy_took_and_rewards_with_kl(
    ranks: Pool, replayed: tuple[TrainConfig, Path], layout: str, tmp_path: Path
) -> None:
    config, want = replayed
    out = on(ranks, config, layout, tmp_path)
    assert_alike(out, want)
    for step in metrics_of(out):
        assert step["actor/updates"] == 4 and step["check/packed_vs_written_out"] < 1e-5
        assert step["tokens/resident"] > 0
        assert bool(step["reward/kl_penalty"]) == (step["step"] > 1), "the first policy is its own"
    ours, one, start = (
        runs.load_weights(folder)
        for folder in (out / "hf_step_3", want / "hf_step_3", want.parent / "model")
    )
    assert family_runs.largest_difference(ours, one, start) <= 2e-4


def as_program(arguments: Sequence[str]) -> None:
    """This rank of ``python -m megatron_pg.train``."""
    with mock.patch.object(sys, "argv", ["train", *arguments]):
        main()


def test_a_rank_that_is_killed_ends_the_others_and_changes_nothing(
    ranks: Pool, tmp_path: Path
) -> None:
    """Taken up by as many context-parallel ranks to the last bit, and by one alone."""
    sections = tiny.run_sections(tmp_path)
    sections["algorithm"] = {"num_minibatches": 2}
    sections["parallel"] = {"context_parallel_size": 2}
    sections["run"] |= {"num_steps": 8, "groups_per_step": 2, "self_check_interval": None}
    sections["run"] |= {"save_interval": 1, "export_hf": True}
    file = tiny.write_config(tmp_path / "run.yaml", sections)
    config = load_config(file)
    straight = runs.run(ranks, config, "cp2", tmp_path / "straight")
    out, log = Path(config.run.out), tmp_path / "killed.log"
    job = ranks.start(2, as_program, [str(file)], log=log)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "iter_0000002").is_dir():
        assert not job.poll() and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.002)
    job.kill([1])
    assert job.wait(60) == {0: 3, 1: -9}
    told = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "no connection to the other ranks" in told[0], told
    assert "the same command goes on after step" in told[0] and "Traceback" not in log.read_text()
    alone = tmp_path / "alone"
    shutil.copytree(out, alone)
    runs.assert_same(runs.run(ranks, config, "cp2", out), straight)
    weights, _ = runs.run(ranks, config, "one", alone)
    runs.assert_near(weights, straight[0], runs.load_weights(tmp_path / "model"), 2e-3)
