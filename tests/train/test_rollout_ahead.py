"""Rollouts that are asked for while the step before is trained."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

from megatron_pg.rollout import (  # noqa: E402
    OpenAIServerSource,
    RolloutServerError,
    RolloutSource,
    SampledRollouts,
    SamplingParams,
)
from megatron_pg.rollout.ahead import Ahead  # noqa: E402
from megatron_pg.train import TrainConfig  # noqa: E402
from tests.ranks import Pool  # noqa: E402
from tests.rollout.stand_in import Reply, stand_in, vllm_like  # noqa: E402
from tests.train import held_out, lagging, tiny  # noqa: E402
from tests.train.runs import train  # noqa: E402
from tests.train.test_lifetime import heeds_ctrl_c  # noqa: E402, F401
from tests.utils import ROOT  # noqa: E402

POLICY = {"importance_mode": "token_truncate"}
PARAMS = SamplingParams(num_generations=2, max_response_tokens=5)


def config_of(folder: Path, is_ahead: bool = True, **settings: Any) -> TrainConfig:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"run__rollout_ahead": is_ahead, "algorithm__policy": POLICY} | settings
    config: TrainConfig = held_out.config_of(folder, **settings)
    return config


def metrics_of(config: TrainConfig) -> tuple[list[dict[str, float]], list[float | None]]:
    """What every step reports but times, and its lag."""
    lines = (Path(config.run.out) / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    kept = ("time", "perf", "rollout")
    rest = [{k: v for k, v in m.items() if k.split("/")[0] not in kept} for m in steps]
    return rest, [m.get("rollout/lag_steps") for m in steps]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_same_prompts_are_trained_one_step_later(
    ranks: Pool, tmp_path: Path, num_ranks: int
) -> None:
    """From a source whose answers do not depend on the weights; it checks that they stand still."""
    settings = {"run__eval_prompts": 3, "run__eval_interval": 2, "source_config": {"seconds": 0.05}}
    now = config_of(tmp_path / "now", False, **settings)
    ahead = config_of(tmp_path / "ahead", **settings)
    for config in (now, ahead):
        ranks.run(num_ranks, train, config, timeout=300)
    (want, none), (got, lags) = metrics_of(now), metrics_of(ahead)
    assert got == want and len(got) == 6
    assert none == [None] * 6 and lags == [None, 0, 1, 1, 1, 1]
    assert all(m["actor/grad_norm"] > 0 for m in got[1:])


def test_dynamic_sampling_asks_its_first_batch_ahead(ranks: Pool, tmp_path: Path) -> None:
    settings = {"algorithm__filter_groups": {"enable": True}, "run__num_steps": 3}
    now = config_of(tmp_path / "now", False, **settings)
    ahead = config_of(tmp_path / "ahead", **settings)
    for config in (now, ahead):
        ranks.run(1, train, config, timeout=300)
    (want, _), (got, lags) = metrics_of(now), metrics_of(ahead)
    assert got == want and lags == [0, 1, 1]
    assert all(m["filter_groups/batches"] == 2 and m["groups/without_spread"] == 0 for m in got)


def test_the_source_is_called_on_a_thread_and_what_is_asked_ahead_is_not_taken(
    ranks: Pool, tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    ((threads, positions, alive),) = ranks.run(1, lagging.threads_and_positions, config)
    assert positions == [4, 8, 12, 16, 20]
    # Nothing is asked for beyond the last step.
    assert len(threads) == 5 and threads[0] == "MainThread" and "MainThread" not in threads[1:]
    assert alive == 0


def test_importance_weights_are_those_of_the_weights_that_answered(
    ranks: Pool, tmp_path: Path
) -> None:
    for is_ahead in (False, True):
        folder = tmp_path / str(is_ahead)
        engine = {"model": str(folder / "model"), "folder": str(folder / "engine")}
        config = config_of(folder, is_ahead, source_config=engine, optimizer__lr=3e-3)
        rollout = replace(config.rollout, source="tests.train.lagging:Engine")
        config = replace(config, rollout=rollout, run=replace(config.run, num_steps=4))
        ((versions, want),) = ranks.run(1, lagging.versions_and_weights, config, timeout=300)
        lines = (Path(config.run.out) / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        assert versions == ([0, 0, 1, 2] if is_ahead else [0, 1, 2, 3])
        for step, (diff, weight) in zip(steps, want, strict=True):
            assert math.isclose(step["actor/rollout_logprob_diff"], diff, abs_tol=2e-6)
            assert math.isclose(step["actor/importance_weight"], weight, abs_tol=2e-6)
        moved = [diff > 1e-3 for diff, _ in want]
        assert moved == ([False, True, True, True] if is_ahead else [False] * 4), want


def test_a_resumed_run_asks_for_the_same_prompts(ranks: Pool, tmp_path: Path) -> None:
    straight = config_of(tmp_path / "straight", run__save_interval=1, run__keep_checkpoints=3)
    ranks.run(1, train, straight, timeout=300)
    again = config_of(tmp_path / "again", run__save_interval=1, run__keep_checkpoints=3)
    ranks.run(1, train, again, timeout=300)
    # As if the run had ended in its third step, with the fourth one's rollouts under way.
    checkpoints = Path(again.run.out) / "checkpoints"
    for lost in ("iter_0000004", "iter_0000005"):
        shutil.rmtree(checkpoints / lost)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("3")
    ranks.run(1, train, again, timeout=300)
    assert metrics_of(again)[0] == metrics_of(straight)[0]
    # What a run asks for first is answered by the weights that it trains.
    assert metrics_of(straight)[1] == [0, 1, 1, 1, 1] and metrics_of(again)[1] == [0, 1, 1, 0, 1]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_what_fails_ahead_ends_the_next_step_on_every_rank(
    ranks: Pool, tmp_path: Path, num_ranks: int
) -> None:
    config = config_of(tmp_path, source_config={"fails_at": 3})
    told = ranks.run(num_ranks, held_out.run_or_refusal, config)
    assert told == ["no answer to call 3"] * num_ranks
    assert len(metrics_of(config)[0]) == 2, "the steps before are complete"


def test_a_source_of_all_ranks_cannot_be_asked_ahead(ranks: Pool, tmp_path: Path) -> None:
    config = config_of(tmp_path, source_config={"everywhere": True})
    (told,) = ranks.run(1, held_out.run_or_refusal, config)
    assert "run.rollout_ahead=true" in told and "called on all ranks" in told


def test_weights_stand_still_while_they_answer() -> None:
    task, source = held_out.Task(None), held_out.Source(None, 50, seconds=0.3)
    stream = SampledRollouts(task, source, task, PARAMS)
    stream.ask_ahead(2)
    while not source.is_sampling:
        time.sleep(0.001)
    # The source looks.
    stream.update_weights(lambda folder: None, 1)
    assert source.version == 1 and [g.group_id for g in stream.next_groups(2)] == [
        *("train/0", "train/1")
    ]


class Waiting(RolloutSource):
    """Answers when it is called off."""

    def __init__(self) -> None:
        self.is_called_off = threading.Event()

    def generate(self, prompts: Any, params: Any) -> Any:
        self.is_called_off.wait(60)
        raise ValueError("called off")

    def cancel(self) -> None:
        self.is_called_off.set()


def test_what_was_asked_ahead_is_given_up_when_the_run_ends() -> None:
    task = held_out.Task(None)
    stream = SampledRollouts(task, Waiting(), task, PARAMS)
    stream.ask_ahead(2)
    assert stream._ahead is not None
    future = stream._ahead.responses._future
    assert not future.done()
    started = time.monotonic()
    stream.close()
    assert future.done() and time.monotonic() - started < 4
    # A number of its own for every call.
    stream.source.generate = lambda prompts, params: [(), ()]  # type: ignore[method-assign]
    stream.ask_ahead(2)
    with pytest.raises(ValueError, match="2 groups were asked ahead, not 3"):
        stream.next_groups(3)


def test_requests_under_way_are_called_off() -> None:
    asked, goes_on = threading.Event(), threading.Event()

    def handler(path: str, body: Any) -> Reply:
        if path == "/v1/completions" and body["max_tokens"] > 1:
            asked.set()
            goes_on.wait(60)
        return vllm_like(path, body)

    with stand_in(handler) as server:
        source = OpenAIServerSource(server.url, model="m")
        source.start()
        prompts = held_out.Prompts("train").prompts(0, 3)
        ahead = Ahead(lambda: source.generate(prompts, PARAMS))
        assert asked.wait(30)
        source.cancel()
        ahead.wait(5)
        goes_on.set()
        with pytest.raises(RolloutServerError, match="called off"):
            ahead.result()
        # It can be asked again.
        assert len(source.generate(prompts, PARAMS)) == 3


@pytest.mark.parametrize("end", ["Ctrl-C", "the server fails"])
def test_a_run_with_requests_under_way_ends_at_once(tmp_path: Path, end: str) -> None:
    sections = tiny.run_sections(tmp_path)
    tiny.save_tokenizer(tmp_path / "model")
    server_section = {"reload": "vllm", "timeout_seconds": 60}
    sections["rollout"] = {
        "source": "server",
        "num_generations": 2,
        "max_response_tokens": 4,
        "task": {"name": "tests.train.held_out:ServedTask"},
        "server": server_section,
    }
    sections["algorithm"]["policy"] = POLICY
    sections["run"] |= {"num_steps": 3, "groups_per_step": 2, "rollout_ahead": True}
    sections["run"] |= {"self_check_interval": None}
    path = str(tiny.write_config(tmp_path / "config.yaml", sections))
    hangs, goes_on, count = threading.Event(), threading.Event(), []

    def handler(asked: str, body: Any) -> Reply:
        if asked in ("/collective_rpc", "/reset_prefix_cache"):
            return 200, {"success": True}
        if asked == "/v1/completions" and body["max_tokens"] > 1:
            count.append(asked)
            if len(count) > 2:
                if end != "Ctrl-C":
                    return 400, {"error": "out of order"}
                hangs.set()
                goes_on.wait(60)
        return vllm_like(asked, body)

    with stand_in(handler) as server:
        command = [sys.executable, "-m", "megatron_pg.train", path]
        job = subprocess.Popen(
            [*command, f"rollout.server.base_url={server.url}"],
            cwd=ROOT,
            env=tiny.clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            if end == "Ctrl-C":
                assert hangs.wait(120)
                started = time.monotonic()
                job.send_signal(signal.SIGINT)
            _, told = job.communicate(timeout=120)
        finally:
            job.kill()
            goes_on.set()
    if end == "Ctrl-C":
        assert job.returncode == 130 and time.monotonic() - started < 15
        assert "stopped by Ctrl-C" in told
    else:
        assert job.returncode == 2 and told.count("error: ") == 1, told
        assert "out of order" in told and ("'train/2'" in told or "'train/3'" in told)
        lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 1, "the step before is complete"
