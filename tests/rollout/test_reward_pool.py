"""Rewards in processes of their own: limits of time, deaths, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_pg.rollout import Judgement, NamedRewards, RewardError, make_groups, reward_settings
from tests.utils import ROOT

from .test_rewards import make_response, prompt

MODULE = "tests.rollout.failing_rewards"


def pooled(name: str = "act", **settings: Any) -> NamedRewards:
    return NamedRewards(
        reward_settings({"name": f"{MODULE}:{name}", "num_processes": 2, **settings})
    )


def judge(made: NamedRewards, texts: list[str]) -> list[Judgement]:
    prompts = [prompt(number) for number in range(len(texts))]
    return made.judge(prompts, [make_response(text) for text in texts])


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if is_alive(pid)]


@pytest.mark.parametrize("kind", ["sleeps", "regex", "child"])
def test_one_that_hangs_is_killed_scored_and_replaced(kind: str) -> None:
    made = pooled(timeout_seconds=1.5, on_error="score", error_score=-1.0)
    judged = judge(made, ["fine", kind, "fine", kind, "fine"])
    good = Judgement(score=1.0, metrics={"errors": 0.0, "timeouts": 0.0})
    late = Judgement(score=-1.0, metrics={"errors": 0.0, "timeouts": 1.0})
    assert judged == [good, late, good, late, good]
    assert judge(made, ["fine"]) == [good], "the next step has its processes"
    made.close()


DEATHS = {
    "killed": "ended its process (SIGKILL)",
    "interrupted": "raised KeyboardInterrupt",
    "gone": "ended its process (exit code 7)",
    "minus": "ended its process (exit code 255)",
    "exits": "raised SystemExit: 3 (",
    "raises": "raised KeyError: 'missing' (",
    "none": "returned a reward that must be a number, got None",
    "nan": "returned a reward that is nan",
    "object": "returned an object of type object",
    "digits": "raised ValueError: Exceeds the limit",
}


@pytest.mark.parametrize("kind", DEATHS)
def test_one_that_dies_is_told_or_scored(kind: str) -> None:
    scored = pooled(num_processes=1, on_error="score")
    fine, bad, after = judge(scored, ["fine", kind, "fine"])
    assert bad == Judgement(score=0.0, metrics={"errors": 1.0})
    assert fine == after == Judgement(score=1.0, metrics={"errors": 0.0})
    scored.close()
    with pytest.raises(RewardError) as caught:
        judge(pooled(num_processes=1), ["fine", kind])
    assert f"act' for prompt 'p1' {DEATHS[kind]}" in str(caught.value)


def test_a_failure_that_ends_the_run_ends_what_is_under_way() -> None:
    made = pooled(timeout_seconds=100)
    started = time.monotonic()
    with pytest.raises(RewardError, match="'p1' raised KeyError"):
        judge(made, ["sleeps", "raises", "fine"])
    assert time.monotonic() - started < 50
    assert [one.score for one in judge(made, ["fine"])] == [1.0], "and can be called again"
    made.close()


def test_a_batch_has_one_limit_of_time() -> None:
    made = pooled("hang_batch", timeout_seconds=1.5, on_error="score", error_score=-1.0)
    assert [one.score for one in judge(made, ["a", "hang", "b"])] == [-1.0] * 3
    assert [one.score for one in judge(made, ["a", "b"])] == [1.0] * 2
    made.close()


def test_async_rewards_run_there_too() -> None:
    made = pooled("act_later", timeout_seconds=60)
    assert [one.score for one in judge(made, ["fine", "fine", "fine"])] == [1.0] * 3
    made.close()


@pytest.mark.parametrize("num_processes", [0, 1])
def test_async_rewards_keep_their_loop_from_step_to_step(num_processes: int) -> None:
    made = pooled("keep_loop", num_processes=num_processes)
    for _ in range(3):
        assert [one.score for one in judge(made, ["a", "b"])] == [1.0] * 2
    made.close()


def test_a_fork_that_comes_back_answers_nothing() -> None:
    made = pooled(num_processes=1)
    judged = judge(made, ["forked", "pid", "forked", "pid", "pid"])
    pids = {judged[i].score for i in (1, 3, 4)}
    assert [judged[i].score for i in (0, 2)] == [1.0] * 2 and len(pids) == 1
    made.close()


def test_values_of_any_size_come_in_the_order_of_the_calls() -> None:
    made = pooled(num_processes=3)
    texts = ["large", "fine", "pid", "large", *["pid"] * 20, "fine " * 200_000]
    judged = [one.score for one in judge(made, texts)]
    assert judged[:2] == [1.0, 1.0] and judged[3] == 1.0 and judged[-1] == 1.0
    assert 1 <= len({judged[2], *judged[4:-1]}) <= 3
    made.close()


def test_processes_are_clean_kept_and_gone_when_closed() -> None:
    made = pooled(num_processes=1)
    (pid, threads, again) = (int(one.score) for one in judge(made, ["pid", "threads", "pid"]))
    assert threads == 1, "forked from no process with threads"
    assert pid == again == int(judge(made, ["pid"])[0].score), "one process serves many steps"
    assert is_alive(pid) and pid != os.getpid()
    made.close()
    wait_until_gone([pid])
    assert int(judge(made, ["pid"])[0].score) != pid
    made.close()


def test_processes_end_with_their_object() -> None:
    made = pooled(num_processes=1)
    (pid,) = (int(one.score) for one in judge(made, ["pid"]))
    del made
    wait_until_gone([pid])


def test_a_fork_of_this_process_does_not_end_them() -> None:
    made = pooled(num_processes=1)
    (pid,) = (int(one.score) for one in judge(made, ["pid"]))
    child = os.fork()
    if child == 0:
        del made
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert is_alive(pid) and int(judge(made, ["pid"])[0].score) == pid
    made.close()


def test_one_that_was_killed_from_outside_is_replaced() -> None:
    made = pooled(num_processes=1)
    (pid,) = (int(one.score) for one in judge(made, ["pid"]))
    os.kill(pid, signal.SIGKILL)
    wait_until_gone([pid])
    judged = [int(one.score) for one in judge(made, ["pid", "fine"])]
    assert judged[0] != pid and judged[1] == 1
    made.close()


def test_nothing_is_started_before_there_is_something_to_judge() -> None:
    made = pooled()
    assert make_groups([], [], made) == []
    pool = made.rewards[0].pool
    assert pool is not None and pool._workers == []


def test_one_that_cannot_be_started_ends_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    settings = {"name": "tests.rollout.broken_rewards:score", "num_processes": 2}
    made = NamedRewards(reward_settings({**settings, "on_error": "score"}))
    with pytest.raises(RewardError, match="cannot be started: raised RuntimeError: no licence"):
        judge(made, ["a", "b"])


PROGRAM = f"""
import sys
from megatron_pg.rollout import NamedRewards, reward_settings
from tests.rollout.test_rewards import make_response, prompt
settings = {{"name": "{MODULE}:note", "num_processes": 2, "timeout_seconds": 300}}
made = NamedRewards(reward_settings(settings))
made.judge([prompt(0), prompt(1)], [make_response(sys.argv[1]), make_response(sys.argv[2])])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_stays_behind_however_this_process_ends(
    number: signal.Signals, tmp_path: Path
) -> None:
    notes = [tmp_path / "a", tmp_path / "b"]
    command = [sys.executable, "-c", PROGRAM, *map(str, notes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not all(note.exists() and len(note.read_text().split()) == 3 for note in notes):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        pids = [int(word) for note in notes for word in note.read_text().split()]
        # Worker, keeper and the worker's own child of both, within a call that holds the GIL.
        assert len(set(pids)) == 6 and all(map(is_alive, pids))
        process.send_signal(number)
        process.wait(timeout=60)
    wait_until_gone(pids)
