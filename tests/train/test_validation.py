"""Evaluations in training, the best checkpoint, and what is logged of what was sampled."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from megatron_pg.train import TrainConfig, load_config  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.train import held_out, tiny  # noqa: E402
from tests.train.layouts import NUM_RANKS  # noqa: E402
from tests.train.runs import on_layout, train  # noqa: E402

EVALUATED = {
    "run__eval_prompts": "all",
    "run__eval_generations": 2,
    "run__eval_interval": 2,
    "run__keep_best": True,
    "run__keep_checkpoints": 1,
}


def run(ranks: Pool, config: TrainConfig, num_ranks: int = 1, **changes: Any) -> str:
    """What the run printed."""
    config = replace(config, run=replace(config.run, **changes))
    log = Path(config.run.out).parent / "log"
    log.unlink(missing_ok=True)
    ranks.run(num_ranks, train, config, log=log, timeout=300)
    return log.read_text()


def rows(config: TrainConfig) -> list[dict[str, float]]:
    lines = (Path(config.run.out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def timeless(config: TrainConfig) -> list[dict[str, float]]:
    kept = ("time", "perf")
    return [{k: v for k, v in m.items() if k.split("/")[0] not in kept} for m in rows(config)]


def summary(config: TrainConfig) -> Any:
    return json.loads((Path(config.run.out) / "summary.json").read_text())


def checkpoints(config: TrainConfig) -> list[str]:
    return sorted(p.name for p in (Path(config.run.out) / "checkpoints").glob("iter_*"))


@pytest.mark.parametrize(("num_ranks", "everywhere"), [(1, False), (2, False), (2, True)])
def test_held_out_prompts_are_judged_on_the_way_and_the_best_weights_stay(
    ranks: Pool, tmp_path: Path, num_ranks: int, everywhere: bool
) -> None:
    source = {"everywhere": everywhere}
    config = held_out.config_of(tmp_path, source, **EVALUATED, run__save_interval=1)
    told = run(ranks, config, num_ranks)
    steps = rows(config)
    assert [m["step"] for m in steps] == [0, 1, 2, 3, 4, 5]
    judged = {m["step"]: m for m in steps if "eval/prompts" in m}
    assert sorted(judged) == [0, 2, 4, 5], "before, every other step and the last one"
    for step, metrics in judged.items():
        reward = held_out.HELD_OUT[int(step)]
        assert metrics["eval/prompts"] == 6
        for name in ("", "held_out_0/", "held_out_1/"):
            assert metrics[f"eval/{name}reward/mean@2"] == reward
            assert metrics[f"eval/{name}reward/pass@2"] == reward
        assert metrics["eval/reward/form"] == 0.5
        assert ("time/eval" in metrics) == (step > 0)
        best = metrics.get("eval/best"), metrics.get("eval/best_step")
        assert best == ((0.75, 2) if step else (None, None))
    assert "reward/mean" not in steps[0]
    assert all(m["reward/form"] == 1.5 for m in steps[1:])
    # The best one and the newest one.
    assert checkpoints(config) == ["iter_0000002", "iter_0000005"]
    whole = summary(config)
    assert whole["best"] == {"step": 2, "value": 0.75}
    assert (whole["reward_before"], whole["reward_after"]) == (0.25, 0.5)
    assert whole["evaluations"]["after"]["eval/reward/mean@2"] == 0.5
    assert told.count("held-out reward") == 4 and "held-out reward after step 4: 0.625" in told


def test_without_an_interval_of_its_own_only_the_best_is_saved(ranks: Pool, tmp_path: Path) -> None:
    config = held_out.config_of(tmp_path, **EVALUATED)
    run(ranks, config, num_steps=4)
    assert checkpoints(config) == ["iter_0000002"]
    # What goes on from there repeats what was lost.
    straight = timeless(config)
    run(ranks, config, num_steps=4)
    assert timeless(config) == straight


def test_the_best_survives_a_resume(ranks: Pool, tmp_path: Path) -> None:
    config = held_out.config_of(tmp_path, **EVALUATED, run__save_interval=1)
    run(ranks, config)
    straight, whole = timeless(config), summary(config)
    again = replace(config, run=replace(config.run, out=str(tmp_path / "again")))
    assert "resuming" not in run(ranks, again, num_steps=3)
    assert checkpoints(again) == ["iter_0000002", "iter_0000003"]
    told = run(ranks, again)
    newest = Path(again.run.out) / "checkpoints" / "iter_0000003"
    assert "".join(told.split()).count(f"resumingfromstep3:{newest}") == 1
    # The shorter run judged its last step, too.
    assert [m for m in timeless(again) if m["step"] != 3] == [m for m in straight if m["step"] != 3]
    assert summary(again)["best"] == whole["best"] == {"step": 2, "value": 0.75}
    assert checkpoints(again) == ["iter_0000002", "iter_0000005"]


def test_a_run_that_begins_again_is_judged_once(ranks: Pool, tmp_path: Path) -> None:
    config = held_out.config_of(tmp_path, run__eval_prompts=2, run__eval_interval=2)
    run(ranks, config, num_steps=2)
    straight = timeless(config)
    run(ranks, config, num_steps=2)
    assert timeless(config) == straight and [m["step"] for m in straight] == [0, 1, 2]
    # Judged for the first time in the middle.
    late = held_out.config_of(tmp_path / "late", run__save_interval=2)
    run(ranks, late, num_steps=2)
    judged = replace(late, run=replace(late.run, eval_prompts=2, eval_interval=2))
    told = run(ranks, judged, num_steps=4)
    steps = [m["step"] for m in timeless(judged) if "eval/prompts" in m]
    assert steps == [4] and [m["step"] for m in timeless(judged)] == [1, 2, 3, 4]
    # The weights of the second step are not those before training.
    assert "before training" not in told and summary(judged)["evaluations"].keys() == {"after"}
    whole = summary(judged)
    assert (whole["reward_before"], whole["reward_after"], whole["standard_error"]) == (
        None,
        held_out.HELD_OUT[4],
        None,
    )


def test_a_best_checkpoint_that_is_gone_is_the_best_no_more(ranks: Pool, tmp_path: Path) -> None:
    config = held_out.config_of(tmp_path, **EVALUATED, run__save_interval=1)
    run(ranks, config, num_steps=3)
    shutil.rmtree(Path(config.run.out) / "checkpoints" / "iter_0000002")
    run(ranks, config)
    assert summary(config)["best"] == {"step": 4, "value": 0.625}
    assert checkpoints(config) == ["iter_0000004", "iter_0000005"]


@pytest.mark.parametrize("layout", ["pp2", "dp2", "cp2"])
def test_the_model_is_judged_alike_on_every_layout(
    ranks: Pool, tmp_path: Path, layout: str
) -> None:
    """The randomness of a sample is its own, so the same is written on one rank and on two."""
    pytest.importorskip("reasoning_gym")
    sections = tiny.run_sections(tmp_path)
    tiny.save_tokenizer(tmp_path / "model")
    sections["optimizer"]["lr"] = 0.0
    sections["rollout"] = {
        "source": "model",
        "reward": "tests.train.rewards:share_of_digits",
        "num_generations": 2,
        "max_response_tokens": 6,
    }
    sections["prefix_group"]["max_tokens_per_microbatch"] = 90
    sections["run"] |= {"groups_per_step": 3, "num_steps": 2, "eval_prompts": 5}
    sections["run"] |= {"eval_generations": 3, "eval_interval": 1, "log_generations_interval": 1}
    config = load_config(tiny.write_config(tmp_path / "config.yaml", sections))
    found = []
    for name in ("one", layout):
        own = on_layout(config, name, tmp_path / name)
        ranks.run(NUM_RANKS[name], train, own, timeout=300)
        judged = [{k: v for k, v in m.items() if k.startswith("eval/")} for m in rows(own)]
        files = sorted((tmp_path / name / "generations").iterdir())
        found.append((judged, {file.name: file.read_text() for file in files}))
    (judged, files), other = found
    assert other == (judged, files)
    names = [f"{split}_{step}.jsonl" for split in ("eval", "train") for step in (0, 1, 2)]
    assert sorted(files) == [name for name in names if name != "train_0.jsonl"]
    # The learning rate is 0.
    assert judged[0] == judged[1] == judged[2] and files["eval_0.jsonl"].count("\n") == 15
    assert judged[0]["eval/reward/mean@3"] < judged[0]["eval/reward/pass@3"]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_generations_are_written_and_a_few_are_shown(
    ranks: Pool, tmp_path: Path, num_ranks: int
) -> None:
    config = held_out.config_of(
        tmp_path,
        {"everywhere": num_ranks == 2},
        run__eval_prompts=3,
        run__log_generations_interval=2,
        run__log_generations=2,
        run__tensorboard=True,
    )
    told = run(ranks, config, num_ranks, num_steps=3)
    folder = Path(config.run.out) / "generations"
    # Evaluations before and after, and every other step.
    assert sorted(p.name for p in folder.iterdir()) == [
        *("eval_0.jsonl", "eval_3.jsonl", "train_2.jsonl")
    ]
    lines = [json.loads(line) for line in (folder / "train_2.jsonl").read_text().splitlines()]
    assert [line["group_id"] for line in lines] == [
        f"train/{i}" for i in range(4, 8) for _ in "gggg"
    ]
    assert lines[1] == {
        "step": 2,
        "group_id": "train/4",
        "prompt": "question 4",
        "response": "answer 1",
        "reward": 1.0,
        "status": "completed",
        "num_tokens": 3,
        "data_source": "train_0",
        "reward_metrics": {"form": 1.0},
    }
    assert told.count("train step 2, reward") == 2 and told.count("eval step 3, reward") == 2
    assert "  prompt: question 4\n  response: answer 0\n" in told
    assert "question 6" not in told, "one response of each of the first prompts"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder.parent / "tensorboard"))
    events.Reload()
    tags = [f"generations/{split}/text_summary" for split in ("eval", "train")]
    assert set(tags) <= set(events.Tags()["tensors"])
    (page,) = [e.tensor_proto.string_val[0] for e in events.Tensors(tags[1])]
    assert b"prompt\n\n    question 4\n\nresponse\n\n    answer 0" in page
