"""Tasks and sources of one's own, named in a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from megatron_pg.train import TrainConfig, load_config  # noqa: E402
from megatron_pg.train.config import TaskConfig  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import own_parts, tiny  # noqa: E402


def config_of(folder: Path, **overrides: Any) -> TrainConfig:
    sections = tiny.run_sections(folder)
    tiny.save_tokenizer(folder / "model")
    sections["run"]["num_steps"] = 1
    sections["rollout"] = {
        "source": "tests.train.own_parts:Source",
        "num_generations": 3,
        "max_response_tokens": 5,
        "task": {"name": "tests.train.own_parts:Task"},
    }
    return load_config(tiny.write_config(folder / "config.yaml", sections, **overrides))


def test_sums_have_settings_that_no_other_task_gets() -> None:
    assert TaskConfig().config == {"max_terms": 2, "max_digits": 1}
    assert TaskConfig(config={"max_terms": 3}).config == {"max_terms": 3}
    assert TaskConfig(name="spell_backward").config == TaskConfig(name="mine:Task").config == {}


@pytest.mark.parametrize(
    ("fails_in", "fails_on"),
    [("", 0), ("start", 0), ("start", 1), ("generate", 0), ("update_weights", 1)],
)
def test_what_a_source_raises_on_one_rank_ends_all(
    ranks: Pool, tmp_path: Path, fails_in: str, fails_on: int
) -> None:
    settings = {"fails_in": fails_in, "fails_on": fails_on}
    config = config_of(tmp_path, rollout__source_config=settings)
    want = f"no {fails_in} here" if fails_in else "nothing"
    assert ranks.run(2, own_parts.run_or_refusal, config) == [want] * 2
    assert (tmp_path / "out" / "summary.json").is_file() == (not fails_in)


def test_an_evaluation_without_held_out_prompts_is_refused_before_anything_is_built(
    ranks: Pool, tmp_path: Path
) -> None:
    config = config_of(tmp_path, run__eval_prompts=3)
    (told,) = ranks.run(1, own_parts.run_or_refusal, config)
    assert "run.eval_prompts=3: Task has no held_out()" in told
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_groups_are_gone_when_gradients_are_made(ranks: Pool, tmp_path: Path) -> None:
    assert ranks.run(2, own_parts.groups_alive_in_backward, config_of(tmp_path)) == [(5, 0), (0, 0)]
