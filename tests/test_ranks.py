"""Ranks return values, and whatever goes wrong on one of them fails its own case only."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import ROOT, Pool, RanksFailed, process_group


def summed(value: int) -> tuple[int, int]:
    with process_group():
        total = torch.tensor(value)
        dist.all_reduce(total)
        return dist.get_rank(), int(total)


def pid_and_state() -> tuple[int, int, int, float]:
    return os.getpid(), torch.get_num_threads(), len(os.environ), float(torch.rand(()))


def disturb_state() -> None:
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    os.environ["LEFT_BEHIND"] = "1"
    torch.manual_seed(5)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def second_of_two(action: str) -> None:
    """What the second rank does while the first one waits for it."""
    with process_group():
        if dist.get_rank() == 1:
            print("about to", action)
            sys.stdout.flush()
            ACTIONS[action]()
        dist.barrier()


def leave_a_process() -> None:
    subprocess.Popen(["sleep", "60"])


def not_to_be_pickled() -> object:
    return lambda: None


def sleep() -> None:
    time.sleep(60)


def fail() -> None:
    raise ValueError("a bug of this rank")


ACTIONS = {"fail": fail, "die": lambda: os.kill(os.getpid(), signal.SIGKILL), "hang": sleep}


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_values_come_back_in_the_order_of_ranks(ranks: Pool, num_ranks: int) -> None:
    want = [(rank, 3 * num_ranks) for rank in range(num_ranks)]
    assert ranks.run(num_ranks, summed, 3) == want


def test_nothing_of_a_case_is_left_for_the_next(ranks: Pool) -> None:
    ((pid, *before),) = ranks.run(1, pid_and_state)
    ranks.run(1, disturb_state)
    ((other, *after),) = ranks.run(1, pid_and_state)
    assert after == before and before[0] == 1 and pid != other
    assert ranks.run(1, summed, 1) == [(0, 1)]


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("fail", ["rank 1 ended with 1", "[rank 1]", "in fail", "a bug of this rank"]),
        ("die", ["rank 1 died of SIGKILL"]),
        ("hang", ["ranks [0, 1] did not end and were killed", "in sleep", "in barrier"]),
    ],
)
def test_what_went_wrong_on_which_rank_is_said(ranks: Pool, action: str, words: list[str]) -> None:
    with pytest.raises(RanksFailed) as failure:
        ranks.run(2, second_of_two, action, timeout=2 if action == "hang" else 30)
    told = str(failure.value)
    for word in ["second_of_two on 2 ranks", f"about to {action}", *words]:
        assert word in told, told
    assert ranks.run(2, summed, 1) == [(0, 2), (1, 2)]


def test_processes_that_outlive_their_rank_are_an_error(ranks: Pool) -> None:
    with pytest.raises(RanksFailed, match=r"processes outlive ranks \[0\]"):
        ranks.run(1, leave_a_process)


def test_values_and_functions_that_cannot_be_sent_are_errors(ranks: Pool) -> None:
    with pytest.raises(RanksFailed, match="lambda"):
        ranks.run(1, not_to_be_pickled)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        ranks.run(1, lambda: None)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in open(f"/proc/{pid}/status").read()
    except OSError:
        return False


def assert_ends(pids: list[int]) -> None:
    end = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < end, f"{pids} still run"
        time.sleep(0.01)


def test_what_a_case_sets_for_itself_is_not_seen_by_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEANT_FOR_ALL", "1")
    pool = Pool()
    monkeypatch.setenv("OF_ONE_CASE", "1")
    assert pool.run(1, os.getenv, "MEANT_FOR_ALL") == ["1"]
    assert pool.run(1, os.getenv, "OF_ONE_CASE") == [None]
    pool.close()


def test_the_process_that_forks_is_replaced_and_takes_its_ranks_along() -> None:
    pool = Pool()
    job = pool.start(2, sleep)
    os.kill(pool._server.pid, signal.SIGKILL)
    with pytest.raises(RanksFailed, match="is gone"):
        job.poll()
    assert_ends(job.pids)
    assert pool.run(1, summed, 2) == [(0, 2)]
    pool.close()


def test_ranks_end_with_the_process_that_wanted_them() -> None:
    code = (
        "import os; from tests import ranks, test_ranks\n"
        "print(*ranks.Pool().start(2, test_ranks.sleep).pids, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -9 and len(pids) == 2, done.stderr
    assert_ends(pids)
