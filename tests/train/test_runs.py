"""Whole runs: packed against written out, stopped against never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import tiny
from tests.utils import run_ranks


def prepare(folder: Path, **overrides: object) -> None:
    """Groups of four samples, so that minibatches are equal however samples are grouped."""
    groups = [g for g in tiny.make_groups(9, seed=3) if len(g.samples) == 4]
    assert len(groups) == 8
    sections = tiny.run_sections(folder, groups)
    sections["rollout"]["shuffle"] = False
    sections["algorithm"] = {
        "ppo_epochs": 2,
        "num_minibatches": 2,
        "policy": {"kl_loss_coef": 0.1, "clip_ratio_c": 3.0},
    }
    sections["run"] |= {"groups_per_step": 4, "num_steps": 10}
    sections["prefix_group"]["max_tokens_per_microbatch"] = 70
    sections["run"]["self_check_interval"] = None
    tiny.write_config(folder / "config.yaml", sections, **overrides)


def test_ten_steps_end_at_the_weights_of_a_written_out_run(tmp_path: Path) -> None:
    prepare(tmp_path)
    output = run_ranks("tests.train.runs_worker", 1, "whole_run", str(tmp_path), timeout=900)
    assert output.count("of the movement") == 4


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    prepare(tmp_path, optimizer__lr_warmup_iters=3, rollout__shuffle=True)
    output = run_ranks("tests.train.runs_worker", 1, "resume", str(tmp_path), timeout=900)
    assert output.count("same ") == 2


def test_a_run_goes_on_under_another_layout(tmp_path: Path) -> None:
    prepare(tmp_path, algorithm__ppo_epochs=1)
    output = run_ranks("tests.train.runs_worker", 1, "layouts", str(tmp_path), timeout=900)
    assert output.count("near moved") == 2


def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    prepare(
        tmp_path,
        algorithm__ppo_epochs=1,
        algorithm__num_minibatches=1,
        algorithm__policy={},
        run__groups_per_step=2,
        # Divided groups, so that kills also fall between the phases of resident prompts.
        prefix_group__max_tokens_per_microbatch=24,
        prefix_group__prefix_resident="always",
    )
    output = run_ranks("tests.train.runs_worker", 1, "kill", str(tmp_path), timeout=900)
    assert output.count("killed 10 times") == 1


def test_checkpoints_written_in_the_background_hold_the_saved_step(tmp_path: Path) -> None:
    prepare(tmp_path, algorithm__ppo_epochs=1)
    output = run_ranks("tests.train.runs_worker", 1, "background_save", str(tmp_path), timeout=900)
    assert output.count("same in the background") == 1


def test_rollouts_of_the_model_itself(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    sections = tiny.run_sections(tmp_path)
    tiny.save_tokenizer(tmp_path / "model")
    del sections["rollout"]["files"]
    sections["optimizer"]["lr"] = 0.0
    sections["rollout"] |= {
        "source": "model",
        "reward": "tests.train.rewards:share_of_digits",
        "num_generations": 4,
        "max_response_tokens": 6,
    }
    sections["run"] |= {
        "groups_per_step": 4,
        "num_steps": 2,
        "eval_prompts": 4,
        "eval_generations": 2,
    }
    sections["prefix_group"]["max_tokens_per_microbatch"] = 90
    tiny.write_config(tmp_path / "config.yaml", sections)
    output = run_ranks("tests.train.runs_worker", 1, "sampled", str(tmp_path), timeout=900)
    assert output.count("sampled") == 1
