"""What ``progress.json`` may hold, beyond what a run's own checkpoints show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from megatron_pg.train import TrainConfig  # noqa: E402
from megatron_pg.train.checkpoints.progress import (  # noqa: E402
    changed_settings,
    course_settings,
    parse_progress,
)

TOTALS = dict.fromkeys(("unique_tokens", "logical_tokens", "seconds", "checkpoint_seconds"), 1)
CONTENT: dict[str, Any] = dict(
    step=2, use_distributed_optimizer=False, stream={"num_taken": 9}, totals=TOTALS, evaluations={}
)
PATH = Path("iter_0000002/progress.json")


@pytest.mark.parametrize(
    "number", [10**400, float("inf"), float("nan"), True, None, "1"], ids=lambda x: f"{x!s:.9}"
)
@pytest.mark.parametrize("section", ["totals", "evaluations"])
def test_numbers_that_no_run_writes(section: str, number: Any) -> None:
    parse_progress(json.dumps(CONTENT).encode(), PATH)
    values = dict(mean=number, num_prompts=1, standard_error=0.1)
    changed = TOTALS | {"seconds": number} if section == "totals" else {"before": values}
    with pytest.raises(ValueError, match=rf"progress\.json: {section}"):
        parse_progress(json.dumps(CONTENT | {section: changed}).encode(), PATH)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_evaluations_are_of_whole_prompts(count: float) -> None:
    values = dict(mean=0.5, num_prompts=count, standard_error=0.1)
    text = json.dumps(CONTENT | {"evaluations": {"before": values}}).encode()
    with pytest.raises(ValueError, match=r"progress\.json: evaluations.before.num_prompts"):
        parse_progress(text, PATH)


def test_a_name_that_stands_there_twice() -> None:
    text = json.dumps(CONTENT).replace('"step": 2', '"step": 1, "step": 2').encode()
    with pytest.raises(ValueError, match=r"progress\.json: .*'step'"):
        parse_progress(text, PATH)


# Settings that an earlier version did not have.
NEW = ("run.rollout_ahead", "algorithm.filter_groups.enable", "rollout.prompts.prompt_key")


def test_settings_that_an_earlier_version_lacked_are_as_they_were_at_their_defaults() -> None:
    now = course_settings(TrainConfig())
    assert now.keys() > set(NEW)
    before = {name: value for name, value in now.items() if name not in NEW}
    assert changed_settings(before, now) == {}
    changed = changed_settings(before, now | {"run.rollout_ahead": True})
    assert changed == {"run.rollout_ahead": [None, True]}
    # What a run had and has no more.
    assert changed_settings(now | {"run.gone": 1}, now) == {"run.gone": [1, None]}
