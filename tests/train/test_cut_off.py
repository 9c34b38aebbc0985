"""Runs in bf16 that are killed while they write a checkpoint go on from the one before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron_pg.train import load_config  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import tiny  # noqa: E402
from tests.train.cut_off import told, train_and_die  # noqa: E402
from tests.train.runs import assert_same, on_layout, result, run, train  # noqa: E402

LAST = 2
SAVED = f"iter_{LAST - 1:07d}"


@pytest.mark.megatron
@pytest.mark.parametrize(
    ("layout", "is_async"),
    [("pp2", True), ("tp2_sp_distributed", False), ("dp2_distributed", True)],
    ids=["pp2-async", "tp2_sp_distributed-sync", "dp2_distributed-async"],
)
def test_a_run_cut_off_in_a_write_goes_on_as_if_it_had_not_been(
    ranks: Pool, layout: str, is_async: bool, tmp_path: Path
) -> None:
    sections = tiny.run_sections(tmp_path)
    sections["model"]["transformer"] = {"params_dtype": "bfloat16"}
    sections["run"] |= {"groups_per_step": 2, "num_steps": 4, "self_check_interval": None}
    config = load_config(tiny.write_config(tmp_path / "run.yaml", sections))
    straight = run(ranks, config, layout, tmp_path / "straight")
    assert {weight.dtype for weight in straight[0].values()} == {torch.bfloat16}
    assert all(metrics["actor/grad_norm"] > 0 for metrics in straight[1])
    config = on_layout(config, layout, tmp_path / "cut", save_interval=1, async_save=is_async)
    codes = ranks.start(2, train_and_die, config, LAST).wait(300)
    assert -9 in codes.values() and 0 not in codes.values()
    checkpoints = tmp_path / "cut" / "checkpoints"
    names = sorted(path.name for path in checkpoints.iterdir())
    (partial,) = (name for name in names if name.startswith(f".partial-{LAST}-"))
    assert names == [partial, "huggingface", SAVED, "latest_checkpointed_iteration.txt"]
    assert (checkpoints / names[-1]).read_text() == str(LAST - 1)
    if is_async:
        # The step after the save was over before a file of it was complete.
        assert told(config) == {"is_done": False, "names": names, "step": LAST + 1}
    # What was saved is the state of its step: the weights had moved on when it was written.
    ranks.run(2, train, config, timeout=300)
    assert_same(result(config), straight)
    assert not list(checkpoints.glob(".partial-*"))
