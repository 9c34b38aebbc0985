"""Runs of a model with windows and sinks from scratch: layouts, resident prompts, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.train import dry_run  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import scratch  # noqa: E402

pytestmark = pytest.mark.megatron

WINDOWS = scratch.SIZES | dict(
    normalization="RMSNorm",
    window_size=[4, 0],
    window_attn_skip_freq=[1, 0],
    softmax_type="learnable",
)


@pytest.fixture(scope="module")
def straight(ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("windows")
    config = scratch.make_config(folder, WINDOWS)
    return config, *scratch.run(ranks, config, folder / "straight")


def test_offsets_train(straight: Any) -> None:
    config, (weights,), steps = straight
    offsets = [x for name, x in weights.items() if name.endswith("core_attention.softmax_offset")]
    assert [x.shape for x in offsets] == [(4,), (4,)]
    assert dry_run(config, 1).parameters_per_rank == sum(x.numel() for x in weights.values())
    assert steps[0]["check/packed_vs_written_out"] < 1e-5


@pytest.mark.parametrize("mode", ["retain", "recompute"])
def test_prompts_that_are_resident(ranks: Pool, straight: Any, mode: str, tmp_path: Path) -> None:
    config, _, want = straight
    _, got = scratch.run(ranks, scratch.with_resident_prompts(config, mode), tmp_path / "out")
    assert all(step["packing/resident_groups"] > 0 for step in got)
    scratch.assert_same_training(got, want)


def test_a_resumed_run_is_bit_identical(ranks: Pool, straight: Any, tmp_path: Path) -> None:
    config, (weights,), _ = straight
    out = tmp_path / "resumed"
    scratch.run(ranks, config, out, num_steps=2)
    (resumed,), steps = scratch.run(ranks, config, out)
    assert len(steps) == scratch.NUM_STEPS and resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_ranks_go_on_as_one(ranks: Pool, straight: Any, tmp_path: Path) -> None:
    """From a checkpoint: what a seed begins with depends on how many ranks draw offsets."""
    config, _, want = straight
    out = tmp_path / "out"
    scratch.run(ranks, config, out, num_steps=2)
    _, got = scratch.run(ranks, config, out, "tp2_sp")
    scratch.assert_same_training(got, want)
    assert min(step["actor/grad_norm"] for step in want) > config.optimizer.clip_grad > 0
