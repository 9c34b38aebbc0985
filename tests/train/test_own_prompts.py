"""Training on prompts of files with a reward of each kind, taken up again, ended by a reward."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from megatron_pg.train import dry_run, load_config  # noqa: E402
from tests.hostile import refused  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import runs, tiny  # noqa: E402
from tests.train.prompt_rewards import share  # noqa: E402
from tests.train.prompt_runs import MODULE, NUM_PROMPTS, config_of, steps_of  # noqa: E402

KINDS: dict[str, Any] = {
    "ours": f"{MODULE}:ours",
    "verl": f"{MODULE}:compute_score",
    "trl": f"{MODULE}:trl",
    "async": f"{MODULE}:later",
    "pool": {"name": f"{MODULE}:compute_score", "num_processes": 1, "timeout_seconds": 60},
    "several": [
        {"name": f"{MODULE}:compute_score", "weight": 0.25},
        {"name": f"{MODULE}:trl", "weight": 0.75},
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_of_each_kind_gives_its_numbers(ranks: Pool, tmp_path: Path, kind: str) -> None:
    config = config_of(tmp_path, KINDS[kind])
    ((samples, metrics),) = ranks.run(1, steps_of, config, timeout=200)
    assert len(samples) == 3 * 4 * 4
    # By hand, from the tokens.
    assert [reward for _, _, reward, _ in samples] == [share(text) for _, text, _, _ in samples]
    means = [sum(r for _, _, r, _ in samples[i : i + 16]) / 16 for i in (0, 16, 32)]
    assert [m["reward/mean"] for m in metrics] == pytest.approx(means)
    assert len({round(reward, 3) for _, _, reward, _ in samples}) > 3
    ids = [group_id for group_id, *_ in samples]
    assert len(set(ids)) == 12 and sum(group_id.endswith("#1") for group_id in set(ids)) == 3
    for _, text, reward, metadata in samples:
        assert metadata["response"] == text and metadata["data_source"] == "digits"
        assert re.fullmatch(r"user : (\d) \+ \1 = \? assistant : ", metadata["prompt"])
        words = {"words": float(len(text.split()))}
        extra = {f"compute_score/{k}": v for k, v in words.items()}
        named = {"compute_score": reward, "trl": reward}
        known = {"verl": words, "pool": words, "several": named | extra}
        assert metadata.get("reward_metrics", {}) == known.get(kind, {})


def test_the_reward_rises(ranks: Pool, tmp_path: Path) -> None:
    settings = {"run__num_steps": 12, "optimizer__lr": 1e-2}
    config = config_of(tmp_path, KINDS["verl"], **settings)
    ((_, metrics),) = ranks.run(1, steps_of, config, timeout=200)
    curve = [m["reward/mean"] for m in metrics]
    assert sum(curve[-3:]) / 3 > sum(curve[:3]) / 3 + 0.2, curve


@pytest.mark.parametrize("layout", ["dp2", "tp2_sp"])
def test_a_run_goes_on_within_an_epoch_bit_for_bit(
    ranks: Pool, tmp_path: Path, layout: str
) -> None:
    config = config_of(tmp_path, KINDS["pool"], run__num_steps=5, run__save_interval=3)
    assert 3 * 4 % NUM_PROMPTS, "the checkpoint lies within an epoch"
    whole = runs.run(ranks, config, layout, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    runs.run(ranks, config, layout, stopped, num_steps=3)
    runs.assert_same(runs.run(ranks, config, layout, stopped), whole)
    other = replace(config.rollout.prompts, template="Q: {question}")
    changed = replace(config, rollout=replace(config.rollout, prompts=other))
    with pytest.raises(AssertionError, match="the saved rollout state is of other prompts"):
        runs.run(ranks, changed, layout, stopped, num_steps=6)


def test_a_reward_that_hangs_is_scored_and_the_run_goes_on(ranks: Pool, tmp_path: Path) -> None:
    reward = {
        "name": f"{MODULE}:hangs_on",
        "kwargs": {"answer": 3},
        "timeout_seconds": 2,
        "num_processes": 4,
        "on_error": "score",
        "error_score": -1.0,
    }
    config = config_of(tmp_path, reward, rollout__shuffle=False, run__num_steps=1)
    ((samples, metrics),) = ranks.run(1, steps_of, config, timeout=200)
    late = [reward == -1.0 for _, _, reward, _ in samples]
    assert late == [False] * 12 + [True] * 4
    counts = [metadata["reward_metrics"] for *_, metadata in samples]
    assert counts == [{"errors": 0.0, "timeouts": float(is_late)} for is_late in late]
    assert metrics[0]["reward/min"] == -1.0


def test_a_reward_that_raises_ends_the_run_and_the_newest_checkpoint_stands(
    tmp_path: Path, commands: Path
) -> None:
    notes = tmp_path / "calls"
    reward = {
        "name": f"{MODULE}:raises_after",
        "kwargs": {"file": str(notes), "calls": 40},
        "num_processes": 1,
    }
    config_of(tmp_path, reward, run__save_interval=1, run__num_steps=5)
    done = tiny.launch([str(tmp_path / "config.yaml")], commands=commands)
    assert done.returncode == 2, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert f"error: rollout.reward '{MODULE}:raises_after' for prompt '{tmp_path}" in told
    assert "raised OSError: [Errno 28] no space left for verdicts (" in told
    assert "goes on after step 2, the newest checkpoint" in told and "Traceback" not in done.stderr
    notes.write_text("")
    again = tiny.launch([str(tmp_path / "config.yaml"), "run.num_steps=4"], commands=commands)
    assert again.returncode == 0, again.stderr
    assert "prompts: 9 from 1 file; held out: 1 from 1 file" in again.stdout
    steps = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [f'"step": {n}.0' in line for n, line in enumerate(steps, start=1)] == [True] * 4


def test_a_dry_run_counts_them(tmp_path: Path) -> None:
    settings = {"max_prompt_tokens": 1, "too_long": "leave_out"}
    config = config_of(tmp_path, KINDS["ours"])
    assert "prompts: 9 from 1 file; held out: 1 from 1 file" in dry_run(config, 1).lines
    none = replace(config.rollout, prompts=replace(config.rollout.prompts, **settings))
    with refused("all prompts are too long: 0 from 1 file, 9 left out for more than 1 tokens"):
        dry_run(replace(config, rollout=none), 1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["rollout.prompts.files=[]"], "rollout.prompts.files is empty: name the files, or remove"),
        (["rollout.reward=null"], "rollout.prompts.files judge no responses: set rollout.reward"),
        (["rollout.task.name=spell_backward"], "both give prompts; remove one of them"),
        (["rollout.source=recorded"], "rollout.prompts would be ignored with rollout.source="),
        (["rollout.prompts.template=a"], "rollout.prompts.template='a' must contain {question}"),
        (
            ["run.eval_prompts=1", "rollout.prompts.val_files=[]"],
            "run.eval_prompts=1 needs prompts that training never sees: name them in rollout.prom",
        ),
        (
            ["run.eval_prompts=0"],
            "rollout.prompts.val_files would be ignored: set run.",
        ),
        (["rollout.prompts.too_long=drop"], "must be one of 'refuse', 'leave_out'"),
        (["rollout.prompts.max_prompt_tokens=0"], "max_prompt_tokens=0 must be at least 1"),
        (["rollout.prompts.answerkey=a"], "answerkey is unknown; did you mean 'answer_key'?"),
        (["rollout.reward=maths"], "rollout.reward name='maths' must be module:name, or one of ma"),
        (["rollout.reward={name: 'a:b', on_eror: score}"], "'on_eror'; did you mean 'on_error'?"),
        (["rollout.reward=[3]"], "rollout.reward=[3] must be text or a mapping or a list of text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_configuration_that_cannot_be_meant(
    tmp_path: Path, changes: list[str], told: str
) -> None:
    config_of(tmp_path, KINDS["ours"])
    with refused(told):
        load_config(tmp_path / "config.yaml", changes)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"run__eval_prompts": 2}, "run.eval_prompts=2: there are 1 held-out prompts"),
        (
            {"rollout__max_response_tokens": 120, "prefix_group__max_tokens_per_microbatch": 200},
            "max_position_embeddings=128 of the model with rollout.max_response_tokens=120 allows",
        ),
        ({"rollout__reward": f"{MODULE}:hangs_on"}, "needs answer, which nothing gives it"),
        ({"rollout__reward": "tests.rollout.reward_functions:needs_column"}, "'difficulty'"),
        ({"rollout__reward": "tests.nowhere:score"}, "no module named 'tests.nowhere'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_files_do_not_give_is_told_before_anything_is_built(
    ranks: Pool, tmp_path: Path, overrides: dict[str, Any], told: str
) -> None:
    from tests.train import own_parts

    config = config_of(tmp_path, KINDS["ours"], **overrides)
    (message,) = ranks.run(1, own_parts.run_or_refusal, config)
    assert told in message
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_held_out_rows_that_a_reward_cannot_judge_are_told_before_anything_is_built(
    ranks: Pool, tmp_path: Path
) -> None:
    from tests.train import own_parts

    config = config_of(tmp_path, KINDS["verl"], run__eval_prompts="all")
    row = {"question": "1 - 1 = ?", "n": 0, "data_source": "digits", "extra_info": {"n": 0}}
    (tmp_path / "val.jsonl").write_text(json.dumps(row) + "\n")
    (message,) = ranks.run(1, own_parts.run_or_refusal, config)
    assert f"compute_score' needs 'ground_truth', which prompts such as '{tmp_path}" in message
    assert message.startswith("run.eval_prompts=all: ") and "val.jsonl, line 1'" in message
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    with refused("needs 'ground_truth'", "val.jsonl, line 1"):
        dry_run(config, 1)
