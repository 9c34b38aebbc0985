"""Dynamic sampling: which groups a step gets, on whichever ranks they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from megatron_pg.data import Group, Sample  # noqa: E402
from megatron_pg.train import TrainConfig, load_config  # noqa: E402
from megatron_pg.train.config import FilterGroupsConfig  # noqa: E402
from megatron_pg.train.rollouts.filter_groups import _Told  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import filtered, held_out, tiny  # noqa: E402
from tests.train.runs import train  # noqa: E402

ON = FilterGroupsConfig(enable=True)
WAYS = [(1, False), (1, True), (2, False), (2, True), (3, True)]
# Prompts with spread of the first three steps; every third prompt, from the first, has none.
STEPS = [(1, 2, 4, 5), (8, 10, 11, 13), (16, 17, 19, 20)]


@pytest.mark.parametrize(("num_ranks", "everywhere"), WAYS)
def test_a_step_has_the_next_groups_with_spread(
    ranks: Pool, num_ranks: int, everywhere: bool
) -> None:
    told = ranks.run(num_ranks, filtered.take, 2, 4, ON, {"everywhere": everywhere})
    for number, step in enumerate(zip(*told)):
        want = [(place, f"train/{i}") for place, i in enumerate(STEPS[number])]
        assert sorted(one for own, _, _ in step for one in own) == want
        # Two batches of four, whose last group with spread is left over.
        assert [taken for _, _, taken in step] == [8 * (number + 1)] * num_ranks
        for _, metrics, _ in step:
            assert metrics["filter_groups/batches"] == 2
            assert metrics["filter_groups/surplus"] == 1
            assert metrics["filter_groups/without_spread"] == 3
    first = [own for own, _, _ in next(iter(zip(*told)))]
    assert sum(map(bool, first)) == (num_ranks if everywhere else 1)
    # Three of the first eight groups are all right, the others half.
    assert told[0][0][1]["filter_groups/reward"] == (3 * 1 + 5 * 0.5) / 8


@pytest.mark.parametrize(("num_ranks", "everywhere"), WAYS)
def test_at_the_limit_a_step_is_filled_up(ranks: Pool, num_ranks: int, everywhere: bool) -> None:
    settings = replace(ON, max_num_gen_batches=1)
    told = ranks.run(num_ranks, filtered.take, 1, 4, settings, {"everywhere": everywhere})
    found = sorted(one for ((own, _, _),) in told for one in own)
    assert found == [(i, f"train/{i}") for i in range(4)]
    assert told[0][0][1]["filter_groups/without_spread"] == 2


def test_what_was_aborted_makes_no_spread() -> None:
    ids, mask = torch.tensor([3]), torch.ones(1, dtype=torch.bool)
    one = Sample(prompt_ids=ids, response_ids=ids, reward=1.0, loss_mask=mask)
    aborted = replace(one, reward=0.0, status="aborted")
    assert _Told.of(Group("a", (one, one, aborted))) == _Told(False, 2.0, 2)
    assert _Told.of(Group("a", (aborted, aborted))) == _Told(False, 0.0, 0)
    assert _Told.of(Group("a", (one, replace(one, reward=0.5)))) == _Told(True, 1.5, 2)


def test_a_rollout_of_several_samples_has_one_reward() -> None:
    ids, mask = torch.tensor([3]), torch.ones(1, dtype=torch.bool)
    one = Sample(prompt_ids=ids, response_ids=ids, reward=1.0, loss_mask=mask, rollout_id="a")
    other, alone = replace(one, reward=0.5, rollout_id="b"), replace(one, rollout_id=None)
    assert _Told.of(Group("g", (one, one, other, one, alone))) == _Told(True, 2.5, 3)
    aborted = replace(one, status="aborted")
    assert _Told.of(Group("g", (aborted, other, other))) == _Told(False, 0.5, 1)


def timeless(config: TrainConfig) -> list[dict[str, float]]:
    lines = (Path(config.run.out) / "metrics.jsonl").read_text().splitlines()
    kept = ("time", "perf", "rollout", "filter_groups")
    return [
        {k: v for k, v in json.loads(line).items() if k.split("/")[0] not in kept} for line in lines
    ]


def config_of(folder: Path, source: dict[str, Any] | None = None, **settings: Any) -> TrainConfig:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"enable": True, **settings}
    return held_out.config_of(
        folder, source, algorithm__filter_groups=settings, run__num_steps=3, run__save_interval=1
    )


@pytest.mark.parametrize(("num_ranks", "everywhere"), [(1, False), (2, True)])
def test_it_trains_as_from_a_recording_of_these_groups_and_resumes(
    ranks: Pool, tmp_path: Path, num_ranks: int, everywhere: bool
) -> None:
    config = config_of(tmp_path / "sampled", {"everywhere": everywhere})
    ranks.run(num_ranks, train, config, timeout=300)
    sampled = timeless(config)
    (tmp_path / "recorded").mkdir()
    groups = filtered.recorded([number for step in STEPS for number in step])
    sections = tiny.run_sections(tmp_path / "recorded", groups)
    sections["rollout"]["shuffle"] = False
    sections["run"] |= {"groups_per_step": 4, "self_check_interval": None}
    sections["prefix_group"]["max_tokens_per_microbatch"] = 90
    recorded = load_config(tiny.write_config(tmp_path / "recorded" / "c.yaml", sections))
    ranks.run(num_ranks, train, recorded, timeout=300)
    assert sampled == timeless(recorded)
    assert all(m["actor/grad_norm"] > 0 and m["groups/without_spread"] == 0 for m in sampled)
    # Stopped after the first step.
    again = replace(config, run=replace(config.run, out=str(tmp_path / "again")))
    ranks.run(num_ranks, train, replace(again, run=replace(again.run, num_steps=1)), timeout=300)
    ranks.run(num_ranks, train, again, timeout=300)
    assert timeless(again) == sampled


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_prompts_that_are_all_too_easy(ranks: Pool, tmp_path: Path, num_ranks: int) -> None:
    source = {"flat": True, "everywhere": num_ranks == 2}
    trained = config_of(tmp_path / "train", source, max_num_gen_batches=2)
    assert ranks.run(num_ranks, held_out.run_or_refusal, trained) == ["nothing"] * num_ranks
    steps = timeless(trained)
    assert [m["actor/updates"] for m in steps] == [0, 0, 0]
    assert [m["groups/skipped"] for m in steps] == [4, 4, 4]
    told = config_of(tmp_path / "raise", source, max_num_gen_batches=2, at_limit="raise")
    refusals = ranks.run(num_ranks, held_out.run_or_refusal, told)
    words = "algorithm.filter_groups.max_num_gen_batches=2: of 8 groups 0 have spread"
    assert all(one.startswith(words) for one in refusals), refusals
